"""The examples run, as a user would run them."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_pruning_while_training_on_real_text():
    script = EXAMPLES / "prune_while_training.py"
    run = subprocess.run(
        [sys.executable, str(script), "--smoke"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "masked and slim agree on 32 of 32 test sentences" in run.stdout
    sizes = dict(re.findall(r"│ ([a-z ,]+?) +│ +[0-9.]+ │ +([0-9.]+) M", run.stdout))
    assert sizes == {
        "dense": "22.7",
        "gradual, masked": "22.7",
        "gradual": "17.4",
        "one shot": "17.4",
        "one shot, tuned": "17.4",
    }

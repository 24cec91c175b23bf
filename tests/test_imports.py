"""Imports: which way they point, what stays unloaded, and the one name of the passes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code):
    """Run `code` in a fresh interpreter at the repository's root."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_importing_fxslim_leaves_optional_dependencies_unloaded():
    optional = {
        "matplotlib",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "safetensors",
        "torchao",
        "transformers",
    }
    done = python(f"import fxslim, fxslim.passes, sys; print({optional} & sys.modules.keys())")
    assert done.stdout == "set()\n", done.stderr


def test_top_level_passes_is_refused():
    done = python("import passes")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ImportError: this is fxslim.passes, imported as 'passes': a second copy of every pass, "
        "whose classes are not the ones that fxslim uses. Write `import fxslim.passes` instead.\n"
    )


def test_imports_point_one_way():
    done = python("from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr

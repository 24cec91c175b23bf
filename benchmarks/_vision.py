"""A small vision transformer, trained here on real handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _corpora import deal, digits
from _features import FeatureTests, TestSet, project_at_random
from _tasks import Batch, Setup, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from fxslim.workflow import import_transformers

__all__ = ["vision_task"]

_SHAPE = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_labels": 10,
}
_TRAIN, _TEST, _BATCH, _CALIBRATION_BATCH = 2800, 2000, 250, 8


def vision_task(setup: Setup) -> Task:
    """Cosine to the dense features of the class token, and accuracy of the trained classifier.

    The weights are kept in the folder of the sources: training takes some minutes.
    """
    images, labels = (tensor.to(setup.device) for tensor in digits(setup.sources))
    train, test, scored = deal(range(len(images)), _TRAIN, _TEST, len(images) - _TRAIN - _TEST)
    trained = _trained(setup.sources.folder / "vit-mnist.pt", images[train], labels[train])
    model, head = trained.vit.to(setup.device), trained.classifier.cpu()
    judged = test[: setup.items]
    items = TestSet("MNIST", _batches(images[judged], _BATCH), labels[judged].cpu(), head)
    tests = FeatureTests(model, _embed, [items])
    return Task(
        name="vision",
        model=model,
        example=items.batches[0],
        calibration=_batches(images[scored[: setup.calibration]], _CALIBRATION_BATCH),
        loss_fn=project_at_random(lambda output: output.last_hidden_state[:, 0]),
        metrics=tests.metrics,
        measure=tests,
    )


def _batches(images: Tensor, size: int) -> list[Batch]:
    return [{"pixel_values": chunk} for chunk in images.split(size)]


def _embed(model: nn.Module, batch: Batch) -> Tensor:
    """The class token's state, which the classifier reads."""
    features: Tensor = model(**batch).last_hidden_state[:, 0]
    return features


def _trained(file: Path, images: Tensor, labels: Tensor) -> Any:
    """The classifier with the weights in `file`; trained, and written there, if there is none."""
    transformers = import_transformers()
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**_SHAPE))
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    _train(model.to(images.device), images, labels)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.cpu().state_dict(), file)
    return model.eval()


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 40) -> None:
    """AdamW on cross-entropy, one cycle of the learning rate; images move by up to a pixel."""
    steps = epochs * -(-len(images) // 50)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(50):
            moved = torch.cat([_moved(some) for some in images[chosen].split(5)])
            optimizer.zero_grad()
            cross_entropy(model(pixel_values=moved).logits, labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def _moved(images: Tensor, reach: int = 1) -> Tensor:
    """The images, all moved by the same random number of pixels."""
    down, right = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    size = images.shape[-1]
    return pad(images, [reach] * 4)[..., down : down + size, right : right + size]

"""The callback in a real transformers Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import fxslim
from fxslim.trainer import PruningCallback
from tests.zoo import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    # transformers 5.23 has a new name for it, which 5.0 does not know.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]

STEPS = 8
CONFIG = {
    "target_sparsity": 0.5,
    "start_step": 1,
    "end_step": 6,
    "sparsity_decay_type": "linear",
    "pruning_frequency": 1,
}


class Texts(torch.utils.data.Dataset):
    """Sentences of random words, and as labels the words themselves."""

    def __init__(self):
        self.ids = torch.randint(5, 30, (64, 7), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, number):
        ids = self.ids[number]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Watch(TrainerCallback):
    """Writes the masks down after each step, and may kill the run."""

    def __init__(self, pruning, kill_at=None):
        self.pruning, self.kill_at, self.history = pruning, kill_at, []

    def on_step_end(self, args, state, control, **_):
        (pruner,) = self.pruning.pruning.pruners
        self.history.append([mask.tolist() for mask in pruner.head_masks.values()])
        if state.global_step == self.kill_at:
            control.should_save = control.should_training_stop = True


def trainer_of(path, kill_at=None, **arguments):
    model, _ = build("bert")
    callback = PruningCallback(CONFIG)
    watch = Watch(callback, kill_at)
    arguments = TrainingArguments(
        str(path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[callback, watch])
    return trainer, watch


def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    trainer, whole = trainer_of(tmp_path / "whole")
    trainer.train()
    killed, before = trainer_of(tmp_path / "killed", kill_at=3)
    killed.train()
    resumed, after = trainer_of(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert before.history + after.history == whole.history
    assert len(whole.history) == STEPS
    assert sum(mask.count(0) for mask in (m[0] for m in whole.history[-1])) == 4
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_mixed_precision_checkpointing_and_another_run(tmp_path):
    trainer, watch = trainer_of(tmp_path, bf16=True, gradient_checkpointing=True)
    for runs in (1, 2):
        trainer.train()
        assert int(watch.pruning.pruning.pruners[0].step) == runs * STEPS
    slim = fxslim.model_slim(trainer.model)
    assert sum(map(len, slim.meta["fxslim"].plan.kept.values())) == 4
    ids = Texts().ids[:2]
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            slim(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
            model(input_ids=ids).logits,
        )


def test_a_model_that_is_not_there_yet_is_named(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    callback = PruningCallback(CONFIG)
    with pytest.raises(ValueError, match=r"^the Trainer has no model yet \(model_init\): pass mod"):
        callback.on_init_end(arguments, None, None)

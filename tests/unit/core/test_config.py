"""A trainer config checks itself, in sentences that name the value and what is allowed."""

import pytest
import torch

from cl.config import TrainerConfig, is_due
from cl.core import UserError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"precision": "fp8"}, "trainer.precision is 'fp8'; it must be one of fp32, bf16, fp16"),
        ({"logit_mask": "class"}, "trainer.logit_mask is 'class'; it must be one of none, batch"),
        ({"evaluate": "some"}, "trainer.evaluate is 'some'"),
        ({"schedule_span": "epoch"}, "trainer.schedule_span is 'epoch'"),
        ({"eval_batch_size": 0}, "trainer.eval_batch_size is 0"),
        ({"eval_every": -1}, "trainer.eval_every is -1"),
        ({"eval_every": "often"}, "trainer.eval_every is 'often'"),
        ({"checkpoint_every": 1.5}, "trainer.checkpoint_every is 1.5"),
        ({"eval_rows": 0}, "trainer.eval_rows is 0"),
        ({"within_eval_rows": -5}, "trainer.within_eval_rows is -5"),
        ({"clip_norm": 0.0}, "trainer.clip_norm is 0.0"),
        ({"clip_norm": "big"}, "trainer.clip_norm is 'big'"),
        ({"clip_norm": True}, "trainer.clip_norm is True"),
        ({"checkpoint_every": True}, "trainer.checkpoint_every is True"),
        ({"precision": "FP16"}, "trainer.precision is 'FP16'; it must be one of fp32, bf16, fp16"),
        ({"epochs": 1, "max_tokens": 9}, "epochs and max_tokens"),
        ({"batch_size": 0}, "trainer.batch_size is 0"),
    ],
)
def test_what_is_wrong_is_named(arguments, words):
    with pytest.raises(UserError, match=words):
        TrainerConfig(**arguments)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu", ""])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(UserError, match=f"trainer.device is {device!r}.*use auto or cpu"):
        TrainerConfig(device=device).torch_device()


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert TrainerConfig().torch_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"has 2 GPUs and process 2, .* start at most 2 processes here"):
        TrainerConfig().torch_device()
    assert TrainerConfig(device="cpu").torch_device() == torch.device("cpu")


def test_auto_finds_a_device():
    assert TrainerConfig().torch_device().type in ("cpu", "cuda")


def test_the_default_budget_is_one_epoch():
    assert TrainerConfig().budget.steps(128) == 2


def test_the_loop_pauses_where_something_is_due():
    """Measured every 4 steps, saved every 6, in an experience of 15."""
    both = TrainerConfig(eval_every=4, checkpoint_every=6)
    pauses = [both.next_pause(step, 15) for step in range(15)]
    assert pauses == [4] * 4 + [6] * 2 + [8] * 2 + [12] * 4 + [15] * 3
    assert TrainerConfig().next_pause(0, 15) == 15
    assert [step for step in range(13) if is_due(4, step)] == [0, 4, 8, 12]
    assert not any(is_due(0, step) for step in range(13))

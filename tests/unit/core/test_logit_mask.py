"""`trainer.logit_mask=batch`: classes that a batch does not have take no part in its label loss."""

from functools import partial

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Batch, Setting, UserError
from cl.state import without_absent
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer

LOGITS = torch.arange(12.0).view(3, 4)


def rows(targets, task_id=None):
    ids = torch.arange(len(targets))
    return Batch(torch.zeros(len(ids), 1), torch.tensor(targets), ids, ids, task_id)


def trainer(setting, logit_mask, **config):
    return Trainer(
        toy_stream(setting),
        ToyNet,
        [],
        optimizer=partial(torch.optim.SGD, lr=0.2),
        config=TrainerConfig(logit_mask=logit_mask, batch_size=16, device="cpu", **config),
    )


def test_only_absent_classes_are_masked():
    masked = without_absent(LOGITS, rows([0, 3, 3]))
    assert torch.equal(masked[:, [0, 3]], LOGITS[:, [0, 3]])
    assert (masked[:, [1, 2]] == -1e9).all()


def test_heads_count_apart():
    masked = without_absent(LOGITS, rows([0, 1, 2], task_id=torch.tensor([0, 0, 2])))
    present = masked > -1e9
    assert present.tolist() == [[True, True, False, False], [True, True, False, False], [False, False, True, False]]


def test_half_precision_stays_finite():
    masked = without_absent(LOGITS.bfloat16(), rows([0, 3, 3]))
    assert masked.dtype == torch.float32
    assert masked.isfinite().all()


def test_outputs_of_absent_classes_are_not_trained():
    """Two classes per experience: the other rows of the head's weight and bias stay as they were drawn."""
    run, plain = (trainer(Setting.CLASS_INCREMENTAL, mask) for mask in ("batch", "none"))
    head = {name: p.detach().clone() for name, p in run.state.parameters().items() if name.startswith("head")}
    for each in (run, plain):
        each.state.data = (experience := each.state.stream.experiences[0]).load()
        each._learn(experience, 0)
    assert head
    for name, start in head.items():
        assert torch.equal(run.state.parameters()[name][2:], start[2:])
        assert not torch.equal(run.state.parameters()[name][:2], start[:2])
        assert not torch.equal(plain.state.parameters()[name][2:], start[2:])


def test_text_has_no_classes_to_mask():
    with pytest.raises(UserError, match="logit_mask is 'batch'"):
        trainer(Setting.CONTINUAL_PRETRAINING, "batch")

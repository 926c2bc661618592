"""TRC2 in a run: it stops and goes on exactly, measuring writes nothing, and what it keeps does not grow."""

from functools import partial

import torch

from cl.backbones.trc2 import Trc2
from cl.config import TrainerConfig
from cl.core import Setting
from cl.state import tensor_bytes
from cl.testing import toy_stream
from cl.trainer import Trainer
from strategies.consolidation import Consolidation

SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 8, "num_slots": 12, "top": 3}


def is_same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def consolidation():
    return Consolidation(ring_capacity=16, long_capacity=16, most=1.0)


def run_of(folder, *strategies):
    """Two experiences of eight steps."""
    stream = toy_stream(Setting.CONTINUAL_PRETRAINING, num_experiences=2)
    config = TrainerConfig(max_steps=8, batch_size=8, eval_rows=8, eval_every=3)
    backbone = partial(Trc2, **SMALL, min_surprise=0.0, chunk=4)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return Trainer(stream, backbone, strategies, optimizer=optimizer, config=config, run_dir=folder)


def test_goes_on_exactly(tmp_path):
    """Invariant 7: a stopped run ends with the weights, store, critic, buffers and controller of one that was not."""
    whole = run_of(tmp_path / "whole", consolidation())
    whole.run()
    part = run_of(tmp_path / "part", consolidation())
    step = part._step
    part._step = lambda *a: (step(*a), part.request_stop() if part.state.step == 11 else None)[0]
    assert part.run().status == "interrupted"
    rest = run_of(tmp_path / "part", consolidation())
    assert rest.run(resume=True).status == "done"
    found, wanted = rest.state.model.state_dict(), whole.state.model.state_dict()
    assert is_same(found, wanted)
    assert wanted["episodes.hippocampus.is_filled"].any()
    assert wanted["episodes.critic.bias"].ne(0).all()
    assert int(wanted["episodes.hippocampus.clock"]) == 16
    left, right = (each.strategies[0].state_dict() for each in (rest, whole))
    assert left["control"] == right["control"] != [1.0, 0.25, 0.5]
    assert is_same(left["reservoir"]["columns"], right["reservoir"]["columns"])


def test_memory_does_not_grow_with_the_stream(tmp_path):
    """What a run keeps is as large after two experiences as when its buffers had filled up."""
    trainer, sizes = run_of(tmp_path, consolidation()), []
    step = trainer._step

    def noted(*given):
        found = step(*given)
        sizes.append(tensor_bytes(trainer.state.model.state_dict(), trainer.strategies[0].ring.columns))
        return found

    trainer._step = noted
    trainer.run()
    assert len(sizes) == 16
    assert len(set(sizes[3:])) == 1


def test_evaluation_in_a_run_writes_nothing(tmp_path):
    trainer = run_of(tmp_path)
    before = {name: value.clone() for name, value in trainer.state.model.named_buffers()}
    trainer.evaluator.row()
    assert is_same(before, dict(trainer.state.model.named_buffers()))

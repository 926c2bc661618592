"""A checkpoint is read onto the run's device; what meets rows of the stream must be on the CPU again, as these are."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from cl.core import Setting
from cl.testing import equal, train
from strategies.fpf import Fpf
from strategies.frequency_replay import FrequencyReplay
from strategies.icarl import Icarl
from strategies.kfpf import Kfpf
from strategies.trace_replay import TraceReplay


class Elsewhere(Tensor):
    """A tensor of another device, as far as one can be had everywhere: only `cpu` makes an ordinary one of it."""

    def cpu(self):
        return self.as_subclass(Tensor)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: Icarl(capacity=30), lambda state: state["exemplars"]),
        (lambda: FrequencyReplay(48, "random"), lambda state: state["rows"]),
        (lambda: TraceReplay(25.0, general=False), lambda state: state["kept"]),
        (lambda: Fpf(capacity=40, steps=2, snapshot_steps=6), lambda state: state["tracker"]["before"]),
        (lambda: Kfpf(capacity=40, steps=2, snapshot_steps=6), lambda state: state["tracker"]["before"]),
    ],
    ids=["icarl", "frequency_replay", "trace_replay", "fpf", "kfpf"],
)
def test_what_meets_rows_of_the_stream_is_on_the_cpu(make, kept):
    saved = train(Setting.CLASS_INCREMENTAL, [make()], epochs=1).trainer.strategies[1].state_dict()
    moved = tree_map_only(Tensor, lambda tensor: tensor.as_subclass(Elsewhere), saved)
    assert {type(each) for each in tree_leaves(kept(moved)) if isinstance(each, Tensor)} == {Elsewhere}
    resumed = make()
    resumed.load_state_dict(moved)
    found = kept(resumed.state_dict())
    assert equal(found, kept(saved))
    assert {type(each) for each in tree_leaves(found) if isinstance(each, Tensor)} == {Tensor}

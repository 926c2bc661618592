"""Memory that outlives a batch, where a strategy stands between the backbone's forward and its `commit`."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from cl.backbones import commit_all
from cl.backbones.gpt import Gpt
from cl.backbones.memoria import Memoria
from cl.core import Output, Setting, UserError
from cl.hooks import Strategy
from cl.testing import ToyNet
from strategies.hypernet import Hypernet
from strategies.prd import Prd
from strategies.remind import Remind
from strategies.replay import Replay

CLASS = Setting.CLASS_INCREMENTAL
TREE = "attention + hierarchical_ffn_memory(hidden=4, levels=2, branches=2, block=3)"
TINY = {"width": 8, "num_heads": 2}
KEPT = {
    "tree": (partial(Gpt, **TINY, blocks=TREE), "centroids"),
    "engrams": (partial(Memoria, **TINY, **Memoria.toy, num_layers=1, persist=2), "kept_data"),
}
REMIND = {"capacity": 60, "replay_batch_size": 8, "num_codebooks": 4, "codebook_size": 8}


class Remembering(ToyNet):
    """Keeps the mean of what its head read of the last batch, and has a term in the loss."""

    def __init__(self, info):
        super().__init__(info)
        self.register_buffer("memory", torch.zeros(12))

    def forward(self, batch, start=0):
        output = super().forward(batch, start)
        return replace(output, state=output.hidden.detach().mean(0), auxiliary={"size": output.hidden.square().mean()})

    def commit(self, batch, output):
        self.memory.copy_(output.state)


class FirstOutputs(Strategy):
    """Of each experience, with the batch that they answer."""

    settings = frozenset(Setting)

    def on_run_start(self, state):
        self.found = {}

    def penalty(self, state, batch, output):
        self.found.setdefault(state.experience.id, (batch, output.logits.detach()))


def kept(model, name):
    return next(value for path, value in model.named_buffers() if path.endswith(name))


def test_an_output_without_a_state_is_not_committed(lab):
    _, trainer = lab.run([], backbone=Remembering, max_steps=1, epochs=None)
    net, state = trainer.state.model, torch.ones(12)
    commit_all([net], [(None, Output(torch.zeros(0), state=state)), (None, Output(torch.zeros(0)))])
    lab.close(net.memory, state.double())


@pytest.mark.parametrize("name", KEPT)
def test_a_task_begins_with_what_was_kept_and_with_nothing_else(lab, name):
    """A network that has never read anything, with weights and buffers of the end of a task, begins the next one so."""
    backbone, buffer = KEPT[name]
    recorder, trainer = lab.run([watch := FirstOutputs()], CLASS, backbone=backbone, max_steps=2, epochs=None)
    batch, logits = watch.found[1]
    other = backbone(trainer.state.info).double()
    other.load_state_dict(recorder.ends[0].state_dict())
    lab.close(other(batch).logits, logits)
    kept(other, buffer).copy_(kept(recorder.start, buffer))
    assert not torch.allclose(other(batch).logits, logits), "what is kept is read"


@pytest.mark.parametrize("name", KEPT)
def test_prd_hands_on_what_the_backbone_leaves_behind(lab, name):
    """It answers by prototypes, but the backbone reads every batch by itself."""
    backbone, buffer = KEPT[name]
    recorder, _ = lab.run([Prd(projection=4)], CLASS, backbone=backbone, max_steps=2, epochs=None)
    found = [kept(model, buffer) for model in (recorder.start, *recorder.ends)]
    assert len(found) == 4
    assert not any(torch.equal(before, after) for before, after in pairwise(found))


def test_prd_leaves_out_the_logits_alone(lab):
    """Memory and loss term are those of the backbone with the weights that read the last batch."""
    recorder, trainer = lab.run([Prd(projection=4)], CLASS, backbone=Remembering, max_steps=2, epochs=None)
    step = recorder.steps[-1]
    weight, bias = (step.before[f"backbone.first.{name}"] for name in ("weight", "bias"))
    hidden = (step.batch.inputs.flatten(1) @ weight.T + bias).relu()
    lab.close(kept(trainer.state.model, "memory"), hidden.mean(0))
    assert step.terms["size"] == pytest.approx(hidden.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", KEPT)
def test_remind_freezes_memory_with_the_layers_it_is_of(lab, name):
    """Its codes are of the early layers as they were when the first experience ended."""
    backbone, buffer = KEPT[name]
    recorder, _ = lab.run([Remind(**REMIND)], CLASS, backbone=backbone, max_steps=2, epochs=None)
    first, *later = [kept(model, buffer) for model in (recorder.start, *recorder.ends)]
    assert not torch.equal(first, later[0])
    assert len(later) == 3
    assert all(torch.equal(each, later[0]) for each in later)


def test_rows_of_several_conditions_cannot_be_committed_by_a_hypernetwork(lab):
    sentence = r"backbone Remembering keeps memory that outlives a batch.*rows of one experience only"
    with pytest.raises(UserError, match=sentence):
        lab.run([Hypernet(), Replay()], backbone=Remembering, max_steps=2, epochs=None)

"""Strategies that keep weights as they are, beside every other one: these stay, or the two are refused together."""

from __future__ import annotations

import pytest
import torch

from cl.core import Setting, UserError
from cl.hooks import ALL_SETTINGS, Strategy
from cl.testing import discover
from strategies.fast_slow import FastSlow
from strategies.fpf import Fpf
from strategies.gdumb import Gdumb
from strategies.hypernet import Hypernet
from strategies.kfpf import Kfpf
from strategies.locas import Locas
from strategies.recall_merge import RecallMerge
from strategies.refresh import Refresh
from strategies.rmn import Rmn
from strategies.rmn import _net as masked_net
from strategies.sharp import Sharp
from strategies.trace_replay import TraceReplay
from strategies.update_periods import UpdatePeriods
from strategies.weight_factorization import WeightFactorization
from strategies.weight_factorization import _net as factor_net

MOVING = [TraceReplay(), Fpf(), Kfpf(), Gdumb(), Refresh(), RecallMerge(), FastSlow(), Sharp()]
PLUGINS = {plugin.name: plugin for plugin in discover("strategies")}


@pytest.mark.parametrize("other", MOVING, ids=lambda other: other.name)
@pytest.mark.parametrize("kind", [Rmn, WeightFactorization])
def test_passes_outside_of_the_loop_are_refused(lab, kind, other):
    keeper = kind()
    for pair in ([keeper, other], [other, keeper]):
        with pytest.raises(UserError, match=rf"{keeper.name} keeps weights as they are, and {other.name} would change"):
            lab.run(pair, Setting.TASK_INCREMENTAL)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ([Rmn(), WeightFactorization()], "rmn masks the network, and weight_factorization behind it puts something"),
        ([Rmn(), Hypernet()], "rmn masks the network, and hypernet behind it puts something around it"),
        ([Rmn(), Locas()], "rmn masks the network, and locas behind it puts something around it"),
        ([WeightFactorization(), Hypernet()], "factorises weights, and a strategy behind it generates them instead"),
        (
            [WeightFactorization(), UpdatePeriods({"*": 2})],
            "update_periods would still step it by gradients",
        ),
    ],
    ids=lambda value: "-".join(each.name for each in value) if isinstance(value, list) else "",
)
def test_what_would_take_the_kept_weights_away_is_refused(lab, pair, message):
    with pytest.raises(UserError, match=message):
        lab.run(pair)


class Watched(Strategy):
    """After every experience the logits of each map on rows of its own; at every step what is not of single tasks."""

    settings = frozenset(Setting)

    def __init__(self):
        self.name, self.answers, self.frozen, self.factors = "watched", [], [], None

    def on_batch(self, state, batch):
        if self.factors is not None and state.experience.id > 0:
            weights = torch.cat([p.detach().flatten() for p in self.factors().values()])
            self.frozen.append((state.experience.id, weights))
        return batch

    def on_run_start(self, state):
        if any(type(module).__name__ == "FactorNet" for module in state.model.modules()):
            net = factor_net(state.model)
            self.factors = lambda: {name: net.backbone.get_parameter(name) for name in net.shared}

    def on_experience_end(self, state):
        if self.factors is None:
            row = []
            for k, experience in enumerate(state.stream.experiences[: state.experience.id + 1]):
                with torch.no_grad():
                    batch = state.prepare(experience.load().rows(torch.arange(30)))
                    row.append(masked_net(state.model)(batch, which=k).logits)
            self.answers.append(row)


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "behind"])
@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("keeping", [Rmn, WeightFactorization])
def test_every_strategy_leaves_them_or_is_refused(lab, keeping, name, is_first):
    kind = PLUGINS[name].load()
    fitting = sorted(kind.settings & ALL_SETTINGS)
    if not fitting:
        pytest.skip("works on text only")
    for setting in fitting:
        pair, watched = [keeping(), kind(**kind.contract.toy)], Watched()
        try:
            lab.run([*(pair if is_first else pair[::-1]), watched], setting, epochs=None, max_steps=4)
        except UserError:
            continue
        assert watched.answers or watched.frozen or name == "joint", "which has one experience"
        for k in range(len(watched.answers)):
            for later in watched.answers[k:]:
                assert torch.equal(later[k], watched.answers[k][k]), setting
        for (before, old), (after, new) in zip(watched.frozen, watched.frozen[1:], strict=False):
            assert before != after or torch.equal(old, new), setting

"""The continuum memory: its levels by hand, and their paces under `update_periods`."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from cl.backbones.gpt import Gpt
from cl.backbones.mixers.self_modifying import SelfModifying
from cl.backbones.mlps.cms import Cms
from cl.backbones.mlps.swiglu import Swiglu
from cl.config import TrainerConfig
from cl.core import UserError
from cl.trainer import Trainer
from strategies.update_periods import UpdatePeriods
from streams.probes.word_problem import word_problem


def gated(level, x):
    return level.out(F.silu(level.gate(x)) * level.up(x))


def normed(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_levels_follow_each_other_or_stand_side_by_side():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    chain = Cms(8, levels=3).double()
    h = x + gated(chain.levels[0], x)
    for level in list(chain.levels)[1:]:
        h = h + gated(level, normed(h))
    torch.testing.assert_close(chain(x)[0], h - x)
    side = Cms(8, levels=3, kind="independent").double()
    torch.testing.assert_close(side(x)[0], sum(gated(level, x) for level in side.levels))
    assert chain(x)[1] == {}


def test_costs_what_one_mlp_does():
    count = {kind: sum(p.numel() for p in made.parameters()) for kind, made in (("one", Swiglu(96)), ("cms", Cms(96)))}
    # 8/3 of the width in three parts, rounded up, and two norms
    assert count["one"] <= count["cms"] <= count["one"] * 1.1 + 2 * 96
    assert sum(p.numel() for p in Cms(8, hidden=5, levels=2).parameters()) == 2 * 3 * 8 * 5 + 8


def test_levels_move_at_their_own_pace():
    """After 6 steps with periods 1, 2 and 4: 6, 3 and 1 changes."""
    seen = []

    class Watch(UpdatePeriods):
        def step(self, state, batch, update):
            super().step(state, batch, update)
            named = dict(state.model.named_parameters())
            seen.append([named[f"blocks.0.mlp.levels.{s}.out.weight"].detach().clone() for s in range(3)])

    paces = Watch({"*.levels.1.*": 2, "*.levels.2.*": 4})
    paces.name = "update_periods"
    trainer = Trainer(
        word_problem("z2", [8], [], train_rows=64, eval_rows=8),
        partial(Gpt, width=8, num_heads=2, num_layers=1, mlp="cms(levels=3)"),
        [paces],
        optimizer=partial(torch.optim.SGD, lr=0.5),
        config=TrainerConfig(max_steps=6, batch_size=8, device="cpu"),
    )
    trainer.run()
    changes = [[not torch.equal(before[s], after[s]) for before, after in pairwise(seen)] for s in range(3)]
    assert changes[0] == [True] * 5
    assert changes[1] == [True, False, True, False, True]
    assert changes[2] == [False, False, True, False, False]


def test_wrong_options_are_one_sentence():
    with pytest.raises(UserError, match="kind of cms is 'nested'; it must be one of sequential, independent"):
        Cms(8, kind="nested")
    with pytest.raises(UserError, match="levels"):
        Cms(8, levels=0)


def test_self_modifying_memories_write_each_other():
    """Five memories apart, a head and a token at a time."""
    torch.manual_seed(0)
    mixer = SelfModifying(8, num_heads=2, keep=2.0).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    wanted = torch.zeros(6, 8, dtype=torch.float64)
    for h in range(2):
        begun = mixer.start[h].detach().split((4, 4, 4, 1, 1))
        key, value, output, rate, decay = (m.clone() for m in begun)
        for t in range(6):
            u, q = (layer(x[0, t])[4 * h : 4 * h + 4] for layer in (mixer.inner, mixer.query))
            k, v = key @ u, value @ u
            k, v = k / k.norm(), v / v.norm()
            eta, alpha = torch.sigmoid(rate @ u), torch.sigmoid(decay @ u + 2.0)
            for memory, first in zip((key, value, output, rate, decay), begun, strict=True):
                target = memory @ v
                memory.copy_(first + alpha * (memory - first) - eta * torch.outer(memory @ k - target, k))
            wanted[t, 4 * h : 4 * h + 4] = normed(output @ (q / q.norm()))
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0][0], mixer.out(wanted * F.silu(mixer.gate(x[0]))), atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["unlike", "alike", "two"])
def test_self_modifying_memories_neither_grow_nor_fade(size, kind):
    """What is written comes from the memories alone: products of hundreds of matrices, whatever is read."""
    torch.manual_seed(0)
    mixer = SelfModifying(32, num_heads=2)
    x = torch.randn(1, 400, 32)
    x = {"unlike": x, "alike": x[:, :1] + 0.3 * x, "two": x[:, :2].repeat(1, 200, 1)}[kind]
    with torch.no_grad():
        mixer.inner.weight.mul_(size)
        _, state = mixer(x)
    grown = state["memory"].norm() / mixer.start.norm()
    assert 0.3 < grown < 3


def test_self_modifying_memories_are_written_in_full_precision_under_autocast():
    torch.manual_seed(0)
    mixer, x = SelfModifying(32, num_heads=2), torch.randn(1, 20, 32)
    seen = []
    written = mixer._written
    mixer._written = lambda *given: seen.append(given) or written(*given)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x)
    assert torch.equal(state["memory"], written(*seen[-1])), "the same step without autocast"

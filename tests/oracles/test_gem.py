"""GEM's quadratic program against a brute-force solution, and its promise kept during training."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch

import strategies.agem
import strategies.gem
from cl.core import Setting
from strategies.gem import Gem, dual, project


def brute_force(quadratic, linear, margin):
    """argmin of the dual by trying every set of bounded variables: the best feasible stationary point."""
    size, best = len(linear), None
    for bounded in chain.from_iterable(combinations(range(size), k) for k in range(size + 1)):
        free = [i for i in range(size) if i not in bounded]
        v = np.full(size, margin)
        if free:
            known = quadratic[np.ix_(free, bounded)] @ v[list(bounded)] if bounded else 0.0
            v[free] = np.linalg.solve(quadratic[np.ix_(free, free)], -linear[free] - known)
        value = 0.5 * v @ quadratic @ v + linear @ v
        if (v >= margin - 1e-12).all() and (best is None or value < best[0]):
            best = (value, v)
    return best[1]


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_dual_is_the_brute_force_solution(margin):
    generator = np.random.default_rng(0)
    for _ in range(200):
        past, gradient = generator.normal(size=(3, 7)), generator.normal(size=7)
        quadratic, linear = past @ past.T + 1e-6 * np.eye(3), past @ gradient
        wanted = brute_force(quadratic, linear, margin)
        np.testing.assert_allclose(dual(quadratic, linear, margin), wanted, rtol=1e-7, atol=1e-9)


def test_projection_is_the_nearest_vector_in_the_cone():
    """Without margin: it keeps the conditions of Karush, Kuhn and Tucker."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        past = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        gradient = torch.randn(8, generator=generator, dtype=torch.float64)
        found = project(gradient, past, margin=0.0, ridge=1e-12)
        slack = past @ found
        multipliers = torch.linalg.lstsq(past.T, (found - gradient).unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(past.T @ multipliers, found - gradient)
        assert (slack > -1e-8).all()
        assert (multipliers > -1e-8).all()
        assert (slack * multipliers).abs().max() < 1e-8


def test_one_constraint_is_agem():
    gradient, past = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([[0.0, 3.0, 1.0]]).double()
    wanted = strategies.agem.project(gradient, past[0])
    torch.testing.assert_close(project(gradient, past, margin=0.0, ridge=1e-12), wanted)


def check(lab, setting, margin):
    """Edited gradients against g + G' v with the brute-force v, from gradients recomputed on the stored rows."""
    gem, num_projected = Gem(capacity=30, margin=margin, ridge=1e-6), 0

    class Past(lab.Recorder):
        def on_gradients(self, state):
            super().on_gradients(state)
            owners, self.steps[-1].past = gem.buffer.columns.get("experience_id", torch.zeros(0)), []
            for k in range(state.experience.id):
                rows = state.prepare(gem.buffer.rows((owners[: len(gem.buffer)] == k).nonzero().squeeze(1)))
                self.steps[-1].past.append(lab.gradient(state.model, lab.label_loss(state.model, rows)))

    before = Past()
    after, _ = lab.run([before, gem], setting, epochs=2)
    for first, last in zip(before.steps, after.steps, strict=True):
        if not first.past:
            lab.close(last.gradients, first.gradients, rtol=0, atol=0)
            continue
        past = torch.stack([lab.flat(gradients) for gradients in first.past])
        g, edited = (
            lab.flat({n: grads.get(n, torch.zeros_like(z)) for n, z in first.past[0].items()})
            for grads in (first.gradients, last.gradients)
        )
        wanted = g
        if (past @ g < 0).any():
            num_projected += 1
            gram = (past @ past.T).numpy() + 1e-6 * np.eye(len(past))
            wanted = g + torch.from_numpy(brute_force(gram, (past @ g).numpy(), margin)) @ past
        lab.close(edited, wanted, rtol=1e-5, atol=1e-6)
        assert (past @ edited >= -1e-4).all()
    assert num_projected > 3


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("setting", [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL])
def test_training_steps_are_projected(lab, setting, margin):
    check(lab, setting, margin)


def test_the_oracle_needs_the_projection(lab, monkeypatch):
    monkeypatch.setattr(strategies.gem, "project", lambda gradient, *_: gradient)
    lab.dies(lambda: check(lab, Setting.CLASS_INCREMENTAL, 0.5))

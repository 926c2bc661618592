"""What GPM, OWM and Hebbian projection hold: against SVD, recursive least squares, PCA and the official rule."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from strategies._lateral import Lateral
from strategies._layer_inputs import input_rows
from strategies._subspace import Damped, Principal
from strategies.gpm import Gpm


def augmented(tensors, name):
    return torch.cat([tensors[f"{name}.weight"].flatten(1), tensors[f"{name}.bias"][:, None]], dim=1)


def test_a_step_is_the_projected_step_of_sgd(lab):
    gpm = Gpm(thresholds=0.9, num_rows=100)
    bases = []

    class Keeper(lab.Recorder):
        def on_experience_start(self, state):
            bases.append({name: subspace.basis for name, subspace in gpm.subspaces.items()})

    keeper = Keeper()
    recorder, _ = lab.run([gpm, keeper], epochs=1)
    num_held = 0
    for step in recorder.steps:
        for name, basis in bases[step.experience].items():
            gradient = augmented(step.gradients, name)
            if len(basis):
                gradient = gradient - gradient @ basis @ basis.T
                num_held += 1
            # the recorder stands inside: what it sees after the update is not yet projected
            lab.close(
                augmented(step.after, name), augmented(step.before, name) - lab.lr * augmented(step.gradients, name)
            )
    for this, following in zip(recorder.steps, recorder.steps[1:], strict=False):
        if this.experience != following.experience:
            continue
        for name, basis in bases[this.experience].items():
            gradient = augmented(this.gradients, name)
            kept = gradient if not len(basis) else gradient - gradient @ basis @ basis.T
            lab.close(augmented(following.before, name), augmented(this.before, name) - lab.lr * kept)
    assert num_held > 20


def official_gpm(activations, threshold, held=None):
    """As `update_GPM` of sahagobinda/GPM, in its own words: activations (D, N), singular values, cumulative sums."""
    total = (np.linalg.svd(activations, full_matrices=False)[1] ** 2).sum()
    left = activations if held is None else activations - held @ held.T @ activations
    u, s, _ = np.linalg.svd(left, full_matrices=False)
    reached = (total - (s**2).sum()) / total
    count = 0
    for value in s**2 / total:
        if reached >= threshold:
            break
        reached += value
        count += 1
    new = u[:, :count]
    return new if held is None else np.hstack([held, new])


def test_principal_directions_are_those_of_the_svd():
    generator = torch.Generator().manual_seed(0)
    subspace, held = Principal(0.95), None
    for _ in range(3):
        scales = torch.rand(30, generator=generator, dtype=torch.float64) ** 4
        rows = torch.randn(50, 30, generator=generator, dtype=torch.float64) * scales
        subspace.update(rows[:20])
        subspace.update(rows[20:])
        subspace.end_task()
        held = official_gpm(rows.numpy().T, 0.95, held)
        assert subspace.rank == held.shape[1]
        np.testing.assert_allclose((subspace.basis @ subspace.basis.T).numpy(), held @ held.T, atol=1e-8)
        assert 0.95 <= subspace.captured(rows) <= 1
    assert 3 < subspace.rank < 30


def test_damped_directions_are_recursive_least_squares():
    """k = P x / (alpha + x P x), P <- P - k x P, as the paper writes it; P projects, up to its own scale."""
    generator = torch.Generator().manual_seed(0)
    alpha = 0.3
    subspace, inverse = Damped(alpha), torch.eye(12, dtype=torch.float64)
    for _ in range(2):
        for _ in range(9):
            rows = torch.randn(5, 12, generator=generator, dtype=torch.float64)
            subspace.update(rows)
            x = rows.mean(0)
            k = inverse @ x / (alpha + x @ inverse @ x)
            inverse = inverse - torch.outer(k, x @ inverse)
        subspace.end_task()
        torch.testing.assert_close(subspace.project(torch.eye(12, dtype=torch.float64)), inverse, rtol=0, atol=2e-4)


def largest_angle(left, right):
    """Degrees between the spans of two sets of orthonormal columns."""
    cosines = torch.linalg.svdvals(left.double().T @ right.double())
    return math.degrees(math.acos(min(1.0, float(cosines.min()))))


def gaussian(generator, count):
    """Rows with 4 strong, 4 weaker and many faint directions, and those directions."""
    axes = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3))).Q
    scales = torch.tensor([1.5] * 4 + [0.8] * 4 + [0.05] * 16)
    return torch.randn(count, 24, generator=generator) * scales @ axes.T, axes


@pytest.mark.parametrize(("rate", "inner_steps"), [(0.02, 5), (0.1, 1)], ids=["five", "one"])
def test_lateral_connections_learn_the_principal_subspace(rate, inner_steps):
    """Oja's rule against PCA, within the 5 degrees of the method card; then the residual in a second experience."""
    generator = torch.Generator().manual_seed(0)
    subspace = Lateral(rate, inner_steps, orthonormal=True)
    subspace.begin_task(4, 24, torch.zeros(()), generator)
    for _ in range(200):
        subspace.update(gaussian(generator, 256)[0])
    assert subspace.measures()["orthonormality"] < 0.05
    subspace.end_task()
    axes = gaussian(generator, 1)[1]
    assert largest_angle(subspace.basis, axes[:, :4]) < 5
    subspace.begin_task(4, 24, torch.zeros(()), generator)
    for _ in range(200):
        subspace.update(gaussian(generator, 256)[0])
    subspace.end_task()
    assert largest_angle(subspace.basis, axes[:, :8]) < 5
    exact = Principal(0.99)
    exact.update(gaussian(generator, 4000)[0])
    exact.end_task()
    assert exact.rank == 8
    assert largest_angle(subspace.basis, exact.basis) < 5


def test_without_the_anti_hebbian_part_they_do_not(monkeypatch, lab):
    monkeypatch.setattr(torch, "addmm", lambda left, *others, **options: left)
    lab.dies(partial(test_lateral_connections_learn_the_principal_subspace, 0.02, 5))


@pytest.mark.parametrize("spiking_levels", [None, 40])
def test_lateral_steps_are_the_official_ones(spiking_levels):
    """All rows in one matrix, rows of old subspaces zeroed, as in modules/hlop_module.py."""
    generator = torch.Generator().manual_seed(1)
    subspace = Lateral(0.02, 5, orthonormal=False, spiking_levels=spiking_levels)
    connections = torch.zeros(0, 10)
    for count in (3, 2):
        subspace.begin_task(count, 10, torch.zeros(()), generator)
        connections = torch.cat([connections, subspace.rows])
        momentum = torch.zeros_like(connections)
        for _ in range(7):
            x = torch.randn(6, 10, generator=generator)
            subspace.update(x)
            for _ in range(5):
                y = x @ connections.T
                if spiking_levels is not None:
                    # old rows are folded into one symmetric matrix here, and are not rounded
                    new = (y[:, -count:].clamp(-20, 20) / 20 * spiking_levels).round() / spiking_levels * 20
                    y = torch.cat([y[:, :-count], new], dim=1)
                change = (y.T @ (x - y @ connections) / len(x)).clamp(-10, 10)
                change[:-count] = 0.0
                momentum = 0.9 * momentum + 0.1 * change
                connections = connections + 0.02 * momentum
        found, wanted = subspace.connections, connections
        torch.testing.assert_close(found.T @ found, wanted.T @ wanted, rtol=1e-4, atol=1e-5)
        gram = wanted @ wanted.T
        if count == 3:
            worst = float((gram - torch.eye(len(gram))).abs().max())
            assert subspace.measures()["orthonormality"] == pytest.approx(worst, abs=1e-5)
        subspace.end_task()
        change = torch.randn(4, 10, generator=generator)
        torch.testing.assert_close(subspace.project(change), change - change @ wanted.T @ wanted, rtol=1e-3, atol=1e-4)


def test_steps_in_coefficients_leave_bounded_changes_to_the_rule_as_written():
    """Where an entry of a step may reach its bound nothing is touched, and the update is the one with the bound."""
    generator = torch.Generator().manual_seed(0)
    for scale, is_done in ((0.5, True), (40.0, False)):
        one, other = Lateral(1e-4, 5, orthonormal=True), Lateral(1e-4, 5, orthonormal=True)
        one.begin_task(6, 90, torch.zeros(()), generator)
        other.begin_task(6, 90, torch.zeros(()), torch.Generator())
        other.rows = one.rows.clone()
        for _ in range(4):
            x = scale * torch.randn(8, 90, generator=generator)
            before = one.rows.clone()
            assert one._update_in_coefficients(x, x) is is_done
            if not is_done:
                assert torch.equal(one.rows, before)
                one.update(x)
            other._update(x, x)
            torch.testing.assert_close(one.rows, other.rows)
            torch.testing.assert_close(one.momentum, other.momentum, rtol=1e-4, atol=1e-5)


def test_steps_in_coefficients_serve_inputs_that_are_held_already():
    """As of images, whose strongest directions are learnt first: large activities, but little is left over."""
    generator = torch.Generator().manual_seed(0)
    one, other = Lateral(0.01, 5, orthonormal=True), Lateral(0.01, 5, orthonormal=True)
    one.begin_task(40, 300, torch.zeros(()), generator)
    other.begin_task(40, 300, torch.zeros(()), torch.Generator())
    other.rows = one.rows.clone()
    for _ in range(4):
        x = 6 * torch.randn(8, 40, generator=generator) @ one.rows + 0.3 * torch.randn(8, 300, generator=generator)
        assert one._update_in_coefficients(x, x)
        other._update(x, x)
        torch.testing.assert_close(one.rows, other.rows, rtol=1e-4, atol=1e-5)


def test_holding_is_projecting_the_change():
    generator = torch.Generator().manual_seed(0)
    for layer in (nn.Conv2d(2, 5, 3).double(), nn.Linear(18, 5).double(), nn.Linear(19, 5, bias=False).double()):
        subspace = Damped(0.5)
        for _ in range(6):
            subspace.update(torch.randn(1, 19, generator=generator, dtype=torch.float64))
        subspace.end_task()
        assert 0.1 < float(subspace.strength.min()) < 0.99
        named = {"0.weight": layer.weight, "0.bias": layer.weight.new_zeros(5) if layer.bias is None else layer.bias}
        width = 19 if layer.bias is None else 20

        def whole(named=named, width=width):
            return augmented(named, "0").detach()[:, : width if width == 19 else 19].clone()

        response = subspace.response(layer)
        for _ in range(4):
            before = whole()
            with torch.no_grad():
                for p in layer.parameters():
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            wanted = before + subspace.project(whole() - before)
            response = subspace.hold(layer, response)
            torch.testing.assert_close(whole(), wanted)
            torch.testing.assert_close(response, subspace.response(layer))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), padding="same", bias=False),
        nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),
    ],
    ids=["strided", "same", "circular"],
)
def test_patches_times_weights_are_the_convolution(layer):
    inputs = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias[:, None]], dim=1)
    found = (input_rows(layer, inputs) @ weight.T).view(2, -1, 4).transpose(1, 2)
    torch.testing.assert_close(found, layer(inputs).flatten(2))


def test_patches_of_a_convolution_along_time():
    layer = nn.Conv1d(3, 4, 3, stride=2, padding=1)
    inputs = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    weight = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1)
    torch.testing.assert_close((input_rows(layer, inputs) @ weight.T).view(2, -1, 4).transpose(1, 2), layer(inputs))

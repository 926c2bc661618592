"""Cells whose states are a scan: numbers by hand, closed forms, and the recurrences written out again."""

import cmath
import math

import pytest
import torch
from torch import nn

from cl.backbones._cells import Timescale, ages
from cl.backbones._spec import build_mixer, build_rule, plugin_names
from cl.backbones.scan_cells.gateloop import Gateloop
from cl.backbones.scan_cells.hippo import Hippo, constants, legs
from cl.backbones.scan_cells.leaky import Leaky
from cl.backbones.scan_cells.lru import Lru
from cl.backbones.scan_cells.mingru import Mingru
from cl.backbones.scan_cells.minlstm import Minlstm
from cl.backbones.scan_cells.s5 import S5, legs_eigenvalues
from cl.core import UserError

LN3 = math.log(3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def fill(module, **values):
    """Weights and biases of a cell's maps: weight * identity, bias."""
    with torch.no_grad():
        for name, (weight, bias) in values.items():
            linear = getattr(module, name)
            nn.init.eye_(linear.weight)
            linear.weight.mul_(weight)
            if linear.bias is not None:
                linear.bias.fill_(bias)


def states(cell, x_BTD, reset=None):
    h0 = torch.zeros(x_BTD.shape[0], *cell.kept_shape, dtype=x_BTD.dtype)
    age = ages(x_BTD.shape[1], reset, torch.zeros(x_BTD.shape[0], dtype=x_BTD.dtype))
    return cell.run(x_BTD, h0, age, reset)


def test_mingru_by_hand():
    cell = Mingru(1, 1)
    fill(cell, update=(0, LN3), candidate=(2, 0))  # z = 3/4, h~ = 2 x
    h, last = states(cell, torch.tensor([[[1.0], [0.0], [-1.0]]]))
    torch.testing.assert_close(h.flatten(), torch.tensor([1.5, 0.375, -1.40625]))
    assert last.item() == pytest.approx(-1.40625)


def test_positive_mingru_by_hand():
    cell = Mingru(1, 1, activation="positive")
    fill(cell, update=(0, 0), candidate=(1, 0))  # z = 1/2, g(1) = 1.5, g(-ln 3) = 1/4
    h, _ = states(cell, torch.tensor([[[1.0], [-LN3]]]))
    torch.testing.assert_close(h.flatten(), torch.tensor([0.75, 0.5]))


def test_minlstm_by_hand():
    cell = Minlstm(1, 1)
    fill(cell, forget=(0, 0), input=(0, LN3), candidate=(1, 0))  # f = 1/2, i = 3/4: f' = 0.4, i' = 0.6
    h, _ = states(cell, torch.tensor([[[1.0], [1.0]]]))
    torch.testing.assert_close(h.flatten(), torch.tensor([0.6, 0.84]))


def test_minlstm_does_not_underflow():
    cell = Minlstm(1, 1)
    fill(cell, forget=(0, -200), input=(0, -200), candidate=(1, 0))
    h, _ = states(cell, torch.ones(1, 2, 1))
    torch.testing.assert_close(h.flatten(), torch.tensor([0.5, 0.75]))
    one = cell.step(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1))
    torch.testing.assert_close(one, torch.tensor([[0.5]]))


def test_a_leaky_unit_approaches_its_input_exponentially():
    cell = Leaky(1, 1, shortest=4.0, longest=4.0).double()
    fill(cell, input=(1, 0))
    h, _ = states(cell, torch.full((1, 5, 1), 0.3, dtype=torch.float64))
    expected = [math.tanh(0.3) * (1 - 0.75**t) for t in range(1, 6)]
    torch.testing.assert_close(h.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_time_constants_start_where_they_are_told_and_stay_above_one():
    timescale = Timescale(3, 2.0, 8.0)
    torch.testing.assert_close(timescale(), torch.tensor([2.0, 4.0, 8.0]))
    torch.testing.assert_close(Timescale(3, 1.5, 15_000.0)(), torch.tensor([1.5, 150.0, 15_000.0]))
    nn.init.constant_(timescale.rho, -50.0)
    assert (timescale() >= 1).all()
    with pytest.raises(UserError, match=r"1\.0 to 8"):
        Timescale(3, 1.0, 8.0)


def test_lru_is_its_recurrence_in_complex_numbers():
    cell = Lru(3, 3, num_states=2).double()
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    h, _ = states(cell, x)
    driven = cell.input(x)[0].tolist()
    for n in range(2):
        nu, theta = math.exp(cell.nu[n].item()), math.exp(cell.theta[n].item())
        eigenvalue, gamma = cmath.exp(complex(-nu, theta)), math.exp(cell.log_gamma[n].item())
        assert gamma == pytest.approx(math.sqrt(1 - abs(eigenvalue) ** 2), rel=1e-5)
        value = 0j
        for t in range(6):
            value = eigenvalue * value + gamma * complex(driven[t][n], driven[t][2 + n])
            assert abs(h[0, t, n].item() - value) < 1e-12


def test_lru_starts_within_its_ring():
    size = torch.exp(-Lru(8, 8, num_states=500, r_min=0.5, r_max=0.8).nu.exp())
    assert size.min() >= 0.5 - 1e-6
    assert size.max() <= 0.8 + 1e-6
    # uniform in area: the mean of the squares is the middle of the squares
    assert size.square().mean().item() == pytest.approx((0.25 + 0.64) / 2, abs=0.02)


def test_s5_starts_at_the_normal_part_of_legs():
    n = torch.arange(8, dtype=torch.float64)
    matrix = -legs(8)[0] + torch.outer((n + 0.5).sqrt(), (n + 0.5).sqrt())
    found = torch.linalg.eigvals(matrix)
    above = found[found.imag > 0]
    above = above[above.imag.argsort()]
    torch.testing.assert_close(legs_eigenvalues(4), above, atol=1e-9, rtol=1e-9)


def test_s5_is_zero_order_hold():
    """Between two tokens the input stands still: what the differential equation does in many small steps."""
    cell = S5(2, 2, num_states=1).double()
    with torch.no_grad():
        cell.log_step.fill_(math.log(0.1))
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    h, _ = states(cell, x)
    eigenvalue = complex(-math.exp(cell.log_decay.item()), cell.frequency.item())
    value, steps = 0j, 20_000
    for t, (real, imaginary) in enumerate(cell.input(x)[0].tolist()):
        for _ in range(steps):
            value += (eigenvalue * value + complex(real, imaginary)) * 0.1 / steps
        assert abs(h[0, t, 0].item() - value) < 1e-5


def test_ffm_is_a_sum_of_decayed_and_turned_traces():
    mixer = build_mixer("scan_rnn(cell=ffm(num_traces=2, num_contexts=3))", 4).double()
    cell = mixer.cell
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    h, _ = states(cell, x)
    written = (cell.trace(x) * cell.trace_gate(x).sigmoid())[0]
    for m in range(2):
        for c in range(3):
            gamma = cmath.exp(complex(-abs(cell.decay[m].item()), cell.frequency[c].item()))
            for t in range(5):
                expected = sum(gamma ** (t - s) * written[s, m].item() for s in range(t + 1))
                assert abs(h[0, t, m, c].item() - expected) < 1e-12


def test_ffm_is_read_behind_a_norm_or_passed_by():
    mixer = build_mixer("scan_rnn(cell=ffm(num_traces=2, num_contexts=3), units=5)", 4).double()
    cell, x = mixer.cell, torch.randn(1, 5, 4, dtype=torch.float64)
    nn.init.normal_(cell.norm.weight)
    h = states(cell, x)[0][0]
    z = torch.stack((h.real, h.imag), -1).flatten(1) @ cell.mix.weight.T + cell.mix.bias
    centred = z - z.mean(1, keepdim=True)
    z = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * cell.norm.weight + cell.norm.bias
    g = torch.sigmoid(cell.read_gate(x[0]))
    a = mixer.gate(x[0])
    expected = mixer.out((z * g + cell.skip(x[0]) * (1 - g)) * a * torch.sigmoid(a))
    torch.testing.assert_close(mixer(x)[0][0], expected)


@pytest.mark.parametrize("cell", ["lru", "s5"])
def test_complex_states_are_read_by_a_complex_matrix(cell):
    mixer = build_mixer(f"scan_rnn(cell={cell}(num_states=3), units=5, is_gated=false)", 4).double()
    cell, x = mixer.cell, torch.randn(1, 6, 4, dtype=torch.float64)
    real, minus_imaginary = cell.output.weight.split(3, 1)
    h = states(cell, x)[0][0]
    read = (h @ torch.complex(real, -minus_imaginary).T).real + cell.skip(x[0])
    torch.testing.assert_close(mixer(x)[0][0], mixer.out(read))


def test_gateloop_is_its_recurrence_in_complex_numbers():
    """With its gates: k at the input, q at the output, a number a channel and a loop over time."""
    mixer = build_mixer("scan_rnn(cell=gateloop, units=3, is_gated=false)", 4).double()
    cell, x = mixer.cell, torch.randn(1, 7, 4, dtype=torch.float64)
    names = ("query", "key", "value", "retention", "phase")
    q, k, v, r, p = ((x[0] @ getattr(cell, name).weight.T).tolist() for name in names)
    y = torch.zeros(7, 3, dtype=torch.float64)
    for n, bias in enumerate(cell.bias.tolist()):
        h = 0j
        for t in range(7):
            h = cmath.exp(1j * p[t][n]) / (1 + math.exp(-r[t][n] - bias)) * h + k[t][n] * v[t][n]
            y[t, n] = q[t][n] * h.real
    torch.testing.assert_close(mixer(x)[0][0], mixer.out(y), atol=1e-12, rtol=1e-12)


def test_gateloop_starts_with_long_memories():
    torch.testing.assert_close(Gateloop(2, 3).bias.sigmoid(), torch.tensor([0.9, 0.9495, 0.999]))


@pytest.mark.parametrize(
    ("retention", "phase", "expected"),
    [
        (50, 0, [1, 3, 6, 10]),  # |a| = 1 and no turn: a sum
        (-50, 1, [1, 2, 3, 4]),  # a = 0: nothing but the token
        (50, math.pi, [1, 1, 2, 2]),  # half a turn a token: the sum with alternating signs
        (50, math.pi / 2, [1, 2, 2, 2]),  # a quarter: v_t - v_{t-2} + v_{t-4} ...
    ],
)
def test_gates_of_gateloop_at_their_limits(retention, phase, expected):
    cell = Gateloop(2, 1).double()
    with torch.no_grad():
        cell.bias.fill_(retention)
        for name, row in (("retention", (0, 0)), ("phase", (phase, 0)), ("key", (1, 0)), ("value", (0, 1))):
            getattr(cell, name).weight.copy_(torch.tensor([row], dtype=torch.float64))
    x = torch.stack((torch.ones(4), torch.arange(1.0, 5)), 1).double().unsqueeze(0)
    h, _ = states(cell, x)
    torch.testing.assert_close(h.real.flatten(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_gateloop_is_the_rule_of_that_name_with_one_key_a_head():
    mixer = build_mixer("scan_rnn(cell=gateloop, units=3)", 4).double()
    cell, x = mixer.cell, torch.randn(2, 9, 4, dtype=torch.float64)
    rule = build_rule("gateloop", 4, 3, 1, 1).double()
    rule.load_state_dict({name: x for name, x in cell.state_dict().items() if name in rule.state_dict()})
    q, k, v = (each(x).unsqueeze(-1) for each in (cell.query, cell.key, cell.value))
    start = rule.init_state(torch.zeros(2, 3, 1, 1, dtype=torch.float64))
    y, left = rule.chunk(start, q, k, v, rule.gates(x))
    h, last = states(cell, x)
    torch.testing.assert_close(cell.read(h, x), y.squeeze(-1))
    torch.testing.assert_close(last, left["matrix"].squeeze(-1))


def legendre(order, points):
    """Legendre polynomials by their own recurrence, (order, points)."""
    rows = [torch.ones_like(points), points]
    for n in range(1, order - 1):
        rows.append(((2 * n + 1) * points * rows[n] - n * rows[n - 1]) / (n + 1))
    return torch.stack(rows[:order])


def test_hippo_reconstructs_a_polynomial():
    """LegS keeps the best polynomial approximation of the whole past: a cubic is kept whole."""
    cell, num_tokens = Hippo(1, 1, order=6, num_channels=1).double(), 4000
    fill(cell, input=(1, 0))
    place = (torch.arange(num_tokens, dtype=torch.float64) + 0.5) / num_tokens
    signal = 1 - 4 * place + 3 * place**3
    h, last = states(cell, signal.view(1, -1, 1))
    scale = (2 * torch.arange(6, dtype=torch.float64) + 1).sqrt()
    back = (last[0, 0] * scale) @ legendre(6, 2 * place - 1)
    assert (back - signal).abs().max() < 1e-2
    halfway = (h[0, num_tokens // 2 - 1, 0] * scale) @ legendre(6, 2 * place - 1)
    assert (halfway[::2] - signal[: num_tokens // 2]).abs().max() < 1e-2


def test_hippo_is_its_bilinear_recurrence():
    cell = Hippo(1, 1, order=4, num_channels=1).double()
    fill(cell, input=(1, 0))
    x, reset = torch.randn(1, 7, 1, dtype=torch.float64), torch.zeros(1, 7, dtype=torch.bool)
    reset[0, 4] = True
    h, _ = states(cell, x, reset)
    matrix = [
        [math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else float(n + 1) if n == k else 0.0 for k in range(4)]
        for n in range(4)
    ]
    matrix, drive = torch.tensor(matrix, dtype=torch.float64), torch.tensor([1, 3, 5, 7], dtype=torch.float64).sqrt()
    eye, c, age = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 0
    for t in range(7):
        c, age = (torch.zeros_like(c), 0) if reset[0, t] else (c, age)
        age += 1
        c = torch.inverse(eye + matrix / (2 * age)) @ ((eye - matrix / (2 * age)) @ c + drive * x[0, t, 0] / age)
        torch.testing.assert_close(h[0, t, 0], c, atol=1e-12, rtol=1e-12)


def test_hippo_basis_is_exact_enough_for_its_largest_order():
    matrix, _, vectors, inverse = constants(12, "cpu")
    back = vectors @ torch.diag(torch.arange(1.0, 13, dtype=torch.float64)) @ inverse
    assert ((back - matrix).abs() / matrix.abs().max()).max() < 1e-8
    with pytest.raises(UserError, match="order of hippo is 13"):
        Hippo(4, 4, order=13)


@pytest.mark.parametrize("cell", plugin_names("scan_cells"))
def test_a_reset_forgets_and_nothing_else_does(cell):
    mixer = build_mixer(f"scan_rnn(cell={cell})", 16)
    x, reset = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)
    whole = mixer(x)[0]
    reset[0, 5] = True
    cut = mixer(x, reset=reset)[0]
    torch.testing.assert_close(cut[0, 5:], mixer(x[:, 5:])[0][0])
    assert (cut[0, 5:] - whole[0, 5:]).abs().max() > 1e-6
    torch.testing.assert_close(cut[1], whole[1])


def test_unknown_cells_and_options_are_refused():
    with pytest.raises(UserError, match="mingru"):
        build_mixer("scan_rnn(cell=gru)", 8)
    with pytest.raises(UserError, match="order"):
        build_mixer("scan_rnn(cell=hippo(size=3))", 8)
    with pytest.raises(UserError, match="activation of mingru is 'tanh'"):
        build_mixer("scan_rnn(cell=mingru(activation=tanh))", 8)


@pytest.mark.parametrize(
    ("cell", "numbers"),
    [
        ("mingru", 24),
        ("minlstm", 24),
        ("lru", 2 * 16),
        ("s5", 2 * 8),
        ("hippo", 2 * 8),
        ("gateloop", 2 * 24),
        ("ffm", 2 * 16 * 4),
        ("leaky", 24),
    ],
)
def test_states_are_the_formulas(cell, numbers):
    """D = 16, F = 24: numbers of a row's state, however long the text."""
    _, state = build_mixer(f"scan_rnn(cell={cell}, units=24)", 16)(torch.randn(3, 50, 16))
    assert state["h"].numel() == 3 * numbers

"""Each rule of linear_memory against the paper's sums written out, its limits, and what it refuses."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cl.backbones._spec import build_mixer, build_rule, plugin, plugin_names
from cl.backbones.memory_rules._rule import Row
from cl.backbones.mixers.ridge_memory import RidgeMemory
from cl.core import UserError
from kernels.gated_linear_attention import gated_linear_attention
from kernels.ridge_memory import ridge_memory

B, T, H, K, V, WIDTH = 2, 9, 2, 4, 3, 8
NAMES = plugin_names("memory_rules")


def rule(words):
    torch.manual_seed(0)
    made = build_rule(words, WIDTH, H, K, V).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    return made


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return draw(B, T, WIDTH), draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)


def empty(made):
    return made.init_state(torch.zeros(B, H, K, V, dtype=torch.float64))


def full(made, seed=3):
    """A memory that holds something."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator, dtype=torch.float64) for name, value in empty(made).items()
    }


def summed(q, k, v, factor):
    """o_t = sum_{s <= t} (sum_c q_tc factor(t, s)_c k_sc) v_s, one pair of tokens at a time."""
    o = torch.zeros(B, T, H, v.shape[-1], dtype=v.dtype)
    for t in range(T):
        for s in range(t + 1):
            o[:, t] += (q[:, t] * factor(t, s) * k[:, s]).sum(-1, keepdim=True) * v[:, s]
    return o


def test_linear_attention_is_its_sum():
    made, (x, q, k, v) = rule("linear"), drawn()
    q, k = made.prepare(q, k, 0)
    o, _ = made.chunk(empty(made), q, k, v, made.gates(x))
    is_seen = torch.ones(T, T).tril().bool().unsqueeze(1)
    weight = torch.einsum("bthk,bshk->bths", q, k).masked_fill(~is_seen, 0)
    torch.testing.assert_close(o, torch.einsum("bths,bshv->bthv", weight / weight.sum(-1, keepdim=True), v))


def test_retention_is_its_sum():
    """gamma^(t - s) of 1 - 2^-5 and 1 - 2^-6, and rotations that see t - s only."""
    made, (x, q, k, v) = rule("retnet"), drawn()
    turned_q, turned_k = made.prepare(q, k, 3)
    o, _ = made.chunk(empty(made), turned_q, turned_k, v, made.gates(x))
    decay = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).view(H, 1)
    rate = 10_000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    as_complex = [torch.complex(*each.chunk(2, -1)) for each in (q, k)]
    expected = torch.zeros_like(o)
    for t in range(T):
        for s in range(t + 1):
            pairs = as_complex[0][:, t] * as_complex[1][:, s].conj() * torch.exp(1j * (t - s) * rate)
            expected[:, t] += decay ** (t - s) * pairs.real.sum(-1, keepdim=True) * v[:, s] / K**0.5
    torch.testing.assert_close(o, expected, atol=1e-6, rtol=1e-6)  # the decay is kept in float32


def test_gla_is_its_sum():
    made, (x, q, k, v) = rule("gla"), drawn()
    alpha = torch.sigmoid(made.retention(x)).pow(1 / 16).view(B, T, H, K)
    o, _ = made.chunk(empty(made), q, k, v, made.gates(x))
    torch.testing.assert_close(o, summed(q, k, v, lambda t, s: alpha[:, s + 1 : t + 1].prod(1)) / K**0.5)


def test_mamba2_is_its_sum():
    made, (x, q, k, v) = rule("mamba2"), drawn()
    delta = F.softplus(made.retention.project(x) + made.retention.bias).unsqueeze(-1)
    alpha = torch.exp(-delta * made.retention.log_rate.exp().view(H, 1))
    o, _ = made.chunk(empty(made), q, k, v, made.gates(x))
    expected = summed(q, k, delta * v, lambda t, s: alpha[:, s + 1 : t + 1].prod(1)) + made.skip.view(H, 1) * v
    torch.testing.assert_close(o, expected)


def test_mlstm_without_its_stabiliser():
    """C, n and the gates as they are: what the running maximum must not change."""
    made, (x, q, k, v) = rule("mlstm"), drawn()
    i, f = made.write(x).exp().unsqueeze(-1), made.keep(x).sigmoid().unsqueeze(-1)
    o, _ = made.chunk(empty(made), q, k, v, made.gates(x))
    factor = lambda t, s: f[:, s + 1 : t + 1].prod(1) * i[:, s]  # noqa: E731
    top = summed(q, k, v, factor) / K**0.5
    weight = summed(q, k, torch.ones(B, T, H, 1, dtype=torch.float64), factor) / K**0.5
    torch.testing.assert_close(o, top / weight.abs().clamp(min=1))


def test_gateloop_is_its_sum_of_complex_products():
    made, (x, q, k, v) = rule("gateloop"), drawn()
    a = torch.polar(torch.sigmoid(made.retention(x) + made.bias), made.phase(x)).view(B, T, H, K)
    o, _ = made.chunk(empty(made), q, k, v, made.gates(x))
    torch.testing.assert_close(o, summed(q, k, v, lambda t, s: a[:, s + 1 : t + 1].prod(1).real) / K**0.5)


def test_gateloop_turns_as_precisely_late_as_early():
    """In float32 the sum of the angles of a long text has lost the digits that tell where it points."""
    made = rule("gateloop").float()
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 3000, 1, K).unbind(0)
    v = torch.randn(1, 3000, 1, V)
    gates = {"log_decay": torch.full((1, 3000, 1, K), -0.1), "phase": torch.full((1, 3000, 1, K), 3.1)}
    start = {"matrix": torch.zeros(1, 1, 2 * K, V)}
    found = [made.chunk(start, q, k, v, gates)[0]]
    wide = [{name: x.double() for name, x in each.items()} for each in (start, gates)]
    found.append(made.double().chunk(wide[0], q.double(), k.double(), v.double(), wide[1])[0])
    error = (found[0] - found[1]).abs()
    assert error[:, -100:].max() < 10 * error[:, :100].max()


def test_longhorn_forgets_all_for_a_key_without_bound():
    made = rule("longhorn").float()
    q, k, v = torch.randn(3, 1, 5, H, K, generator=torch.Generator().manual_seed(0)).unbind(0)
    k = torch.cat((1e5 * k[..., :1], k[..., 1:]), -1).requires_grad_()
    gates = {"strength": torch.full((1, 5, H), 0.5)}
    state = {"matrix": torch.ones(1, H, K, V)}
    o, end = made.chunk(state, q, k, v[..., :V], gates)
    assert end["matrix"].isfinite().all()
    (gradient,) = torch.autograd.grad(o.sum(), k)
    assert gradient.isfinite().all()


def test_a_query_that_no_key_answers_to_reads_nothing():
    """Features of large negative numbers are exactly zero: 0 / 0 of linear attention."""
    made = rule("linear").float()
    q = torch.full((1, 2, 1, K), -200.0, requires_grad=True)
    k, v = torch.ones(1, 2, 1, K), torch.ones(1, 2, 1, V)
    features = made.prepare(q, k, 0)
    state = made.init_state(torch.zeros(1, 1, K, V))
    o, _ = made.chunk(state, *features, v, {})
    one, _ = made.step(state, features[0][:, 0], features[1][:, 0], v[:, 0], {})
    assert not o.any()
    assert not one.any()
    (gradient,) = torch.autograd.grad(o.sum() + one.sum(), q)
    assert gradient.isfinite().all()


def test_longhorn_is_the_implicit_step():
    """S minimises |S - S_old|^2 + beta |k S - v|^2: a linear system, solved as such."""
    made, (x, q, k, v) = rule("longhorn(diagonal=false)"), drawn()
    beta, s = torch.sigmoid(made.strength(x)), full(made)["matrix"]
    o, end = made.chunk({"matrix": s}, q, k, v, made.gates(x))
    expected = []
    for t in range(T):
        kk = k[:, t, :, :, None] * k[:, t, :, None]
        strength = beta[:, t, :, None, None]
        s = torch.linalg.solve(torch.eye(K) + strength * kk, s + strength * k[:, t, :, :, None] * v[:, t, :, None])
        expected.append((q[:, t, :, None] @ s)[..., 0, :] + made.skip * v[:, t])
    torch.testing.assert_close(o, torch.stack(expected, 1))
    torch.testing.assert_close(end["matrix"], s)


def test_longhorn_as_published():
    """The official recurrence: A = 1 - delta k^2 per channel, B = delta k."""
    made, (x, q, k, v) = rule("longhorn"), drawn()
    beta, s = torch.sigmoid(made.strength(x)), full(made)["matrix"]
    o, _ = made.chunk({"matrix": s}, q, k, v, made.gates(x))
    for t in range(T):
        delta = beta[:, t] / (1 + beta[:, t] * k[:, t].square().sum(-1))
        s = s * (1 - delta[..., None] * k[:, t].square())[..., None]
        s = s + torch.einsum("bh,bhk,bhv->bhkv", delta, k[:, t], v[:, t])
        torch.testing.assert_close(o[:, t], torch.einsum("bhk,bhkv->bhv", q[:, t], s) + made.skip * v[:, t])


@pytest.mark.parametrize("words", ["delta", "gated_delta", "kda"])
def test_delta_rules_are_matrices_that_multiply(words):
    """S_t = (I - beta k k^T) diag(alpha) S_{t-1} + beta k v^T, as products of whole matrices."""
    made, (x, q, k, v) = rule(words), drawn()
    q, k = made.prepare(q, k, 0)
    assert (k.square().sum(-1) - 1).abs().max() < 1e-4
    gates, s = made.gates(x), full(made)["matrix"]
    o, end = made.chunk({"matrix": s}, q, k, v, gates)
    alpha = gates.get("log_decay", torch.zeros(B, T, H, dtype=torch.float64)).exp()
    alpha = alpha if alpha.dim() == 4 else alpha.unsqueeze(-1).expand(B, T, H, K)
    for t in range(T):
        beta = gates["strength"][:, t, :, None, None]
        kept = torch.eye(K) - beta * k[:, t, :, :, None] * k[:, t, :, None]
        s = kept @ torch.diag_embed(alpha[:, t]) @ s + beta * k[:, t, :, :, None] * v[:, t, :, None]
        torch.testing.assert_close(o[:, t], (q[:, t, :, None] @ s)[..., 0, :])
    torch.testing.assert_close(end["matrix"], s)


# limits of the gates


NOTHING = {
    "linear": {},
    "gla": {"log_decay": (H, K)},
    "mamba2": {"log_decay": (H,), "step": (H, 1)},
    "mlstm": {"keep": (H,), "write": (H,)},
    "delta": {"strength": (H,)},
    "gated_delta": {"strength": (H,), "log_decay": (H,)},
    "kda": {"strength": (H,), "log_decay": (H, K)},
    "gateloop": {"log_decay": (H, K), "phase": (H, K)},
    "longhorn": {"strength": (H,)},
}


def test_every_rule_has_limits():
    assert set(NOTHING) | {"retnet"} == set(NAMES), "retnet forgets at a fixed rate"


@pytest.mark.parametrize("words", sorted(NOTHING))
def test_alpha_one_and_beta_zero_leave_the_memory(words):
    """Nothing forgotten, nothing written: in both forms. Rules without a write gate are given keys of zero."""
    made, (_, q, k, v) = rule(words), drawn()
    gates = {name: torch.zeros(B, T, *shape, dtype=torch.float64) for name, shape in NOTHING[words].items()}
    if words == "mlstm":
        gates = {"keep": gates["keep"] + 50.0, "write": gates["write"] - 80.0}
    if words in ("linear", "gla", "gateloop"):
        k = torch.zeros_like(k)
    before = full(made)
    _, after = made.chunk(before, q, k, v, gates)
    stepped = before
    for t in range(T):
        _, stepped = made.step(stepped, q[:, t], k[:, t], v[:, t], {name: gate[:, t] for name, gate in gates.items()})
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
        torch.testing.assert_close(stepped[name], value)


@pytest.mark.parametrize("words", ["delta", "gated_delta", "kda", "longhorn(diagonal=false)"])
def test_beta_one_and_a_unit_key_store_the_value(words):
    """What is read with the key just written is the value, whatever was there before."""
    made, (_, _, k, v) = rule(words), drawn()
    k = F.normalize(k, dim=-1)
    name = words.partition("(")[0]
    gates = {each: torch.zeros(B, T, *shape, dtype=torch.float64) for each, shape in NOTHING[name].items()}
    # delta = beta / (1 + beta) is 1 in the limit of a large beta
    gates["strength"] += 1e14 if name == "longhorn" else 1.0
    o, _ = made.chunk(full(made), k, k, v, gates)
    torch.testing.assert_close(o - (made.skip * v if name == "longhorn" else 0), v)


def test_rules_are_limits_of_each_other():
    _, q, k, v = drawn()
    k, q = F.normalize(k, dim=-1), F.normalize(q, dim=-1)
    start = full(rule("delta"))
    zeros = torch.zeros(B, T, H, dtype=torch.float64)
    beta = torch.rand(B, T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    decay = -torch.rand(B, T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    delta, _ = rule("delta").chunk(start, q, k, v, {"strength": beta})
    gated = partial(rule("gated_delta").chunk, start, q, k, v)
    torch.testing.assert_close(gated({"strength": beta, "log_decay": zeros})[0], delta)
    wide = decay.unsqueeze(-1).expand(B, T, H, K)
    kda, _ = rule("kda").chunk(start, q, k, v, {"strength": beta, "log_decay": wide})
    torch.testing.assert_close(kda, gated({"strength": beta, "log_decay": decay})[0])
    gla, _ = rule("gla").chunk(start, q, k, v, {"log_decay": wide})
    loop = {"matrix": torch.cat((start["matrix"], torch.zeros_like(start["matrix"])), -2)}
    still, _ = rule("gateloop").chunk(loop, q, k, v, {"log_decay": wide, "phase": torch.zeros_like(wide)})
    torch.testing.assert_close(still, gla)
    ssd = rule("mamba2")
    one, _ = ssd.chunk(start, q, k, v, {"log_decay": decay, "step": torch.ones(B, T, H, 1, dtype=torch.float64)})
    torch.testing.assert_close(one - ssd.skip.unsqueeze(-1) * v, gla * K**0.5)
    plain, _ = rule("linear(normaliser=false)").chunk(start, q, k, v, {})
    open_gla, _ = rule("gla").chunk(start, q, k, v, {"log_decay": torch.zeros_like(wide)})
    torch.testing.assert_close(open_gla * K**0.5, plain)


def test_ridge_with_much_regularisation_is_linear_attention():
    """(H + lambda I)^-1 -> I / lambda, so that o lambda -> q U."""
    _, q, k, v = drawn()
    k = F.normalize(k, dim=-1)
    ratio = 1e7
    o, _ = ridge_memory(q, k, v, ratio=ratio)
    gram = torch.einsum("bthk,bthl->bthkl", k, k).cumsum(1)
    strength = ratio * torch.linalg.matrix_norm(gram).unsqueeze(-1)
    linear, _ = gated_linear_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(o * strength, linear, rtol=1e-6, atol=1e-6)


def test_ridge_layer_is_the_regression_written_out(plain):
    """The whole layer at every token: weights, decay, normal equations, mixture, norm, gate, projection."""
    torch.manual_seed(0)
    layer = RidgeMemory(WIDTH, num_heads=H, ratio=0.3, steps=60).double()
    x = drawn()[0]
    (y, state), weights = layer(x), dict(layer.named_parameters())
    expected, gram, cross = plain.ridge_memory(weights, x, num_heads=H, ratio=0.3)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state["gram"], gram[:, -1])
    torch.testing.assert_close(state["cross"], cross[:, -1])


def test_more_chebyshev_steps_are_more_exact():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32, dtype=torch.float64)
    errors = []
    for steps in (5, 10, 20, 30):
        torch.manual_seed(1)
        layer = RidgeMemory(32, num_heads=1, steps=steps).double()
        with torch.no_grad():
            exact, _ = layer(x, mode="recurrent")
            errors.append(((layer(x)[0] - exact).norm() / exact.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "linear_memory(rule=hebb)",
            "rule of linear_memory names 'hebb'; it must be one of delta, gated_delta, gateloop",
        ),
        ("linear_memory(rule=delta(positive=true))", "gives delta the option 'positive'"),
        ("linear_memory(conv=-1)", "conv of linear_memory is -1"),
        ("linear_memory(key_width=0)", "backbone.key_width is 0"),
        ("linear_memory(num_heads=5)", "backbone.width is 16 for backbone.num_heads=5"),
        ("linear_memory(rule=retnet, key_width=3)", "key width of retnet is 3"),
        ("ridge_memory(ratio=0)", "ratio of ridge_memory is 0"),
        ("ridge_memory(steps=0)", "steps of ridge_memory is 0"),
        ("ridge_memory(ratio=inf)", "ratio of ridge_memory is inf; it must be a finite number"),
        ("linear_memory(chunk=3)", "chunk of linear_memory is 3; it must be a power of two, or none"),
        ("linear_memory(gate=no)", "gate of linear_memory is 'no'; it must be true or false"),
        (
            "linear_memory(rule=delta(num_heads=1))",
            "rule of linear_memory gives delta the option 'num_heads'; its options are negative",
        ),
        ("linear_memory(rule=gla(rank=0))", "backbone.rank is 0"),
        ("linear_memory(rule=retnet(rope_base=0))", "backbone.rope_base is 0; it must be a number above 1, or none"),
    ],
)
def test_bad_values_are_one_sentence(words, message):
    with pytest.raises(UserError) as error:
        build_mixer(words, 16, num_heads=2)
    assert message in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_rules_say_what_they_are(name):
    row = plugin("memory_rules", name, "").row
    assert isinstance(row, Row)
    assert all(vars(row).values())

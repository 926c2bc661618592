"""Other people's kernels as the bench calls them: stand-ins compute the equations that their documentation gives."""

import os
import sys
import types

import pytest
import torch

from kernels.bench.shapes import PROBLEMS
from kernels.delta_rule import delta_rule


def fake_module(monkeypatch, name, **members):
    """A module `name` and its parents, with plain token loops in the place of the peer's kernels."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def mamba_loop(x, dt, A, B, C, chunk_size):
    """Mamba-2 as its paper has it: h = exp(dt A) h + dt B x, y = C h."""
    state, outs = torch.zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3], dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None]
        outs.append((C[:, t][..., None, :] @ state)[..., 0, :])
    return torch.stack(outs, 1)


def scan_loop(gates, tokens):
    """accelerated-scan: [B, C, T] contiguous, T a power of two."""
    assert gates.is_contiguous()
    assert gates.shape[2] & (gates.shape[2] - 1) == 0
    state, outs = torch.zeros_like(tokens[:, :, 0]), []
    for t in range(tokens.shape[2]):
        state = gates[:, :, t] * state + tokens[:, :, t]
        outs.append(state)
    return torch.stack(outs, 2)


def fla_loop(q, k, v, g, beta, scale, output_final_state):
    """fla's chunk_gated_delta_rule by its documentation: [B, T, H, D], log decay, no normalisation by default."""
    return delta_rule(q, k, v, beta, g, scale=scale, backend="reference")


@pytest.mark.parametrize(
    ("peer", "problem", "module", "member", "stand_in"),
    [
        ("mamba-ssm", "gla_scalar", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", mamba_loop),
        ("accelerated-scan", "linear_scan", "accelerated_scan.warp", "scan", scan_loop),
        ("fla", "gated_deltanet", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", fla_loop),
        ("fla-plain", "gated_deltanet", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", fla_loop),
    ],
)
def test_peers_are_given_what_they_mean(peer, problem, module, member, stand_in, monkeypatch):
    """The stand-ins compute the peers' documented equations; the check must accept them, and refuse another one."""
    from kernels.bench.peers import peer_error, peers_of, timed
    from kernels.bench.shapes import PROBLEMS

    torch.manual_seed(0)
    inputs = PROBLEMS[problem].draw((2, 256, 2, 16), torch.float32, torch.device("cpu"))
    fake_module(monkeypatch, module, **{member: stand_in})
    found = peers_of(problem, [peer])[peer]
    assert peer_error(found, PROBLEMS[problem], inputs) < 1e-5
    run, given = timed(found, inputs)
    assert torch.isfinite(run(**given)[0]).all()
    fake_module(monkeypatch, module, **{member: lambda *args, **how: scaled(stand_in(*args, **how))})
    assert peer_error(peers_of(problem, [peer])[peer], PROBLEMS[problem], inputs) > 0.1


def scaled(out):
    return tuple(1.2 * x for x in out) if isinstance(out, tuple) else 1.2 * out


def test_fla_plain_switches_the_other_back_ends_off(monkeypatch):
    from kernels.bench.peers import peers_of

    class BaseBackend:
        @classmethod
        def can_use(cls):
            return True

    seen = []
    fake_module(monkeypatch, "fla.ops.kda", chunk_kda=lambda **how: (seen.append(BaseBackend.can_use()), None))
    backends = types.ModuleType("fla.ops.backends")
    backends.BaseBackend = BaseBackend
    monkeypatch.setitem(sys.modules, "fla.ops.backends", backends)
    for name, allowed in (("fla", True), ("fla-plain", False)):
        peers_of("kda", [name])[name].call(k=torch.ones(1, 1, 1, 4))
        assert seen.pop() is allowed
    assert BaseBackend.can_use()
    assert "FLA_DISABLE_BACKEND_DISPATCH" not in os.environ


@pytest.mark.parametrize("problem", ["newton_gru", "newton_lstm"])
def test_torch_rnn_of_equal_width_is_its_own_truth(problem):
    from kernels.bench.peers import peer_error, peers_of, timed

    inputs = {"x": torch.randn(2, 40, 3, 2, 8)}
    peer = peers_of(problem, ["torch-rnn"])["torch-rnn"]
    assert peer_error(peer, None, inputs) < 1e-5
    run, given = timed(peer, inputs)
    assert run(**given)[0].shape == (2, 40, 16)
    assert {"weight_hh_l0", "weight_ih_l0"} <= set(given)


def test_an_absent_peer_is_no_error():
    from kernels.bench.peers import peers_of

    assert peers_of("gla_scalar", ["torch-rnn"]) == {}


def test_a_peer_is_given_as_many_sets_of_inputs(monkeypatch):
    """Its own, and drawn ones; the weights of a module are one and the same."""
    from kernels.bench import rows
    from kernels.bench.peers import peers_of

    seen = []
    monkeypatch.setattr(rows, "passes", lambda run, sets, *how: seen.append(sets))
    monkeypatch.setattr(rows, "median_s", lambda *given: 1.0)
    peer = peers_of("newton_gru", ["torch-rnn"])["torch-rnn"]
    inputs = {"x": torch.randn(2, 40, 3, 2, 8)}
    how = (torch.float32, torch.device("cpu"), 1, 3, True, 500.0)
    assert rows._peer_row("torch-rnn", peer, PROBLEMS["newton_gru"], inputs, *how)["x peer"] == 2
    (sets,) = seen
    assert len({each["input"].data_ptr() for each in sets}) == 3
    assert len({each["weight_hh_l0"].data_ptr() for each in sets}) == 1

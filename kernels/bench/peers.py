"""Other people's kernels for the same recurrence, when they are installed; absence is a dash in the table.

A peer gets our inputs in the layout, names and scaling it wants. That preparation is paid outside the timing, but lies
inside the check: output and gradients go back through it to our inputs and are compared with our float64 reference.
"""

# mypy: disable-error-code="no-untyped-call"
# torch leaves Tensor.backward without types

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.bench.measure import error
from kernels.bench.problem import Inputs, Problem

# a power of two, which accelerated-scan needs
CHECKED = 128
# a peer may round more than we do, but not compute something else
SLACK = 5.0


@dataclass(frozen=True)
class Peer:
    """Somebody's op for one of our problems: `call(**prepare(inputs))` is its output, `finish` brings it to our layout.

    own: it does not compute our recurrence (nn.GRU of equal width); it draws its inputs and is its own float64 truth.
    """

    name: str
    call: Callable[..., Tensor]
    prepare: Callable[[Inputs], Inputs] = dict
    finish: Callable[[Tensor], Tensor] = lambda out: out
    own: Callable[[Inputs], tuple[torch.nn.Module, Inputs]] | None = None


def _function(module: str, name: str) -> Callable[..., Any] | None:
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    except Exception:  # a peer broken by its own imports is an absent peer
        return None
    return found


# ours -> where theirs is; layout [B, T, H, D], log decays and the scale K ** -0.5 are as ours
_FLA = {
    "gla_scalar": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "gla_channel": ("fla.ops.gla", "chunk_gla"),
    "deltanet": ("fla.ops.delta_rule", "chunk_delta_rule"),
    "gated_deltanet": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "gdn_normalized": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("fla.ops.kda", "chunk_kda"),
}


def _fla(problem: str) -> Peer | None:
    function = _function(*_FLA[problem]) if problem in _FLA else None
    if function is None:
        return None

    def call(**inputs: Tensor) -> Tensor:
        # said explicitly: the defaults differ between its ops and versions; its normalisation is as ours, 1e-6 included
        how: dict[str, Any] = {"scale": inputs["k"].shape[-1] ** -0.5, "output_final_state": True}
        if problem == "gdn_normalized":
            how["use_qk_l2norm_in_kernel"] = True
        out: Tensor = function(**inputs, **how)[0]
        return out

    return Peer("fla", call)


@contextmanager
def _no_extra_backends() -> Iterator[None]:
    """fla without its optional back-ends (TileLang and others): by its variable, and where it has none by its base."""
    before = os.environ.get("FLA_DISABLE_BACKEND_DISPATCH")
    base = _function("fla.ops.backends", "BaseBackend")
    can_use = None if base is None else base.__dict__.get("can_use")
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
    if base is not None and can_use is not None:
        base.can_use = classmethod(lambda cls: False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLA_DISABLE_BACKEND_DISPATCH"]
        else:
            os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = before
        if base is not None and can_use is not None:
            base.can_use = can_use  # type: ignore[attr-defined]


def _fla_plain(problem: str) -> Peer | None:
    inner = _fla(problem)
    if inner is None:
        return None

    def call(**inputs: Tensor) -> Tensor:
        with _no_extra_backends():
            return inner.call(**inputs)

    return Peer("fla-plain", call)


def _accelerated_scan(problem: str) -> Peer | None:
    scan = _function("accelerated_scan.warp", "scan") if problem == "linear_scan" else None
    if scan is None:
        return None

    def channels_first(inputs: Inputs) -> Inputs:
        names = {"a": "gates", "u": "tokens"}
        return {names[name]: x.transpose(1, 2).contiguous() for name, x in inputs.items()}

    return Peer("accelerated-scan", scan, channels_first, lambda out: out.transpose(1, 2))


def _mamba(problem: str) -> Peer | None:
    """Mamba-2's h = exp(dt A) h + dt B x, y = C h with A = -1 and dt = -g is ours with v = dt x."""
    scan = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    if problem != "gla_scalar" or scan is None:
        return None

    def prepare(inputs: Inputs) -> Inputs:
        dt = -inputs["g"]
        scaled = inputs["q"] * inputs["q"].shape[-1] ** -0.5
        x = (inputs["v"] / dt[..., None]).to(inputs["v"].dtype)
        return {"x": x, "dt": dt, "B": inputs["k"], "C": scaled}

    def call(**inputs: Tensor) -> Tensor:
        a = -torch.ones(inputs["x"].shape[2], device=inputs["x"].device)
        out: Tensor = scan(**inputs, A=a, chunk_size=256)
        return out

    return Peer("mamba-ssm", call, prepare)


_CELLS = {"newton_gru": torch.nn.GRU, "newton_lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}


def _torch_rnn(problem: str) -> Peer | None:
    """nn.GRU or nn.LSTM (cuDNN on a card) of the same width: a full recurrent matrix, so not the same function."""
    cell = next((c for name, c in _CELLS.items() if problem == name or problem.endswith(f"_{name}")), None)
    if cell is None:
        return None

    def own(inputs: Inputs) -> tuple[torch.nn.Module, Inputs]:
        x = inputs["x"]
        width = x[0, 0, 0].numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = cell(width, width, batch_first=True).to(x.device, x.dtype)
            given = torch.randn(x.shape[0], x.shape[1], width).to(x.device, x.dtype)
        return module, {"input": given}

    return Peer("torch-rnn", lambda module, **given: module(**given)[0], own=own)


PEERS: dict[str, Callable[[str], Peer | None]] = {
    "fla": _fla,
    "fla-plain": _fla_plain,
    "accelerated-scan": _accelerated_scan,
    "mamba-ssm": _mamba,
    "torch-rnn": _torch_rnn,
}


def peers_of(problem: str, wanted: list[str]) -> dict[str, Peer]:
    """The installed peers of a problem."""
    found = {name: PEERS[name](problem) for name in wanted if name in PEERS}
    return {name: peer for name, peer in found.items() if peer is not None}


def timed(peer: Peer, inputs: Inputs) -> tuple[Callable[..., tuple[Tensor]], Inputs]:
    """What is timed: the call alone, and its inputs already in the peer's layout."""
    if peer.own is not None:
        module, given = peer.own(inputs)
        weights = dict(module.named_parameters())

        def run(input: Tensor, **_: Tensor) -> tuple[Tensor]:
            return (peer.call(module, input=input),)

        # the weights stand among the inputs so that their gradients are asked for as well
        return run, {**given, **{name.replace(".", "_"): w for name, w in weights.items()}}
    prepared = {name: x.detach().clone() for name, x in peer.prepare(inputs).items()}
    return lambda **given: (peer.call(**given),), prepared


def peer_error(peer: Peer, problem: Problem, inputs: Inputs) -> float:
    """Largest relative error of a peer's output and gradients, on a slice, against float64 (ours, or its own)."""
    if peer.own is not None:
        module, given = peer.own({"x": inputs["x"][:2, :CHECKED]})
        wide = type(module)(module.input_size, module.hidden_size, batch_first=True).double()
        wide.load_state_dict({name: w.double().cpu() for name, w in module.state_dict().items()})
        x, truth_x = given["input"].requires_grad_(), given["input"].detach().double().cpu().requires_grad_()
        out, truth = peer.call(module, input=x), wide(truth_x)[0]
        weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (dx,) = torch.autograd.grad(out, x, weight.to(out))
        (truth_dx,) = torch.autograd.grad(truth, truth_x, weight)
        return max(error(out.detach(), truth.detach()), error(dx, truth_dx))
    last = 64 if problem.name == "linear_scan" else 2
    leaves = {n: x[:1, :CHECKED, :last].detach().clone().requires_grad_() for n, x in inputs.items()}
    truths = {n: x.detach().double().cpu().requires_grad_() for n, x in leaves.items()}
    out = peer.finish(peer.call(**peer.prepare(leaves)))
    truth = problem.op(**truths, backend="reference")[0]
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), weight.to(out))
    truth_grads = torch.autograd.grad(truth, list(truths.values()), weight)
    pairs = zip([out, *grads], [truth, *truth_grads], strict=True)
    return max(error(x.detach(), y.detach()) for x, y in pairs)

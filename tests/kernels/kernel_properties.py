"""One table of ops and the properties each must have; the test files only choose sizes.

Every comparison is a relative Frobenius error without an absolute escape: where the truth is zero, so must we be.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention, retention_decay
from kernels.linear_scan import linear_scan

Inputs = dict[str, Tensor]
TOLERANCE = {
    ("chunked", torch.float64): 1e-10,
    ("chunked", torch.float32): 1e-5,
    ("numba", torch.float64): 1e-10,
    ("numba", torch.float32): 1e-5,
    ("triton", torch.float32): 1e-5,
    ("triton", torch.float16): 2e-3,
    ("triton", torch.bfloat16): 1e-2,
}
# cosine between keys, and how slowly the state decays: the fourth breaks an inverse by squaring
DISTRIBUTIONS = {"random": (0.0, 2.0), "cos 0.5": (0.5, 2.0), "cos 0.5 slow": (0.5, 6.0), "cos 0.9 slow": (0.9, 6.0)}


DECAYS, KEYS = ("no decay", "wiped", "some wiped"), ("zero key", "repeated key")
EDGES = (*DECAYS, *KEYS, "large value", "beta")


@dataclass(frozen=True)
class OpCase:
    """An op, how to draw its inputs, and what sets it apart from the others.

    draw: (generator, batch, length, sequences, distribution) -> inputs in float64, initial state.
    timeless: inputs that are the same for all tokens; the others have time as dimension 1.
    lengths: tokens of a short and of an everyday test (a token loop of matrices is slow).
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    draw: Callable[[torch.Generator, int, int, int, str], tuple[Inputs, Tensor]]
    timeless: tuple[str, ...] = ()
    length: int = 70
    chunk: int = 16
    # the chunk is a way to compute, not a part of the model
    free_chunk: bool = True
    has_reset: bool = False
    # autograd goes through the op, so that second derivatives exist
    is_traced: bool = False
    has_triton: bool = True
    # with every token or segment: the states of packed sequences are padded, with two numbers behind
    state_grows: bool = False
    edges: tuple[str, ...] = EDGES

    @property
    def is_scan(self) -> bool:
        return "scan" in self.name

    def is_tokens(self, name: str) -> bool:
        """Whether an input has a time axis."""
        return name not in (*self.timeless, "initial_state")

    @property
    def tiles(self) -> dict[str, int]:
        """The chunk as an option of a call in Triton; scans have none."""
        return {} if self.is_scan else {"chunk": 16}


def _keys(gen: torch.Generator, shape: tuple[int, ...], cosine: float) -> Tensor:
    """Unit vectors with the given cosine between any two, in expectation."""
    common = torch.randn(shape[0], 1, *shape[2:], generator=gen, dtype=torch.float64)
    own = torch.randn(shape, generator=gen, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    return unit(cosine**0.5 * unit(common, dim=-1) + (1 - cosine) ** 0.5 * unit(own, dim=-1), dim=-1)


def _draw_scan(is_complex: bool) -> Callable[..., tuple[Inputs, Tensor]]:
    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        dtype = torch.complex128 if is_complex else torch.float64
        _, slow = DISTRIBUTIONS[kind]
        shape = (batch, length, 2, 3)
        a = torch.sigmoid(torch.randn(shape, generator=gen, dtype=torch.float64) + slow).to(dtype)
        if is_complex:
            a = a * torch.exp(3j * torch.randn(shape, generator=gen, dtype=torch.float64))
        u = torch.randn(shape, generator=gen, dtype=dtype)
        return {"a": a, "u": u}, torch.randn(sequences, 2, 3, generator=gen, dtype=dtype)

    return draw


def _draw_matrix(gate: str, delta: bool) -> Callable[..., tuple[Inputs, Tensor]]:
    def draw(gen: torch.Generator, batch: int, length: int, sequences: int, kind: str) -> tuple[Inputs, Tensor]:
        cosine, slow = DISTRIBUTIONS[kind]
        heads, k_width, v_width = 2, 5, 7
        rand = {"generator": gen, "dtype": torch.float64}
        q = torch.randn(batch, length, heads, k_width, **rand)
        inputs = {"q": q, "k": _keys(gen, (batch, length, heads, k_width), cosine)}
        inputs["v"] = torch.randn(batch, length, heads, v_width, **rand)
        if delta:
            beta = torch.rand(batch, length, heads, **rand)
            inputs["beta"] = beta if slow < 4 else 0.9 + 0.1 * beta
        size = {"scalar": (batch, length, heads), "channel": q.shape}
        if gate in size:
            inputs["g"] = torch.nn.functional.logsigmoid(torch.randn(size[gate], **rand) + slow)
        elif gate == "retention":
            inputs["g"] = retention_decay(heads).double()
        return inputs, torch.randn(sequences, heads, k_width, v_width, **rand)

    return draw


def _draw_long(draw: Callable[..., tuple[Inputs, Tensor]]) -> Callable[..., tuple[Inputs, Tensor]]:
    """The same with q and k of any length, for the ops that normalise."""

    def stretched(gen: torch.Generator, *rest: Any) -> tuple[Inputs, Tensor]:
        inputs, state = draw(gen, *rest)
        for name in ("q", "k"):
            lengths = torch.rand(*inputs[name].shape[:3], 1, generator=gen, dtype=torch.float64)
            inputs[name] = inputs[name] * (0.5 + 3 * lengths)
        return inputs, state

    return stretched


CASES = {
    case.name: case
    for case in (
        OpCase("scan_real", linear_scan, _draw_scan(False), has_reset=True, edges=(*DECAYS, "large value")),
        OpCase("scan_complex", linear_scan, _draw_scan(True), has_reset=True, edges=(*DECAYS, "large value")),
        OpCase("linear_attention", gated_linear_attention, _draw_matrix("none", False)),
        OpCase("retention", gated_linear_attention, _draw_matrix("retention", False), timeless=("g",)),
        OpCase("gla_scalar", gated_linear_attention, _draw_matrix("scalar", False)),
        OpCase("gla_channel", gated_linear_attention, _draw_matrix("channel", False)),
        OpCase("deltanet", delta_rule, _draw_matrix("none", True)),
        OpCase("gated_deltanet", delta_rule, _draw_matrix("scalar", True)),
        OpCase("kda", delta_rule, _draw_matrix("channel", True)),
        OpCase("normalized", partial(delta_rule, normalize=True), _draw_long(_draw_matrix("scalar", True))),
        OpCase("normalized_kda", partial(delta_rule, normalize=True), _draw_long(_draw_matrix("channel", True))),
    )
}
OFFSETS = [0, 0, 1, 18, 35, 50, 50]


def draw(case: OpCase, length: int, kind: str = "random", cu: list[int] | None = None, seed: int = 0) -> Inputs:
    """Inputs in float64, the initial state among them."""
    gen = torch.Generator().manual_seed(seed)
    batch, sequences = (2, 2) if cu is None else (1, len(cu) - 1)
    inputs, state = case.draw(gen, batch, length, sequences, kind)
    return {**inputs, "initial_state": state}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Tokens in `dtype` (complex alike); gates, step sizes and states keep at least float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    complex_of = {torch.float64: torch.complex128}.get(dtype, torch.complex64)

    def one(name: str, x: Tensor) -> Tensor:
        if x.is_complex():
            return x.to(complex_of)
        return x.to(wide if name in ("g", "beta", "initial_state") else dtype)

    return {name: one(name, x) for name, x in inputs.items()}


def tensors_of(case: OpCase, inputs: Inputs, **options: Any) -> list[Tensor]:
    """Output, last state and the gradient of every input, for fixed random cotangents."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, final = case.op(**leaves, **options)
    gen = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x) for x in (out, final)]
    grads = torch.autograd.grad([out, final], list(leaves.values()), cotangents)
    return [out.detach(), final.detach(), *grads]


def error(found: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; infinite where the truth is zero and we are not, or anything is not finite."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    found, truth = found.detach(), truth.detach()
    difference = float((found.to(wide) - truth.to(wide)).norm())
    scale = float(truth.to(wide).norm())
    if scale == 0 or not difference < float("inf"):
        return 0.0 if difference == 0 else float("inf")
    return difference / scale


def truth_of(case: OpCase, inputs: Inputs, **options: Any) -> list[Tensor]:
    """The token loop in float64 on the same (rounded) numbers."""
    return tensors_of(case, cast(inputs, torch.float64), **options, backend="reference")


def assert_close(case: OpCase, inputs: Inputs, found: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Every output and gradient within the tolerance; names the worst."""
    names = ["output", "final_state", *(f"d{name}" for name in inputs)]
    errors = {name: error(x, y) for name, x, y in zip(names, found, truth, strict=True)}
    bad = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not bad, f"{case.name}: relative errors above {tolerance:g}: {bad}"


def assert_agrees(case: OpCase, inputs: Inputs, backend: str, dtype: torch.dtype, **options: Any) -> None:
    """The backend in this dtype against the float64 token loop, forward and every gradient."""
    given = cast(inputs, dtype)
    reference_options = {k: v for k, v in options.items() if k != "chunk"}
    truth = truth_of(case, given, **reference_options)
    found = tensors_of(case, given, **options, backend=backend)
    assert_close(case, given, found, truth, TOLERANCE[backend, dtype])


def cut(case: OpCase, given: dict[str, Any], where: slice) -> dict[str, Any]:
    """The inputs (and resets) of a stretch of time, without the initial state."""
    part = {n: x[:, where] if isinstance(x, Tensor) and case.is_tokens(n) else x for n, x in given.items()}
    part.pop("initial_state", None)
    return part


def carried(case: OpCase, at: int) -> OpCase:
    """The same op run as two calls with the state handed over."""

    def op(*, initial_state: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        out1, middle = case.op(**cut(case, given, slice(None, at)), initial_state=initial_state)
        out2, final = case.op(**cut(case, given, slice(at, None)), initial_state=middle)
        return torch.cat([out1, out2], dim=1), final

    return replace(case, name=f"{case.name} cut at {at}", op=op)


def in_halo(x: Tensor) -> Tensor:
    """The same contiguous values inside a buffer of NaN: a read outside shows up."""
    margin = 64
    buffer = torch.full((x.numel() + 2 * margin,), float("nan"), dtype=x.dtype)
    inner = buffer[margin : margin + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


def _some(like: Tensor, seed: int = 1) -> Tensor:
    """One in a tenth of the places."""
    return (torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)) < 0.1).double()


def edge_inputs(case: OpCase, edge: str) -> Inputs | None:
    """Inputs at the edge of what the op allows; None where the op has no such input."""
    inputs = draw(case, 50)
    gate, factor = inputs.get("g"), "a" if "a" in inputs else "f"
    if edge not in case.edges:
        return None
    if edge in DECAYS and factor in inputs:
        # no logarithm here: exactly one (of any phase), exactly nothing
        a = inputs[factor]
        inputs[factor] = {"no decay": a / a.abs(), "wiped": a * 0, "some wiped": a * (_some(a) == 0)}[edge]
    elif edge in DECAYS:
        if gate is None or gate.dim() == 1:
            return None
        inputs["g"] = {"no decay": gate * 0, "wiped": gate * 0 - 30, "some wiped": gate - 30.0 * _some(gate)}[edge]
    elif edge == "saturated":
        # gates shut, open, and candidates at their bounds
        inputs["x"] = inputs["x"] + 30 * _some(inputs["x"]) - 30 * _some(inputs["x"], 2)
    elif edge == "zero key":
        inputs["k"][:, 5:9] = 0
    elif edge == "repeated key":
        inputs["k"][:] = inputs["k"][:, :1]
    elif edge == "large value":
        inputs["v" if "v" in inputs else "u"] *= 1e4
    elif "beta" not in inputs:
        return None
    else:
        inputs["beta"][:, 0::3], inputs["beta"][:, 1::3], inputs["beta"][:, 2::3] = 0, 1, 2
    return inputs


def edges_of(cases: Iterable[OpCase]) -> list[tuple[OpCase, str]]:
    """Every case with every edge it has."""
    return [(case, edge) for case in cases for edge in case.edges if edge_inputs(case, edge) is not None]

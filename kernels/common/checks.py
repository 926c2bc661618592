"""Argument checks shared by the ops: one clear sentence each, the value and what would be allowed."""

import os
from itertools import pairwise
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Gate = TypeVar("Gate", Tensor, Tensor | None)


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], legend: str) -> None:
    """Raise unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {legend} = {list(shape)}, got {list(tensor.shape)}")


def require_alike(op: str, tensors: dict[str, Tensor | None], *, or_complex: bool = False) -> None:
    """Raise unless all that is given are tensors on one device, real and floating point (`or_complex`: or complex)."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, t in given:
        if not isinstance(t, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device} but {first_name} is on {first.device}")
        if not (t.is_floating_point() or t.is_complex()):
            raise ValueError(f"{op}: {name} must be floating point, got {t.dtype}")
        if t.is_complex() and not or_complex:
            raise ValueError(f"{op}: complex inputs are for linear_scan, got {name} {t.dtype}")


def require_reset(op: str, reset: Tensor | None, like: Tensor) -> None:
    """Raise unless `reset` holds one flag per token of `like` [B, T, ...], on its device."""
    if reset is None:
        return
    require_shape(op, "reset", reset, tuple(like.shape[:2]), "[B, T]")
    if reset.dtype != torch.bool:
        raise ValueError(f"{op}: reset must be bool, got {reset.dtype}")
    if reset.device != like.device:
        raise ValueError(f"{op}: reset is on {reset.device} but the inputs are on {like.device}")


def require_numbers(op: str, *, above_zero: bool = False, **numbers: float | None) -> None:
    """Raise unless each is None or a number: of a tensor, what it learns would be lost without a word."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{op}: {name} must be a number, got a tensor, which has no gradient here")
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{op}: {name} must be a number, got {value!r}")
        if above_zero and value is not None and not value > 0:
            raise ValueError(f"{op}: {name} must be above 0, got {value}")


def require_cu_seqlens(op: str, cu_seqlens: Tensor | None, like: Tensor) -> None:
    """Raise unless `cu_seqlens` holds offsets 0 .. T of sequences in the one row of `like` [1, T, ...], on its device.

    Empty sequences are allowed.

    On a card the values are read only where KERNELS_CHECK=1 asks for it: reading waits for the device at every call.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{op}: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be 1-D int32 or int64 of at least two offsets, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != like.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device} but the inputs are on {like.device}")
    batch, length = like.shape[:2]
    if batch != 1:
        raise ValueError(f"{op}: cu_seqlens packs all sequences into one row, so the batch must be 1, got {batch}")
    # a compiler traces with tensors that hold no values
    if torch.compiler.is_compiling() or isinstance(cu_seqlens, FakeTensor):
        return
    if cu_seqlens.device.type != "cpu" and os.environ.get("KERNELS_CHECK") != "1":
        return
    given: list[int] = cu_seqlens.tolist()
    if given[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {given[0]}")
    if given[-1] != length:
        raise ValueError(f"{op}: cu_seqlens must end at T = {length}, got {given[-1]}")
    for i, (begin, end) in enumerate(pairwise(given)):
        if end < begin:
            raise ValueError(f"{op}: cu_seqlens must never decrease, got {begin} then {end} at sequence {i}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and of all inner arithmetic: float32, except float64 for float64 inputs (and complex alike)."""
    if dtype in (torch.float64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def gate_like(gate: Gate, like: Tensor) -> Gate:
    """A gate whose arithmetic would be wider or narrower than that of `like`, brought to it."""
    dtype = state_dtype(like.dtype)
    return gate if gate is None or state_dtype(gate.dtype) == dtype else gate.to(dtype)


def cotangents(*given: tuple[Tensor | None, Tensor]) -> list[Tensor]:
    """Gradients of outputs, zeros where autograd has none; each with a tensor like the output."""
    return [torch.zeros_like(like) if gradient is None else gradient for gradient, like in given]


def last_like(states: Tensor, batch: int, cu_seqlens: Tensor | None) -> Tensor:
    """Like the last states [S, ...] that belong to the kept ones [chunks, ...], without memory of its own."""
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return states.new_empty(()).expand(sequences, *states.shape[1:])


def matrix_state_plan(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None = None,
) -> str | None:
    """Check the arguments of an op with state [B, H, K, V]; returns why Triton cannot take them, None if it can."""
    require_alike(op, {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": initial_state})
    if q.dim() != 4 or min(q.shape) < 1:
        raise ValueError(f"{op}: q must be [B, T, H, K] with no empty size, got {list(q.shape)}")
    require_shape(op, "k", k, tuple(q.shape), "the shape of q")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] < 1:
        raise ValueError(f"{op}: v must be [B, T, H, V] with B, T, H of q {list(q.shape[:3])}, got {list(v.shape)}")
    if beta is not None:
        require_shape(op, "beta", beta, tuple(q.shape[:3]), "[B, T, H]")
    if g is not None and tuple(g.shape) not in (tuple(q.shape[:3]), tuple(q.shape), (q.shape[2],)):
        raise ValueError(
            f"{op}: g must be [B, T, H] = {list(q.shape[:3])}, [B, T, H, K] = {list(q.shape)} or [H], "
            f"got {list(g.shape)}"
        )
    require_cu_seqlens(op, cu_seqlens, q)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
        require_shape(op, "initial_state", initial_state, shape, "[sequences, H, K, V]")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: q, k and v must share one dtype, got {q.dtype} and {name} {t.dtype}")
    require_numbers(op, scale=scale)
    return None

"""Argument checks shared by the ops: one clear sentence each, the value and what would be allowed."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], legend: str) -> None:
    """Raise unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {legend} = {list(shape)}, got {list(tensor.shape)}")


def require_alike(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise unless all given tensors are on one device and none is an integer or a boolean."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, t in given:
        if t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device} but {first_name} is on {first.device}")
        if not (t.is_floating_point() or t.is_complex()):
            raise ValueError(f"{op}: {name} must be floating point, got {t.dtype}")


def require_cu_seqlens(op: str, cu_seqlens: Tensor | None, batch: int) -> None:
    """Raise unless `cu_seqlens` is a 1-D integer tensor and the batch is packed into one row.

    Its values are not read: that would wait for the device at every call.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be 1-D int32 or int64 of at least two offsets, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"{op}: cu_seqlens packs all sequences into one row, so the batch must be 1, got {batch}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and of all inner arithmetic: float32, except float64 for float64 inputs (and complex alike)."""
    if dtype in (torch.float64, torch.complex64, torch.complex128):
        return dtype
    return torch.float32

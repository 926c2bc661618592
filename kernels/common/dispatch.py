"""Which backend runs, and why: one decision, made before any work, the same for `explain` and for the call itself."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial, wraps
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS: Final = ("auto", "reference", "chunked", "numba", "triton")
CPU_CHUNK: Final = 32
TRITON_CHUNKS: Final = (16, 32, 64)
# multiplications of a call, forward, from which loops are compiled for its sizes: tens of milliseconds, against seconds
WORTH_COMPILING: Final = 2**22
# numbers of a matrix beyond which products of chunks are faster than loops: it leaves the nearest cache
WIDE_MATRIX: Final = 64 * 64
# looked up, not imported: a CPU user never pays for triton, nor anybody for a loop that is not run
HAS_TRITON: Final = importlib.util.find_spec("triton") is not None
HAS_NUMBA: Final = importlib.util.find_spec("numba") is not None
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Decision:
    """The answer of `explain`: what runs and why. `chunk` is 0 where the backend has no chunks."""

    op: str
    backend: str
    chunk: int
    reason: str

    def as_tags(self) -> dict[str, str]:
        """The decision as flat strings, ready to be logged with a run.

        Example:
            >>> Decision("linear_scan", "chunked", 32, "tensors are on cpu").as_tags()["kernel.linear_scan.backend"]
            'chunked'
        """
        return {f"kernel.{self.op}.{key}": str(value) for key, value in asdict(self).items() if key != "op"}


def choose(
    op: str,
    backend: str,
    tensor: Tensor,
    *,
    chunk: int | None = None,
    length: int | None = None,
    refusal: str | None = None,
    triton_chunk: int = 64,
    any_chunk: bool = False,
    is_traced: bool = False,
    has_numba: bool = False,
    is_wide: bool = False,
    is_small: bool = False,
) -> Decision:
    """Decide the backend of one call; an explicit choice is never replaced by another.

    Args:
        op: name used in messages.
        backend: one of `BACKENDS`; "auto" first looks at the environment variable KERNELS_BACKEND.
        tensor: any input; its device and dtype decide.
        chunk: chunk length wished, a power of two; None takes the backend's own.
        length: T, so that a short call is not padded to a full chunk.
        refusal: why this op's Triton kernels cannot take these shapes, None if they can.
        triton_chunk: the op's own chunk length on Triton.
        any_chunk: the op takes any length of a chunk on a CPU.
        is_traced: autograd goes through the chunked backend. In forward mode torch takes what has a backward by hand
            for a constant, without a word.
        has_numba: the op has loops compiled for a CPU.
        is_wide: so much happens in a step that torch's products are worth their calls: "auto" takes them.
        is_small: so little happens in the call that compiling loops for its sizes is not worth it: nor does "auto".

    Raises:
        ValueError: unknown backend or chunk, an explicit "triton" or "numba" that cannot run, or forward-mode
            derivatives of what has none.
    """
    wish = os.environ.get("KERNELS_BACKEND", "auto") if backend == "auto" else backend
    if wish not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {wish!r}; use one of {', '.join(BACKENDS)}")
    if chunk is not None and not isinstance(chunk, int):
        raise ValueError(f"{op}: chunk must be a whole number, got {chunk!r}")
    if chunk is not None and (chunk < 1 or (chunk & (chunk - 1) and not any_chunk)):
        kind = "at least 1" if any_chunk else "a power of two"
        raise ValueError(f"{op}: chunk must be {kind}, got {chunk}")
    # what the op cannot do anywhere comes before what this machine cannot
    obstacle = refusal or _triton_obstacle(tensor, chunk)
    if wish == "reference":
        return Decision(op, "reference", 0, "asked for: plain token loop")
    is_triton = wish == "triton" or (wish == "auto" and tensor.is_cuda and obstacle is None)
    if getattr(forward_ad, "_current_level", -1) >= 0 and (is_triton or not is_traced):
        raise ValueError(f"{op}: forward-mode derivatives are those of backend='reference', got {wish!r}")
    if is_triton:
        if obstacle is not None:
            raise ValueError(f"{op}: backend 'triton' {obstacle}; use backend='chunked'")
        why = "asked for" if wish == "triton" else "CUDA tensors and shapes are supported"
        return Decision(op, "triton", triton_chunk if chunk is None else chunk, why)
    missing = _numba_obstacle(tensor, has_numba)
    if wish == "numba" and missing is not None:
        raise ValueError(f"{op}: backend 'numba' {missing}; use backend='chunked'")
    if wish == "numba" or (wish == "auto" and missing is None and not is_wide and not is_small):
        why = "asked for" if wish == "numba" else "CPU tensors, and the steps are small"
        return Decision(op, "numba", _cpu_chunk(chunk, length), why)
    why = "asked for" if wish == "chunked" else f"backend 'triton' {obstacle or 'is only automatic on CUDA'}"
    return Decision(op, "chunked", _cpu_chunk(chunk, length), why)


def _cpu_chunk(chunk: int | None, length: int | None) -> int:
    if chunk is not None:
        return chunk
    # a decoding step of one token must not be padded to 32
    size = 1
    while size < CPU_CHUNK and (length is None or size < length):
        size *= 2
    return size


def matrix_chunk(dtype: torch.dtype, *, per_channel: bool, wide: bool) -> int:
    """Chunk of the matrix-state kernels that still fits the registers: float32 products take three times the room."""
    if per_channel:
        return 16
    size = 32 if wide else 64
    return size // 2 if dtype == torch.float32 else size


def matrix_size(q: Tensor, v: Tensor) -> dict[str, bool]:
    """What `choose` asks of an op with loops over a matrix [K, V] per head, which are compiled for one size."""
    numbers = q.shape[3] * v.shape[3]
    is_small = q.shape[:3].numel() * numbers < WORTH_COMPILING
    return {"has_numba": True, "is_wide": numbers > WIDE_MATRIX, "is_small": is_small}


def _triton_obstacle(tensor: Tensor, chunk: int | None) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if tensor.dtype in (torch.float64, torch.complex128):
        return f"computes in float32 and refuses {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs CUDA tensors (or TRITON_INTERPRET=1 for its slow interpreter), got {tensor.device.type}"
    if chunk is not None and chunk not in TRITON_CHUNKS:
        return f"has chunks {', '.join(map(str, TRITON_CHUNKS))}, got {chunk}"
    return None


def _numba_obstacle(tensor: Tensor, has_numba: bool) -> str | None:
    if not has_numba:
        return "has no loops of this op"
    if not HAS_NUMBA:
        return "needs the package numba, which is not installed"
    return None if tensor.device.type == "cpu" else f"needs CPU tensors, got {tensor.device.type}"


def too_many(what: str, number: int, tile: int) -> str | None:
    """Why Triton cannot take so many: tiles of them are the second axis of a grid, which ends at 65535."""
    most = 65_535 * tile
    return f"takes at most {most} {what}, got {number}" if number > most else None


def without_autocast(body: Callable[P, R]) -> Callable[P, R]:
    """Run a body in the dtypes it is written in: autocast around a call would take its products to 16 bits.

    The first tensor among the arguments, or in a list there, says on which device.
    """

    @wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        flat = (each for given in args for each in (given if isinstance(given, list) else (given,)))
        device = next(each for each in flat if isinstance(each, Tensor)).device.type
        # asked first: entering costs as much as a small call
        if not torch.is_autocast_enabled(device):
            return body(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return body(*args, **kwargs)

    return run


def explained_by(plan: Callable[..., Decision]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Tie a public op to the function that checks its arguments and decides its backend."""

    def attach(op: Callable[..., Any]) -> Callable[..., Any]:
        op.plan = plan  # type: ignore[attr-defined]
        return op

    return attach


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Decision:
    """Say which backend `op(*args, **kwargs)` would run, and why, without running it.

    Raises:
        ValueError: whatever the call itself would raise.

    Example:
        >>> from kernels.linear_scan import linear_scan
        >>> explain(linear_scan, torch.ones(1, 8, 2), torch.ones(1, 8, 2), backend="chunked")
        Decision(op='linear_scan', backend='chunked', chunk=40, reason='asked for')
    """
    if isinstance(op, partial):
        return explain(op.func, *op.args, *args, **{**op.keywords, **kwargs})
    plan: Callable[..., Decision] | None = getattr(op, "plan", None)
    if plan is None:
        raise ValueError(f"explain: {getattr(op, '__name__', op)!r} is not one of our ops")
    return plan(*args, **kwargs)

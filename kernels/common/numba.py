"""What compiled loops share: how they are compiled and spread over threads, functions of a number, products.

For recurrences that must run in order, on a CPU: a step of torch costs more in calls than in arithmetic. A loop that is
compiled here takes NumPy arrays and runs without the interpreter's lock. Machine code is kept beside the source (or in
the user's cache) and made anew when the file that holds the loop changes; after a change in *this* file, delete it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# numba compiles a function for the types that come

import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

# multiplications that take as long as it takes to start threads, a few hundred microseconds
WORTH = 2**22
# bytes that torch takes from the system for every call
LARGE = 2**25
# sums may be taken in another order and products fused; infinities and NaN stay what they are
LOOSE = {"reassoc", "contract", "nsz", "arcp"}


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop over arrays as machine code, compiled at its first call and kept where a place can be written."""
    how: dict[str, Any] = {"nogil": True, "fastmath": LOOSE, "error_model": "numpy"}
    try:
        return njit(cache=True, **how)(loop)
    except RuntimeError:  # no folder can be written
        return njit(**how)(loop)


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a loop calls, compiled once: a call costs some ten nanoseconds."""
    # nobody else calls it
    how: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(fastmath=LOOSE, error_model="numpy", **how)(function)


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a loop calls, as a part of that loop."""
    return njit(inline="always", fastmath=LOOSE, error_model="numpy")(function)


def spread(loop: Callable[..., None], lanes: int, work: int, *arguments: Any) -> None:
    """Call `loop(first, last, *arguments)` over all lanes, on as many threads as torch has; lanes must not meet.

    Args:
        work: multiplications of the whole call; below `WORTH` one thread does it.
    """
    threads = min(torch.get_num_threads(), lanes)
    if threads < 2 or work < WORTH:
        return loop(0, lanes, *arguments)
    ends = [lanes * n // threads for n in range(threads + 1)]
    # made for the call: a pool would not live through a fork, and threads cost less than a layer
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, last: loop(first, last, *arguments), ends[:-1], ends[1:]))
    return None


def scratch(shape: Sequence[int], like: Tensor) -> Tensor:
    """Room that a loop writes, in large pages where the system has them.

    Of much memory the first touch of every page costs more than what is written there, and torch asks for it again at
    every call.
    """
    size = math.prod(shape) * like.element_size()
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a system without large pages
        space.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(space, dtype=like.dtype).view(shape)


def array(tensor: Tensor) -> np.ndarray:
    """The numbers of a contiguous tensor, not copied."""
    return tensor.detach().contiguous().numpy()


def places(batch: int, length: int, reset: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """First token and length of every sequence, and whether a token forgets what was: [S], [S] and [B * T]."""
    offsets = torch.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens.long()
    forgets = torch.zeros(batch * length, dtype=torch.bool) if reset is None else reset.flatten().bool()
    return offsets[:-1], offsets.diff(), forgets


# functions of one number, exact to four units in the last place; the system's own do not vectorise in float32

_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST = np.float32(-87.3)
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
# of Cephes: exp(r) for |r| <= ln 2 / 2, tanh(x) for |x| < 0.625
_E = tuple(map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)))
_T = tuple(
    map(np.float32, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1))
)
_TANH_SMALL = np.float32(0.625)
# log(1 + y) = 2 (s + s^3 / 3 + s^5 / 5 + ...), s = y / (2 + y)
_L = tuple(np.float32(1 / n) for n in (15, 13, 11, 9, 7, 5, 3))


@inner
def _exp32(x):
    bounded = x if x > _LEAST else _LEAST
    n = np.floor(bounded * _LOG2E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_E[0] * r + _E[1]) * r + _E[2]) * r + _E[3]) * r + _E[4]) * r + _E[5]
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    full = (p * (r * r) + r + _ONE) * power
    return np.float32(0) if x < _LEAST else full


@inner
def _tanh32(x):
    size = abs(x)
    e = _exp32(-_TWO * size)
    z = x * x
    p = (((_T[0] * z + _T[1]) * z + _T[2]) * z + _T[3]) * z + _T[4]
    small, large = p * z * size + size, (_ONE - e) / (_ONE + e)
    of_size = small if size < _TANH_SMALL else large
    return -of_size if x < 0 else of_size


@inner
def _log1p32(y):
    s = y / (_TWO + y)
    z = s * s
    p = (((((_L[0] * z + _L[1]) * z + _L[2]) * z + _L[3]) * z + _L[4]) * z + _L[5]) * z + _L[6]
    return _TWO * (s + s * z * p)


def exp(x: float) -> float:
    """e to the power of x, which is at most zero."""
    return math.exp(x)


def tanh(x: float) -> float:
    """Hyperbolic tangent."""
    return math.tanh(x)


def log1p(x: float) -> float:
    """log(1 + x) for x of 0 to 1."""
    return math.log1p(x)


def _in_both_widths(function: Callable[[float], float], narrow: Callable[[Any], Any]) -> None:
    @overload(function, inline="never")
    def _choose(x):
        return (lambda x: narrow(x)) if x == types.float32 else (lambda x: wide(x))

    wide = getattr(math, function.__name__)


for _function, _narrow in ((exp, _exp32), (tanh, _tanh32), (log1p, _log1p32)):
    _in_both_widths(_function, _narrow)


@inner
def sigmoid(x, one):
    """1 / (1 + exp(-x)), `one` in the type of x."""
    e = exp(-abs(x))
    above = one if x >= 0 else e
    return above / (one + e)


@inner
def log_sigmoid(x, one):
    """log(sigmoid(x))."""
    below = x if x < 0 else one - one
    return below - log1p(exp(-abs(x)))


@inner
def onto(out, row, matrix):
    """out += row @ matrix, four rows of the matrix at a time: `out` is read and written less often."""
    many = row.size // 4 * 4
    for i in range(0, many, 4):
        a, b, c, d = row[i], row[i + 1], row[i + 2], row[i + 3]
        for j in range(out.size):
            out[j] += a * matrix[i, j] + b * matrix[i + 1, j] + (c * matrix[i + 2, j] + d * matrix[i + 3, j])
    for i in range(many, row.size):
        for j in range(out.size):
            out[j] += row[i] * matrix[i, j]


@inner
def along(out, row, matrix):
    """out += matrix @ row, four rows of the matrix at a time: `row` is read less often."""
    many = out.size // 4 * 4
    for i in range(0, many, 4):
        a = b = c = d = row[0] - row[0]
        for j in range(row.size):
            a += matrix[i, j] * row[j]
            b += matrix[i + 1, j] * row[j]
            c += matrix[i + 2, j] * row[j]
            d += matrix[i + 3, j] * row[j]
        out[i] += a
        out[i + 1] += b
        out[i + 2] += c
        out[i + 3] += d
    for i in range(many, out.size):
        for j in range(row.size):
            out[i] += matrix[i, j] * row[j]


@inner
def copy(out, given):
    """out = given, of matrices."""
    for p in range(out.shape[0]):
        for d in range(out.shape[1]):
            out[p, d] = given[p, d]

"""Whole vectors in a compiled loop, for the few places where what the compiler makes of loops over numbers is slow.

It takes vectors of half the machine's length, and since arrays may overlap for all it knows, sums of rows travel
through memory. An intrinsic of numba says which instructions it stands for; these are the words for vectors. Where the
machine's are shorter, the compiler cuts them.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def"
# llvmlite carries no types, and numba compiles a function for the types that come

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils

from kernels.common.numba import inner

VECTOR = 64  # bytes
# this machine has such vectors, and 32 of them
HAS_LONG = bool(get_host_cpu_features().get("avx512f"))

_COUNT, _SHORT = ir.IntType(64), ir.IntType(32)


def filled(width: int, size: int) -> int:
    """A width filled up to whole vectors of numbers of so many bytes."""
    lanes = VECTOR // size
    return (width + lanes - 1) // lanes * lanes


class Vectors:
    """Reads, writes and arithmetic of vectors of one kind of number, at the place where `builder` stands."""

    def __init__(self, context: Any, builder: Any, number: Any):
        self.context, self.builder, self.size = context, builder, number.bitwidth // 8
        self.lanes = VECTOR // self.size
        self.type = ir.VectorType(context.get_value_type(number), self.lanes)
        self.zero = self.constant(0.0)

    def constant(self, number: float) -> Any:
        return ir.Constant(self.type, [number] * self.lanes)

    def pointers(self, kinds: Iterable[Any], arrays: Iterable[Any]) -> list[Any]:
        """Where the numbers of contiguous arrays begin."""
        made = (self.context.make_array(kind) for kind in kinds)
        return [kind(self.context, self.builder, array).data for kind, array in zip(made, arrays, strict=True)]

    def load(self, pointer: Any, place: Any) -> Any:
        return self.builder.load(self._vector(pointer, place), align=self.size)

    def store(self, vector: Any, pointer: Any, place: Any) -> None:
        self.builder.store(vector, self._vector(pointer, place), align=self.size)

    def number(self, pointer: Any, place: Any) -> Any:
        """One number of an array, in all lanes."""
        return self.spread(self.scalar(pointer, place))

    def scalar(self, pointer: Any, place: Any) -> Any:
        """One number of an array."""
        return self.builder.load(self._at(pointer, place))

    def put(self, number: Any, pointer: Any, place: Any) -> None:
        """Write one number of an array."""
        self.builder.store(number, self._at(pointer, place))

    def spread(self, number: Any) -> Any:
        """A number in all lanes."""
        nothing = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(nothing, number, ir.Constant(_SHORT, 0))
        return self.builder.shuffle_vector(one, nothing, self._lanes([0] * self.lanes))

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=["contract"])

    def add(self, total: Any, a: Any, b: Any) -> Any:
        """total + a b, in one instruction where there is one."""
        return self.builder.fadd(total, self.times(a, b), flags=["contract"])

    def take(self, total: Any, a: Any, b: Any) -> Any:
        """total - a b."""
        return self.builder.fsub(total, self.times(a, b), flags=["contract"])

    def sum(self, vectors: list[Any]) -> Any:
        """The sum of vectors, lane by lane."""
        total = vectors[0]
        for other in vectors[1:]:
            total = self.builder.fadd(total, other)
        return total

    def across(self, vector: Any) -> Any:
        """The sum of all lanes."""
        left = self.lanes
        while left > 1:
            left //= 2
            halves = (self._lanes(range(begin, begin + left)) for begin in (0, left))
            vector = self.sum([self.builder.shuffle_vector(vector, vector, half) for half in halves])
        return self.builder.extract_element(vector, ir.Constant(_SHORT, 0))

    @contextmanager
    def rows(self, width: int, step: int = 1, count: int | None = None) -> Iterator[tuple[Any, Any]]:
        """A loop over every so manieth row of a matrix: the number of the row, and where it begins.

        `count` rows, as many as the matrix is wide unless said.
        """
        count = width if count is None else count
        with cgutils.for_range(self.builder, ir.Constant(_COUNT, count // step)) as loop:
            row = self.builder.mul(loop.index, ir.Constant(_COUNT, step))
            yield row, self.builder.mul(row, ir.Constant(_COUNT, width))

    def further(self, place: Any, number: int) -> Any:
        """So many numbers behind a place of a loop."""
        return self.builder.add(place, ir.Constant(_COUNT, number))

    def matrix(self, pointer: Any, number: Any, size: int) -> Any:
        """Where, of matrices of so many numbers, one begins."""
        return self.builder.gep(pointer, [self.builder.mul(number, ir.Constant(_COUNT, size))])

    def variable(self) -> Any:
        """A vector, zero at first, that a loop changes."""
        return cgutils.alloca_once_value(self.builder, self.zero)

    def increase(self, variable: Any, a: Any, b: Any) -> None:
        """variable += a b."""
        self.builder.store(self.add(self.builder.load(variable), a, b), variable)

    def _lanes(self, numbers: Iterable[int]) -> Any:
        chosen = list(numbers)
        return ir.Constant(ir.VectorType(_SHORT, len(chosen)), chosen)

    def _at(self, pointer: Any, place: Any) -> Any:
        return self.builder.gep(pointer, [ir.Constant(_COUNT, place) if isinstance(place, int) else place])

    def _vector(self, pointer: Any, place: Any) -> Any:
        return self.builder.bitcast(self._at(pointer, place), self.type.as_pointer())


@inner
def matrices(number, rows, width, like):
    """Room for so many, every row where a vector begins (`width` numbers are whole vectors)."""
    size, item = number * rows * width, like.itemsize
    space = np.empty(size + VECTOR // item, like.dtype)
    begin = (VECTOR - space.ctypes.data % VECTOR) % VECTOR // item
    return space[begin : begin + size].reshape(number, rows, width)

"""Products of small matrices in a compiled loop, tile by tile with the sums in registers.

A library's product of 32 x 32 and 32 x 128 numbers takes twice as long: it packs what already lies in the nearest
cache. Here sums of a tile of rows and whole vectors stay in registers while one number of the left and one row of the
right matrix at a time are read; the left one may lie any way, so that its transpose costs nothing.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
# numba compiles a function for the types that come, and gives an intrinsic its first argument

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.common.numba import called, inner
from kernels.common.numba_vectors import HAS_LONG, VECTOR, Vectors

# of a tile: eight sums in registers of the machine's length, as many as hide what an addition takes
ROWS = 4
WIDE = 2 if HAS_LONG else 1
# onto what sums go
SET, ADD, MOVE = range(3)

_COUNT, _BYTE = ir.IntType(64), ir.IntType(8)


@intrinsic
def _at(typing, matrix, i, j):
    """Where a number of a matrix is."""

    def write(context, builder, signature, given):
        found = context.make_array(signature.args[0])(context, builder, given[0])
        steps = cgutils.unpack_tuple(builder, found.strides, 2)
        offset = builder.add(*(builder.mul(n, step) for n, step in zip(given[1:], steps, strict=True)))
        bytes_ = builder.bitcast(found.data, _BYTE.as_pointer())
        return builder.bitcast(builder.gep(bytes_, [offset]), found.data.type)

    return types.CPointer(matrix.dtype)(matrix, types.int64, types.int64), write


@intrinsic(prefer_literal=True)
def _tile(typing, wide, kind, left, row, column, right, turn, out, line, count, a, first, b, second):
    """A tile of `ROWS` rows and `wide` vectors: a sum of `count` products of numbers and vectors, and what `kind` adds.

    The numbers of the left matrix lie `row` and `column` apart, rows of the right one `turn`, of all others `line`.
    """

    def write(context, builder, signature, given):
        v, columns = Vectors(context, builder, signature.args[2].dtype), range(wide.literal_value)
        left_at, row, column, right_at, turn, out_at, line, count, a, first_at, b, second_at = given[2:]
        lines = [v.matrix(left_at, row, r) for r in range(ROWS)]
        sums = [[v.variable() for _ in columns] for _ in range(ROWS)]
        with cgutils.for_range(builder, count) as loop:
            place = builder.mul(loop.index, turn)
            across = [v.load(right_at, v.further(place, c * v.lanes)) for c in columns]
            for r in range(ROWS):
                number = v.number(lines[r], builder.mul(loop.index, column))
                for total, vector in zip(sums[r], across, strict=True):
                    v.increase(total, number, vector)
        for r in range(ROWS):
            for c, total in zip(columns, sums[r], strict=True):
                place = v.further(builder.mul(line, ir.Constant(_COUNT, r)), c * v.lanes)
                found: Any = builder.load(total)
                if kind.literal_value == ADD:
                    found = v.sum([found, v.load(out_at, place)])
                if kind.literal_value == MOVE:
                    for factor, pointer in ((a, first_at), (b, second_at)):
                        found = v.add(found, v.spread(factor), v.load(pointer, place))
                v.store(found, out_at, place)
        return context.get_dummy_value()

    return types.void(wide, kind, left, row, column, right, turn, out, line, count, a, first, b, second), write


@inner
def _tiles(kind, out, left, right, a, first, b, second):
    """Tile by tile; widths and kinds are known to the compiler."""
    size, lanes = out.itemsize, VECTOR // out.itemsize
    row, column = left.strides[0] // size, left.strides[1] // size
    turn, line, count, across = right.strides[0] // size, out.strides[0] // size, left.shape[1], WIDE * lanes
    many = out.shape[1] // across * across
    for i in range(0, out.shape[0], ROWS):
        for j in range(0, many, across):
            _tile(
                WIDE, kind, _at(left, i, 0), row, column, _at(right, 0, j), turn, _at(out, i, j), line, count, a,
                _at(first, i, j), b, _at(second, i, j),
            )  # fmt: skip
        for j in range(many, out.shape[1], lanes):
            _tile(
                1, kind, _at(left, i, 0), row, column, _at(right, 0, j), turn, _at(out, i, j), line, count, a,
                _at(first, i, j), b, _at(second, i, j),
            )  # fmt: skip


# of all: out [M, N], M a multiple of `ROWS` and N whole vectors, left [M, K] lying any way, right [K, N]


@called
def product(out, left, right):
    """out = left @ right."""
    _tiles(SET, out, left, right, out.dtype.type(0), out, out.dtype.type(0), out)


@called
def add(out, left, right):
    """out += left @ right."""
    _tiles(ADD, out, left, right, out.dtype.type(0), out, out.dtype.type(0), out)


@called
def move(out, a, first, b, second, left, right):
    """out = a first + b second + left @ right, where rows of the first three are as far apart."""
    _tiles(MOVE, out, left, right, a, first, b, second)

"""Where the loops of a neural memory keep what is on its way: matrices cut out of one room per lane.

Sizes are no constants of the loops, so nothing is compiled anew for others. A room is a few arrays, each of many
matrices of a kind, since every array that goes through a loop is more to compile.

Legend: L layers between widths w_0 = K and w_L = V; place l holds a matrix [w_l, c]; c tokens of a piece; N tokens,
H heads; G is 2 with momentum, else 1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated"
# numba compiles a function for the types that come, and gives an intrinsic its first argument

from collections import namedtuple

from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from kernels.common.numba import called, copy, inner
from kernels.common.numba_vectors import matrices

# rows of the table of sizes: w_l, the sum of widths before, the numbers of all matrices before
WIDTH, WIDE, DEEP = range(3)

# Rows of `layered` have L + 1 places, of `ends` [V, c], of `gates` [c], of `squares` [c, c], of `factors` what is
# largest in a layer, of `states` all layers, as `layer` says. `wide`, `most`, `total`: numbers in rows that are flat.
Room = namedtuple("Room", "sizes c kinds layered ends gates squares factors states wide most total")


@inner
def made(sizes, c, kinds, like, counts):
    """A room of zeros; `counts` [6] says how many rows there are of each kind."""
    last = sizes.shape[1] - 2
    wide, most, total = c * sizes[WIDE, last + 1], c * (kinds * max(sizes[WIDTH]) + c), extent(sizes, c, kinds)
    ends, squares = matrices(counts[1], sizes[WIDTH, last], c, like), matrices(counts[3], c, c, like)
    layered, gates = matrices(1, counts[0], wide, like).reshape(-1), matrices(1, counts[2], c, like)[0]
    factors, states = matrices(1, counts[4], most, like).reshape(-1), matrices(1, counts[5], total, like).reshape(-1)
    for each in (layered, factors, states):
        each[:] = 0
    gates[:], ends[:], squares[:] = 0, 0, 0
    return Room(sizes, c, kinds, layered, ends, gates, squares, factors, states, wide, most, total)


@called
def extent(sizes, c, kinds):
    """Numbers of a state, with room for the slopes of a piece behind every layer."""
    last = sizes.shape[1] - 2
    return kinds * sizes[DEEP, last] + c * (sizes[WIDE, last + 1] - sizes[WIDE, 1])


@intrinsic
def cut(typing, space, begin, rows, width):
    """A matrix out of an array that is contiguous, from number `begin` on; it counts no references."""
    kind = types.Array(space.dtype, 2, "C")

    def write(context, builder, signature, given):
        made = context.make_array(kind)(context, builder)
        data = context.make_array(signature.args[0])(context, builder, given[0]).data
        size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(space.dtype)))
        populate_array(made, builder.gep(data, [given[1]]), given[2:], [builder.mul(given[3], size), size], size, None)
        return made._getvalue()

    return kind(space, types.intp, types.intp, types.intp), write


@called
def upper(matrix, rows):
    """Its first rows."""
    return cut(matrix, 0, rows, matrix.shape[1])


@called
def lower(matrix, begin):
    """Its rows from one on."""
    return cut(matrix, begin * matrix.shape[1], matrix.shape[0] - begin, matrix.shape[1])


@called
def place(r, space, base, l):  # noqa: E741
    """Place l of what begins at `base`."""
    return cut(space, base + r.c * r.sizes[WIDE, l], r.sizes[WIDTH, l], r.c)


@called
def of(r, row, l):  # noqa: E741
    """Place l of a row of `layered`."""
    return place(r, r.layered, row * r.wide, l)


@called
def layer(r, space, base, l):  # noqa: E741
    """Of a layer W, P where there is momentum, and the slopes of a piece, turned [G w + c, w']."""
    begin = r.kinds * r.sizes[DEEP, l] + r.c * (r.sizes[WIDE, l + 1] - r.sizes[WIDE, 1])
    return cut(space, base + begin, r.kinds * r.sizes[WIDTH, l] + r.c, r.sizes[WIDTH, l + 1])


@called
def taken(r, space, base, flat, begin, kind):
    """W (kind 0) or P (1) of all layers, from where they lie one after another."""
    for l in range(r.sizes.shape[1] - 2):  # noqa: E741
        width, next_ = r.sizes[WIDTH, l], r.sizes[WIDTH, l + 1]
        copy(lower(layer(r, space, base, l), kind * width), cut(flat, begin + r.sizes[DEEP, l], width, next_))


@called
def given_back(r, flat, begin, space, base, kind):
    """The other way."""
    for l in range(r.sizes.shape[1] - 2):  # noqa: E741
        width, next_ = r.sizes[WIDTH, l], r.sizes[WIDTH, l + 1]
        copy(cut(flat, begin + r.sizes[DEEP, l], width, next_), lower(layer(r, space, base, l), kind * width))


@called
def turned(out, given):
    """out = given^T."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = given[j, i]


@called
def vectors(out, given, t0, n, h):
    """out [X, c] = the n tokens [N, H, X] from t0, and zeros."""
    for j in range(out.shape[0]):
        for t in range(out.shape[1]):
            out[j, t] = given[t0 + t, h, j] if t < n else 0


@called
def numbers(out, given, t0, n, h):
    """out [c] = the gates [N, H] of n tokens from t0, and zeros."""
    for t in range(out.size):
        out[t] = given[t0 + t, h] if t < n else 0


@called
def stored(out, t0, n, h, given):
    """The n tokens [N, H, X] from t0 = given [X, c]."""
    for t in range(n):
        for j in range(out.shape[2]):
            out[t0 + t, h, j] = given[j, t]

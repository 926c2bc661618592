"""The Triton kernels in the interpreter: float32 and float16 (bfloat16 there is silently wrong and never run).

The interpreter sees neither data races nor the compiler; it proves the arithmetic, the masks and the offsets. As it is
slow, a call proves several things at once: NaN in scratch and halo, packed rows with resets, lengths of no whole chunk.
"""

import os
from dataclasses import replace
from functools import partial

import kernel_properties as props
import pytest
import torch
from all_cases import ALL, each
from kernel_properties import CASES, DISTRIBUTIONS, OFFSETS
from memory_cases import MEMORY_CASES

import kernels.newton_rnn as newton_module

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")
# the other memories are composed of these: that they are handed the right things is shown twice, in float32
TRITON = {name: case for name, case in ALL.items() if case.has_triton}
# in float32 a solve has converged after 30 steps
TRITON |= {name: replace(TRITON[name], op=partial(TRITON[name].op, steps=30)) for name in ("ridge", "ridge_mixed")}
KERNELS = {name: case for name, case in TRITON.items() if name not in MEMORY_CASES or name in ("ridge", "titans_mlp")}
every = each(KERNELS)
# one of each kind of kernel in every run, the rest of the table where slow tests run
EVERYDAY = ("scan_real", "gla_scalar", "gated_deltanet", "newton_gru", "sequential_lstm", "m2rnn")
# chunks and segments of these are the model's own, of 4 and 6 tokens
SHORT = [name for name in MEMORY_CASES if not name.startswith(("ridge", "routed"))]


def rest_is_slow(*quick):
    """Parametrise by every case, all but the quick ones slow."""
    marks = {name: [] if name in quick else pytest.mark.slow for name in TRITON}
    return pytest.mark.parametrize("case", [pytest.param(c, marks=marks[n], id=n) for n, c in TRITON.items()])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Two chunks side by side: several of Newton's blocks of time in a short test."""
    monkeypatch.setattr(newton_module, "TRITON_ROWS", 2)


def length_of(case):
    """A chunk and a part of one, at least."""
    return 11 if case.name in SHORT else 21


def first(case, inputs):
    """One sequence of the two: that both are found where they lie, the tests of agreement and of any length show."""
    return {n: x if n in case.timeless else x[:1] for n, x in inputs.items()}


@rest_is_slow(*EVERYDAY, "ridge")
def test_agrees_with_token_loop(case, nan_scratch):
    inputs = props.draw(case, length_of(case), "cos 0.5 slow")
    props.assert_agrees(case, inputs, "triton", torch.float32, **case.tiles)


@every
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in DISTRIBUTIONS if kind != "cos 0.5 slow"])
def test_all_key_distributions(case, kind):
    inputs = first(case, props.draw(case, length_of(case), kind))
    props.assert_agrees(case, inputs, "triton", torch.float32, **case.tiles)


@rest_is_slow(*EVERYDAY)
def test_packed_sequences(case, nan_scratch):
    """Empty sequences and such of one token, chunks full and not, NaN around all inputs, resets where there are any."""
    cu = [0, 0, 1, 12, 23, 30, 30] if case.name in SHORT else OFFSETS
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, cu[-1], "cos 0.5", cu).items()}
    options = {"cu_seqlens": torch.tensor(cu, dtype=torch.int32), **case.tiles}
    if case.has_reset:
        options["reset"] = torch.zeros(1, cu[-1], dtype=torch.bool)
        options["reset"][0, [0, 3, 30]] = True
    props.assert_agrees(case, inputs, "triton", torch.float32, **options)


SIXTEEN = [(case, torch.float16) for name, case in KERNELS.items() if name != "scan_complex"]
# the upcast on the host is the same code everywhere
SIXTEEN += [(KERNELS[name], torch.bfloat16) for name in EVERYDAY]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), SIXTEEN, ids=[f"{case.name}-{dtype}" for case, dtype in SIXTEEN])
def test_sixteen_bits(case, dtype):
    """float16 in the kernels; bfloat16 is upcast on the host."""
    given = props.cast(first(case, props.draw(case, 20, "cos 0.5")), dtype)
    found = props.tensors_of(case, given, backend="triton", **case.tiles)
    assert found[0].dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    props.assert_close(case, given, found, props.truth_of(case, given), tolerance)


@every
@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16])
def test_any_length_without_a_start_and_bit_equal(case, length):
    inputs = props.draw(case, length)
    del inputs["initial_state"]
    given = props.cast(inputs, torch.float32)
    runs = [props.tensors_of(case, given, backend="triton", **case.tiles) for _ in range(2 if length > 1 else 1)]
    props.assert_close(case, given, runs[0], props.truth_of(case, given), 1e-5)
    assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[-1], strict=True))


@every
@pytest.mark.slow
def test_carry(case):
    inputs = first(case, props.draw(case, 25, "cos 0.5"))
    given = props.cast(inputs, torch.float32)
    parts = props.tensors_of(props.carried(case, 17), given, backend="triton", **case.tiles)
    props.assert_close(case, given, parts, props.truth_of(case, given), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chunk"),
    [(n, c) for n in ("gla_scalar", "gla_channel", "gated_deltanet", "kda") for c in (32, 64)] + [("ridge", 32)],
)
def test_other_chunks(name, chunk):
    inputs = first(KERNELS[name], props.draw(KERNELS[name], chunk + 6))
    props.assert_agrees(KERNELS[name], inputs, "triton", torch.float32, chunk=chunk)


# what is extreme in a memory of layers is in its coefficients, which torch computes for its kernels
EDGES = props.edges_of(case for case in KERNELS.values() if case.name != "titans_mlp")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "edge"), EDGES, ids=[f"{case.name}-{edge}" for case, edge in EDGES])
def test_extremes(case, edge):
    # two chunks of the 50 tokens say as much
    inputs = {n: x[:, :21] if case.is_tokens(n) else x for n, x in props.edge_inputs(case, edge).items()}
    given = props.cast(first(case, inputs), torch.float32)
    found = props.tensors_of(case, given, backend="triton", **case.tiles)
    # of one token's ridge memory beta cancels out, and its gradient with it: what is left is rounding of its parts
    tolerance = 1e-4 if edge == "wiped" and "ridge" in case.name else 1e-5
    props.assert_close(case, given, found, props.truth_of(case, given), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(3, 33), (17, 20), (40, 70)])
@pytest.mark.parametrize("name", ["gla_scalar", "gla_channel", "gated_deltanet", "kda"])
def test_tiles_of_both_widths(name, widths):
    case = CASES[name]
    inputs = first(case, props.draw(case, 20))
    k, v = widths
    gen = torch.Generator().manual_seed(3)
    for key in ("q", "k"):
        inputs[key] = torch.nn.functional.normalize(torch.randn(1, 20, 2, k, generator=gen), dim=-1)
    inputs["v"] = torch.randn(1, 20, 2, v, generator=gen)
    inputs["initial_state"] = torch.randn(1, 2, k, v, generator=gen)
    if inputs["g"].dim() == 4:
        inputs["g"] = -torch.rand(1, 20, 2, k, generator=gen)
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "segment"), [("scan_real", 16), ("scan_complex", 20)])
def test_scan_in_segments(name, segment, nan_scratch, monkeypatch):
    from kernels.linear_scan import triton

    monkeypatch.setattr(triton, "BUSY", 0.25)
    monkeypatch.setattr(triton, "SEGMENT_LEAST", segment)
    case = CASES[name]
    for cu in (None, [0, 3, 3, 44, 50]):
        packed = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
        props.assert_agrees(case, props.draw(case, 50, cu=cu), "triton", torch.float32, **packed)


@pytest.mark.parametrize("name", ["gla_scalar", "gated_deltanet"])
def test_fused_walk(name, nan_scratch):
    check_fused(CASES[name])


# with a decay per channel it would spill and is never fused
FUSED = ("linear_attention", "retention", "deltanet", "normalized")


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_fused_walk_everywhere(name, nan_scratch):
    check_fused(CASES[name])


def check_fused(case):
    """One launch instead of two or three, the same numbers; packed, dense, and with nothing kept for a backward."""
    from kernels.common import triton_packed
    from kernels.common.triton import recording

    cu = torch.tensor(OFFSETS)
    inputs = {n: props.in_halo(x) for n, x in props.draw(case, OFFSETS[-1], "cos 0.5 slow", OFFSETS).items()}
    with triton_packed.fusing(True):
        props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16, cu_seqlens=cu)
    given = props.cast(props.draw(case, 21), torch.float32)
    with triton_packed.fusing(True), torch.no_grad():
        fused = case.op(**given, backend="triton", chunk=16)
        with recording() as launched:
            case.op(**given, backend="triton", chunk=16)
    assert len({one.kernel.name for one in launched}) == 1
    with triton_packed.fusing(False), torch.no_grad():
        split = case.op(**given, backend="triton", chunk=16)
    assert max(props.error(x, y) for x, y in zip(fused, split, strict=True)) < 1e-6


def test_fused_walk_is_chosen_where_it_fills_the_card(monkeypatch):
    from kernels.common import triton_packed
    from kernels.common.triton import recording

    def kernels_of(heads, width):
        x = torch.zeros(1, 16, heads, width)
        with recording() as launched, torch.no_grad():
            CASES["linear_attention"].op(x, x, x, backend="triton", chunk=16)
        return {one.kernel.name for one in launched}

    monkeypatch.setattr(triton_packed, "PROCESSORS", 8)
    assert kernels_of(8, 16) == {"walk_outputs"}
    assert kernels_of(7, 16) == {"walk_states", "chunk_outputs"}
    # two tiles of V are two programs, and a state too wide for the registers is never fused
    assert kernels_of(4, 64) == {"walk_outputs"}
    assert kernels_of(8, 160) == {"walk_states", "chunk_outputs"}


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(3, 33), (17, 20), (40, 70)])
def test_tiles_of_both_widths_of_ridge_memory(widths):
    case = TRITON["ridge"]
    inputs, (k, v) = first(case, props.draw(case, 20)), widths
    gen = torch.Generator().manual_seed(3)
    for key in ("q", "k"):
        inputs[key] = torch.nn.functional.normalize(torch.randn(1, 20, 2, k, generator=gen), dim=-1)
    inputs["v"] = torch.randn(1, 20, 2, v, generator=gen)
    root = torch.randn(1, 2, k, k, generator=gen)
    inputs["initial_state"] = torch.cat([root @ root.mT / k, torch.randn(1, 2, k, v, generator=gen)], dim=-1)
    props.assert_agrees(case, inputs, "triton", torch.float32, chunk=16)


def memory_layer(with_momentum, sizes, dtype):
    """A layer of a memory with all it is given, and the gradients of all of that, for fixed cotangents."""
    from kernels.neural_memory.chunked import Coefficients

    gen, (tokens, k, v) = torch.Generator().manual_seed(0), sizes
    shapes = [(tokens, k), (tokens, k), (tokens, v), (k, v), (k, v), (tokens, 1), (tokens, tokens), (tokens, 1), (1, 1)]
    leaves = [torch.randn(1, 2, *s, generator=gen).to(dtype).requires_grad_() for s in [*shapes, (tokens, 1)]]
    if not with_momentum:
        leaves = [x if i in (0, 1, 2, 3, 5, 6) else None for i, x in enumerate(leaves)]
    used = [x for x in leaves if x is not None]

    def run(layer):
        outs = [x for x in layer(*leaves[:5], Coefficients(*leaves[5:])) if x is not None]
        gen.manual_seed(1)
        return [*outs, *torch.autograd.grad(outs, used, [torch.randn(x.shape, generator=gen).to(x) for x in outs])]

    return run


@pytest.mark.parametrize("with_momentum", [False, True])
def test_memory_layer(with_momentum, nan_scratch):
    """Several tiles of both widths; the gradients of the coefficients, which no case checks one by one."""
    from kernels.neural_memory import chunked, triton_layer

    sizes = (3, 17, 33)
    found = memory_layer(with_momentum, sizes, torch.float32)(triton_layer.layer)
    truth = memory_layer(with_momentum, sizes, torch.float64)(chunked._layer)
    assert max(props.error(x, y) for x, y in zip(found, truth, strict=True)) < 1e-6


@pytest.mark.slow
def test_memory_layer_is_a_sound_op():
    from kernels.neural_memory import triton_layer

    given = [
        torch.randn(1, 1, *s, requires_grad=True) for s in ((2, 3), (2, 3), (2, 2), (3, 2), (3, 2), (2, 1), (2, 2))
    ]
    given += [torch.randn(1, 1, *s, requires_grad=True) for s in ((2, 1), (1, 1), (2, 1))]
    torch.library.opcheck(triton_layer._forward, (given,))


def test_large_chunk_of_the_model_on_small_chunks_of_the_kernels():
    """One chunk of the model over several of the kernels'."""
    from kernels.neural_memory import neural_memory

    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 1, 4, generator=gen) for _ in range(3))
    beta, g = torch.rand(1, 40, 1, generator=gen) / 20, -torch.rand(1, 40, 1, generator=gen) / 10
    runs = [neural_memory(q, k, v, beta, g, chunk=25, backend=b) for b in ("triton", "chunked")]
    assert props.error(runs[0][0], runs[1][0].double()) < 1e-6
    assert props.error(runs[0][1].start[0], runs[1][1].start[0].double()) < 1e-6

"""Weights, multiply-adds and bytes of state of mixers, their rules and cells, and MLPs, against written-out formulas.

Block words and formulas share the letters of the docstrings; a size gives each a number. A row has three formulas:

    weights  all of them
    maps     multiply-adds a token of linear layers and short convolutions
    memory   all other ones: matrix products with memories, keys and values, and between them; and products element by
             element at least half as large as a matrix memory (decay, outer product, step), where a complex one is 4

They are counted in one forward pass over T tokens in mode "recurrent", where every product of an equation is one of
torch: kernels and solvers are not looked into. Sums, quotients, activations, norms and vector states are left out.
"""

import math
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl.backbones._spec import build, build_mixer, parse_one, plugin_names
from cl.state import tensor_bytes
from kernels.ridge_memory.chunked import solve

ROWS = 2
# H is told from T, W - 1 and C - 1 by its number, where it says what is a memory
LETTERS = "DHGKVJRFNMCWPSELBT"
SIZES = [
    dict(zip(LETTERS, size, strict=True))
    for size in (
        (16, 4, 2, 4, 6, 3, 5, 12, 3, 4, 4, 3, 5, 2, 4, 3, 2, 8),
        (36, 3, 3, 8, 5, 4, 2, 30, 5, 3, 2, 6, 1, 3, 5, 2, 4, 6),
    )
]

RULES = {
    "linear": ("0", "0", "2*H*K*V"),
    "retnet": ("0", "0", "3*H*K*V"),
    "gla(rank=R)": ("D*R + R*H*K + H*K", "D*R + R*H*K", "3*H*K*V"),
    "mamba2": ("D*H + 3*H", "D*H", "3*H*K*V"),
    "mlstm": ("2*D*H + 2*H", "2*D*H", "3*H*K*V"),
    "delta": ("D*H", "D*H", "3*H*K*V"),
    "gated_delta": ("2*D*H + 2*H", "2*D*H", "4*H*K*V"),
    "kda(rank=R)": ("D*H + D*R + R*H*K + H + H*K", "D*H + D*R + R*H*K", "4*H*K*V"),
    "gateloop": ("2*D*H*K + H*K", "2*D*H*K", "7*H*K*V"),
    "longhorn": ("D*H + H + H*V", "D*H", "3*H*K*V"),
    "longhorn(diagonal=false)": ("D*H + H + H*V", "D*H", "4*H*K*V"),
}
"""Of linear_memory, besides its projections."""

# one matrix has D k weights in all heads, k = D / H, and two layers 2 E D k; a first layer is in three products (its
# answers to key and query, its gradient), a second one in four; then each decay and step multiplies all weights
NEURAL = {
    "ttt_linear(chunk=C)": ("D*k + H*(D + 1) + 2*D", "H*D", "(3 + 1)*D*k"),
    "ttt_mlp(chunk=C, expansion=E)": ("2*E*D*k + H*(D + 1) + 2*D", "H*D", "(3 + 4 + 2*1)*E*D*k"),
    "titans(chunk=C, depth=1)": ("D*k + 3*H*(D + 1)", "3*H*D", "(3 + 3)*D*k"),
    "titans(chunk=C, expansion=E)": ("2*E*D*k + 3*H*(D + 1)", "3*H*D", "(3 + 4 + 2*3)*E*D*k"),
    "yaad(chunk=C, expansion=E)": ("2*E*D*k + 3*H*(D + 1) + 2*D", "3*H*D", "(3 + 4 + 2*2)*E*D*k"),
    "memora(chunk=C, expansion=E)": ("2*E*D*k + 2*H*(D + 1) + 2*D", "2*H*D", "(3 + 4 + 2*2)*E*D*k"),
    # divided by their norm, those of the chunk's start as well
    "moneta(chunk=C, expansion=E)": ("2*E*D*k + 2*H*(D + 1) + 2*D", "2*H*D", "(3 + 4 + 2*4)*E*D*k"),
    # k (k + 3) / 2 features; W tokens are answered and have gradients; Newton-Schulz has 18 products of k x k matrices
    "atlas(chunk=C, window=W)": (
        "D*k*(k + 3)/2 + 4*H*(D + 1)",
        "4*H*D",
        "(2*W + 1 + 3 + 2*k)*D*k*(k + 3)/2 + 18*D*k*k",
    ),
    "tnt(chunk=C, local_chunks=[2, S], shards=[W, W], depth=1)": ("3*D*k + 3*H*(D + 1)", "3*H*D", "3*(3 + 3)*D*k"),
}
"""Of neural_memory, besides its projections."""

SCANS = {
    "mingru": ("2*D*F + 2*F", "2*D*F", "0"),
    "minlstm": ("3*D*F + 3*F", "3*D*F", "0"),
    "lru(num_states=N)": ("2*D*N + 2*N*F + D*F + 3*N", "2*D*N + 2*N*F + D*F", "0"),
    "s5(num_states=N)": ("2*D*N + 2*N*F + D*F + 3*N", "2*D*N + 2*N*F + D*F", "0"),
    "hippo(order=N, num_channels=C)": ("D*C + C + C*N*F + F", "D*C + C*N*F", "C*N*N"),
    "gateloop": ("5*D*F + F", "5*D*F", "0"),
    "ffm(num_traces=M, num_contexts=C)": (
        "2*D*M + 2*M + M + C + 2*M*C*F + F + 2*F + 2*D*F + 2*F",
        "2*D*M + 2*M*C*F + 2*D*F",
        "0",
    ),
    "leaky": ("D*F + 2*F", "D*F", "0"),
}
CELLS = {
    "gru": ("3*D*F + 3*F + 3*F", "3*D*F", "0"),
    "lstm": ("3*D*F + 3*F + 3*F + 2*F + F", "3*D*F", "0"),
    "slstm": ("4*D*F + 4*F + 4*F*F/H + F", "4*D*F", "4*F*F/H"),
    "m2rnn(key_width=K)": (
        "2*D*H*K + D*F + D*H + H + F*F/H",
        "2*D*H*K + D*F + D*H",
        "K*F*F/H + K*F + 3*K*F",
    ),
    "lem": ("4*D*F + 4*F + 4*F*F", "4*D*F + 4*F*F", "0"),
    "bilinear(block=N)": ("D*F*N + F*N + F", "D*F*N", "F*N"),
    "leaky_tau": ("D*F + 2*F + F*F", "D*F", "F*F"),
}
"""Of scan_rnn and nonlinear_rnn, besides gate and output."""

# a window of W tokens is seen whole from the W-th token on
SEEN, BLOCK = "(W - W*(W - 1)/(2*T))", "(C - C*(C - 1)/(2*T))"
# cached memories of a token, on average
CACHED = "(T/S - 1)/2"
GLA = ("5*D*D + 3*J*D + D/H + D*R + R*D + D", "5*D*D + 3*J*D + D*R + R*D", "3*D*k")
INNER = "linear_memory(rule=gla(rank=R), conv=J)"

MIXERS = {
    "attention(num_kv_heads=G)": ("2*D*D*(1 + G/H)", "2*D*D*(1 + G/H)", "D*(T + 1)"),
    "attention(window=W)": ("4*D*D", "4*D*D", f"2*D*{SEEN}"),
    "landmark(block=S)": ("4*D*D", "4*D*D", "D*(T + 1)"),
    "linear_memory(rule=delta, conv=0, gate=false)": ("4*D*D + D*H + k", "4*D*D + D*H", "3*D*k"),
    # decay, outer product and lambda I, then the answer; the solve is counted below
    "ridge_memory(head=K, conv=J)": (
        "5*D*H*K + 3*J*H*K + 3*D*H + 3*H + K",
        "5*D*H*K + 3*J*H*K + 3*D*H",
        "(2 + 2 + 1 + 1)*H*K*K",
    ),
    "ridge_memory(head=K, conv=0, forget=false, mix=false, gate=false)": (
        "4*D*H*K + D*H + K",
        "4*D*H*K + D*H",
        "(2 + 2 + 1 + 1)*H*K*K",
    ),
    "neural_memory(rule=titans(chunk=C, depth=1), layout=mac, conv=J, num_persistent=P)": (
        "8*D*D + 3*J*D + D*k + 3*H*(D + 1) + k + 2*P*D",
        "11*D*D + 3*J*D + 3*H*D",
        f"(1 + 3 + 3)*D*k + 2*D*(P + 2*{BLOCK})",
    ),
    "neural_memory(rule=titans(chunk=C, depth=1), layout=mag, conv=J, num_persistent=P, window=W)": (
        "7*D*D + 3*J*D + D*k + 3*H*(D + 1) + k + 2*P*D + D",
        "7*D*D + 3*J*D + 3*H*D",
        f"(3 + 3)*D*k + 2*D*(P + {SEEN})",
    ),
    "neural_memory(rule=titans(chunk=C, depth=1), layout=mal, conv=J, num_persistent=P, window=W)": (
        "7*D*D + 3*J*D + D*k + 3*H*(D + 1) + k + 2*P*D",
        "7*D*D + 3*J*D + 3*H*D",
        f"(3 + 3)*D*k + 2*D*(P + {SEEN})",
    ),
    # a rule's own answer is left unused
    f"memory_cache({INNER}, segment=S, read=residual)": (*GLA[:2], f"3*D*k + (1 + {CACHED})*D*k"),
    f"memory_cache({INNER}, segment=S, route_width=W)": (
        f"{GLA[0]} + 2*D*H*W",
        f"{GLA[1]} + 2*D*H*W",
        f"3*D*k + (1 + {CACHED})*D*k + {CACHED}*H*W",
    ),
    f"memory_cache({INNER}, segment=S, read=soup, route_width=W)": (
        f"{GLA[0]} + 2*D*H*W",
        f"{GLA[1]} + 2*D*H*W",
        f"3*D*k + (1 + {CACHED})*D*k + D*k + {CACHED}*H*W",
    ),
    f"mixture_of_memories({INNER}, num_memories=E, top=2, shared=true)": (
        f"{GLA[0]} + D*E + E*(2*D*D + 2*J*D + 2*D*R + D)",
        f"{GLA[1]} + D*E + E*(2*D*D + 2*J*D + 2*D*R)",
        "3*3*D*k",
    ),
    f"mixture_of_memories({INNER}, num_memories=E, top=1, separate=false)": (
        f"{GLA[0]} + D*E",
        f"{GLA[1]} + D*E",
        "3*D*k",
    ),
    # keys and values are computed twice where a token leaves the window in a later call
    "hippocampus(window=W, rule=gated_delta)": (
        "6*D*D + 2*D*H + 2*H + k",
        "8*D*D + 2*D*H",
        f"2*D*{SEEN} + 4*D*k",
    ),
    "hierarchical_ffn_memory(hidden=F, levels=L, branches=B, block=S)": (
        "3*D*F*(B**L - 1)/(B - 1)",
        "3*D*F*(L - (L - 1)*S/T)",
        "D*((B**L - 1)/(B - 1) - 1)",
    ),
    "self_modifying": ("4*D*D + D*(3*k + 2) + k", "4*D*D", "4*D*(3*k + 2) + D*k"),
    "trc2_v1(chunk=C, columns=M, top=2, state=N, taps=J, lateral=L, slots=S, rank=R)": (
        "5*D*D + J*D + D*D/4 + M*D/4 + 2*D + 2 + D*M*(3*N + 2) + M*N + J*M*N + M*N*D + L*D + S*D + D + 2*R*D",
        "5*D*D + D*M*(3*N + 2) + M*N*D + 2*R*D + (D*D/4 + 2*D)*(T/C + 1)/T",
        "2*S*D + M*D/4*(T/C + 1)/T",
    ),
}
MIXERS |= {
    f"linear_memory(rule={rule}, key_width=K, value_width=V, conv=J)": (
        f"D*H*(2*K + 3*V) + J*H*(2*K + V) + V + {weights}",
        f"D*H*(2*K + 3*V) + J*H*(2*K + V) + {maps}",
        memory,
    )
    for rule, (weights, maps, memory) in RULES.items()
}
MIXERS |= {
    f"neural_memory(rule={rule}, conv=J)": (f"5*D*D + 3*J*D + k + {weights}", f"5*D*D + 3*J*D + {maps}", memory)
    for rule, (weights, maps, memory) in NEURAL.items()
}
MIXERS |= {
    f"{mixer}(cell={cell}, units=F)": (f"2*D*F + {weights}", f"2*D*F + {maps}", memory)
    for mixer, cells in (("scan_rnn", SCANS), ("nonlinear_rnn", CELLS))
    for cell, (weights, maps, memory) in cells.items()
}
MLPS = {
    "swiglu(hidden=F)": ("3*D*F", "3*D*F", "0"),
    "moe(hidden=F, experts=E, top=2, shared=L)": ("3*(E + L)*D*F + D*E", "3*(2 + L)*D*F + D*E", "0"),
    "cms(hidden=F, levels=L)": ("3*L*D*F + (L - 1)*D", "3*L*D*F", "0"),
}
IN_ONE_CALL = ("mixture_of_memories", "trc2_v1")
"""Token by token these do more: all memories read every token, and a chunk's route is found at each of its tokens."""


def numbers(text, size):
    """Block words with numbers in the place of letters."""
    return re.sub(r"\b[A-Z]\b", lambda letter: str(size[letter[0]]), text)


def value(formula, size):
    return eval(formula, {}, size | {"k": size["D"] // size["H"]})


def matrices(state, heads):
    """Numbers in each memory (..., H, in, out)."""
    if not isinstance(state, dict):
        return [state.numel()] if is_matrix(state, heads) else []
    return [found for each in state.values() for found in matrices(each, heads)]


def is_matrix(x, heads):
    return x.dim() >= 4 and x.shape[-3] == heads and x.numel() > 0


def counted(part, x_BTD, heads, **how):
    """Multiply-adds a token in linear layers and convolutions, and in everything else."""
    part.requires_grad_(False)  # the counter has no place for what is differentiated inside
    # a memory of complex numbers is kept as two, and packed documents of a row are written apart
    least = min(matrices(part.init_state(len(x_BTD)), heads), default=math.inf) / 2 if how else math.inf

    def by_element(a, b, *_, out_val=None, **__):
        # a product with a number is a scale, which no equation has
        if not isinstance(b, torch.Tensor) or not is_matrix(out_val, heads):
            return 0
        kinds = [1 + each.is_complex() for each in (a, b)]
        return 2 * math.prod(kinds) * out_val.numel() if max(kinds) * out_val.numel() >= least else 0

    by_element._get_raw = True
    mapping = dict.fromkeys((torch.ops.aten.mul, torch.ops.aten.lerp), by_element)
    # attention as two matrix products, since the fused operation of the processor is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        part(x_BTD, **how)
    found = counter.get_flop_counts()
    linear = [name for name, each in part.named_modules() if isinstance(each, torch.nn.Linear)]
    maps = sum(sum(found[f"{type(part).__name__}.{name}"].values()) for name in linear)
    maps += found["Global"].get(torch.ops.aten.convolution, 0)
    tokens = 2 * x_BTD.shape[0] * x_BTD.shape[1]
    return maps / tokens, (counter.get_total_flops() - maps) / tokens


@pytest.mark.parametrize("size", SIZES, ids=["small", "large"])
@pytest.mark.parametrize("words", [*MIXERS, *MLPS])
def test_weights_and_multiply_adds_are_the_formulas(words, size, monkeypatch):
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    torch.manual_seed(0)
    spec, how = parse_one(numbers(words, size), "words"), {}
    if words in MLPS:
        part = build(spec, "mlps", "words", size["D"])
    else:
        part = build(spec, "mixers", "words", size["D"], num_heads=size["H"])
        how = {"mode": "chunk" if spec.name in IN_ONE_CALL else "recurrent"}
    weights, *products = (value(formula, size) for formula in (MIXERS | MLPS)[words])
    assert sum(p.numel() for p in part.parameters()) == weights
    x = torch.randn(ROWS, size["T"], size["D"])
    assert counted(part.eval(), x, size["H"], **how) == pytest.approx(tuple(products))


@pytest.mark.parametrize("folder", ["mixers", "memory_rules", "neural_rules", "scan_cells", "rnn_cells", "mlps"])
def test_everything_that_is_registered_has_a_row(folder):
    assert not set(plugin_names(folder)) - set(re.findall(r"\w+", " ".join([*MIXERS, *MLPS])))


@pytest.mark.parametrize(("k", "c", "heads", "length", "steps"), [(4, 2, 2, 8, 3), (7, 4, 3, 12, 8)])
def test_a_chebyshev_step_is_the_formula(k, c, heads, length, steps):
    """K^2 + 2 C K multiply-adds a token and head, C tokens a chunk, for each step but the first, which only divides."""
    rhs, keys, states = torch.randn(1, length, heads, k), torch.randn(1, length, heads, k), torch.eye(k)
    norm, states = torch.ones(1, length, heads), states.repeat(length // c, heads, 1, 1)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        solve(rhs, keys, None, None, norm, states, None, 0.1, 1e-6, steps, c, fast=False)
    assert counter.get_total_flops() == 2 * length * heads * (steps - 1) * (k * k + 2 * c * k)


@pytest.mark.parametrize("size", SIZES, ids=["small", "large"])
@pytest.mark.parametrize(
    ("words", "formula"),
    [
        ("linear_memory(rule=delta, key_width=K, value_width=V, conv=J)", "H*K*V + (J - 1)*H*(2*K + V)"),
        ("linear_memory(rule=delta, key_width=K, value_width=V, conv=0)", "H*K*V"),
        ("ridge_memory(head=K, conv=J)", "2*H*K*K + 3*(J - 1)*H*K"),
    ],
)
def test_bytes_of_the_state_are_the_formula(words, formula, size):
    layer = build_mixer(numbers(words, size), size["D"], num_heads=size["H"])
    _, state = layer(torch.randn(ROWS, size["T"], size["D"]))
    kept = {name: each for name, each in state.items() if name != "position"}
    assert tensor_bytes(kept) == 4 * ROWS * value(formula, size)


def test_attention_operations_are_the_formula():
    """2 D^2 (1 + G / H) for the projections and 2 S D for scores and sums; a window sees 2 W keys."""
    width, heads, groups, length = 32, 4, 2, 64
    for words, seen in (("attention(num_kv_heads=2)", length), ("attention(num_kv_heads=2, window=8)", 16)):
        layer = build_mixer(words, width, num_heads=heads)
        # as two matrix products, since the fused operation of the processor is not counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            layer(torch.randn(1, length, width))
        operations = 2 * length * (2 * width**2 * (1 + groups / heads) + 2 * seen * width)
        assert counter.get_total_flops() == pytest.approx(operations)


def test_a_window_bounds_the_state():
    layer, state = build_mixer("attention(window=8)", 32, num_heads=4), None
    for _ in range(5):
        _, state = layer(torch.randn(1, 20, 32), state)
    assert state["key"].shape[2] == 7
    assert int(state["position"]) == 100


@pytest.mark.parametrize("words", ["attention(window=8)", "linear_memory", "linear_memory(rule=mlstm)", "ridge_memory"])
def test_no_text_makes_the_state_larger(words):
    layer = build_mixer(words, 32, num_heads=4)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 16, 32))
        early = tensor_bytes(state)
        _, state = layer(torch.randn(1, 2000, 32), state)
    assert tensor_bytes(state) == early
    _, state = build_mixer("attention", 32, num_heads=4)(torch.randn(1, 16, 32))
    assert tensor_bytes(state["key"], state["value"]) == 4 * 2 * 16 * 32, "attention keeps every key and value"

"""Cached and routed memories against reads written out here, and the identities between the variants."""

import kernel_properties as props
import pytest
import torch
from memory_cases import HEADS, ROUTE, K, V, tokens

from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention
from kernels.memory_cache import logarithmic_segments, memory_cache, routed_memory


def drawn(length=26, batch=2):
    gen = torch.Generator().manual_seed(0)
    inputs = tokens(gen, batch, length, "cos 0.5")
    routes = [torch.randn(batch, length, HEADS, ROUTE, generator=gen, dtype=torch.float64) for _ in range(2)]
    return inputs, {"route_q": routes[0], "route_k": routes[1]}


def states_at(inputs, ends, restart):
    """States of the gated delta rule at the given tokens, each by a run of its own from the segment's start."""
    found = []
    for begin, end in zip([0, *ends], ends, strict=False):
        cut = slice(begin if restart else 0, end)
        found.append(delta_rule(**{n: x[:, cut] for n, x in inputs.items()}, backend="reference")[1])
    return found


@pytest.mark.parametrize("variant", ["residual", "gated", "soup", "sparse"])
@pytest.mark.parametrize("write", ["carry", "restart"])
def test_reads_written_out(variant, write):
    """Every token: states from runs of their own, weights from means taken by hand."""
    inputs, routes = drawn(17, batch=1)
    length, segment = 17, 4
    outs = []
    for t in range(length):
        closed = list(range(segment, t + 1, segment))
        begin = closed[-1] if closed else 0
        states = states_at(inputs, [*closed, t + 1], write == "restart")
        means = [routes["route_k"][:, a:b].mean(1) for a, b in zip([0, *closed], [*closed, t + 1], strict=True)]
        assert begin <= t
        scores = torch.stack([(routes["route_q"][:, t] * m).sum(-1) for m in means], -1)
        if variant == "sparse":
            for cell in scores.view(-1, len(means)):
                worst = cell[:-1].argsort(descending=True)[2:]
                cell[worst] = -torch.inf
        weights = torch.ones_like(scores) if variant == "residual" else scores.softmax(-1)
        query = inputs["q"][:, t] * K**-0.5
        outs.append(sum(weights[..., i, None] * torch.einsum("bhk,bhkv->bhv", query, s) for i, s in enumerate(states)))
    truth = torch.stack(outs, 1)
    given = {} if variant == "residual" else routes
    for backend in ("chunked", "reference"):
        found, state = memory_cache(
            **inputs, **given, segment=segment, variant=variant, write=write, top_k=2, backend=backend
        )
        assert props.error(found, truth) < 1e-12
        assert state.cached.shape[1] == 4
        assert state.position == 1


def test_soup_is_gated_where_memories_are_linear():
    inputs, routes = drawn()
    runs = [memory_cache(**inputs, **routes, segment=5, variant=v)[0] for v in ("gated", "soup")]
    assert props.error(*runs) < 1e-12
    assert props.error(memory_cache(**inputs, **routes, segment=5, variant="sparse", top_k=1)[0], runs[0]) > 1e-2
    everything = memory_cache(**inputs, **routes, segment=5, variant="sparse", top_k=99)[0]
    assert props.error(everything, runs[0]) < 1e-12


def test_a_segment_that_never_ends_is_the_memory_itself():
    inputs, routes = drawn()
    truth, state = delta_rule(**inputs)
    for variant in ("residual", "gated", "soup", "sparse"):
        found, end = memory_cache(**inputs, segment=99, variant=variant, **({} if variant == "residual" else routes))
        assert props.error(found, truth) < 1e-12
        assert props.error(end.current, state) < 1e-12
        assert end.cached.shape[1] == 0


def test_segments_of_one_token_are_attention():
    """Restarted linear memories of one token are k v^T: the gated read is softmax-weighted linear attention."""
    inputs, routes = drawn(9)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    scores = torch.einsum("bthr,bshr->bhts", routes["route_q"], routes["route_k"])
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1) * torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    found, _ = memory_cache(q, k, v, segment=1, write="restart", **routes)
    assert props.error(found, torch.einsum("bhts,bshv->bthv", weights, v)) < 1e-12


def test_logarithmic_segments():
    inputs, routes = drawn(13)
    lengths = logarithmic_segments(13)
    assert lengths == [8, 4, 1]
    found, state = memory_cache(**inputs, **routes, segment=lengths)
    truth, _ = memory_cache(**inputs, **routes, segment=lengths, backend="reference")
    assert props.error(found, truth) < 1e-12
    assert state.cached.shape[1] == 3
    assert state.position == 0
    head, _ = memory_cache(**{n: x[:, :8] for n, x in {**inputs, **routes}.items()}, segment=8)
    assert props.error(found[:, :8], head) < 1e-12


@pytest.mark.parametrize("delta", [False, True])
def test_one_memory_is_the_memory_itself(delta):
    inputs, _ = drawn()
    router = torch.randn(2, 26, 1, dtype=torch.float64)
    if not delta:
        del inputs["beta"]
    truth = (delta_rule if delta else gated_linear_attention)(**inputs)
    found = routed_memory(**inputs, router=router, top_k=1)
    assert props.error(found[0], truth[0]) < 1e-12
    assert props.error(found[1][:, 0], truth[1]) < 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_routing_is_masking(shared):
    """A token that is not routed to a memory has no key, value or decay there."""
    inputs, _ = drawn()
    q, k, v, beta, g = inputs.values()
    router = torch.randn(2, 26, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = router.argsort(dim=-1, descending=True)[..., :2]
    weights = torch.zeros_like(router).scatter(-1, order, router.gather(-1, order).softmax(-1))
    truth = 0
    for e in range(4 + shared):
        weight = weights[..., e] if e < 4 else torch.ones_like(weights[..., 0])
        on = (weight > 0)[..., None].double()
        o, _ = delta_rule(q, k * on[..., None], v * on[..., None], beta, g * on, backend="reference")
        truth = truth + weight[..., None, None] * o
    for backend in ("chunked", "reference"):
        found, state = routed_memory(q, k, v, router, beta, g, top_k=2, shared=shared, backend=backend)
        assert props.error(found, truth) < 1e-12
        assert state.shape == (2, 4 + shared, HEADS, K, V)


def test_constant_gate_of_a_head():
    inputs, routes = drawn(11)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    constant = torch.tensor([-0.1, -0.5], dtype=torch.float64)
    long = constant.expand(2, 11, 2)
    runs = [
        memory_cache(q, k, v, g=g, segment=4, write=w, **routes)[0]
        for g in (constant, long)
        for w in ("carry", "restart")
    ]
    assert props.error(runs[0], runs[2]) < 1e-12
    assert props.error(runs[1], runs[3]) < 1e-12
    router = torch.randn(2, 11, 3, dtype=torch.float64)
    for backend in ("chunked", "reference"):
        short, _ = routed_memory(q, k, v, router, g=constant, backend=backend)
        assert props.error(short, routed_memory(q, k, v, router, g=long)[0]) < 1e-12

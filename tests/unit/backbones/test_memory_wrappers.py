"""Memories that are cached, mixed, or fed by a window: each written out again from the memory that it wraps."""

import pytest
import torch

from cl.backbones._spec import build_mixer
from cl.core import UserError

WIDTH, HEADS = 8, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made(words):
    return build_mixer(words, WIDTH, num_heads=HEADS).double()


def twin(words, other):
    """The same weights behind other words."""
    mixer = made(words)
    mixer.load_state_dict(other.state_dict())
    return mixer


def tokens(length=11, rows=2):
    return torch.randn(rows, length, WIDTH, dtype=torch.float64)


# memory_cache


def cached(inner, **options):
    return f"memory_cache({inner}, segment=4, {', '.join(f'{k}={v}' for k, v in options.items())})"


@pytest.mark.parametrize("rule", ["linear(normaliser=false)", "delta", "gated_delta", "kda"])
@pytest.mark.parametrize("keep", ["carry", "restart"])
@pytest.mark.parametrize("read", ["residual", "gated", "sparse"])
def test_cached_matrices_written_out(rule, keep, read):
    inner = f"linear_memory(rule={rule})"
    mixer, x = made(cached(inner, read=read, keep=keep, top=1)), tokens(11, 1)
    layer = mixer.inner
    given, _ = layer.tokens(x, layer.init_state(1), None)
    memory, fresh = layer.init_state(1)["memory"], layer.init_state(1)["memory"]
    kept, means, outs = [], [], []
    for t in range(11):
        gates = {name: g[:, t] for name, g in given.items() if name not in "qkv"}
        own, memory = layer.rule.step(memory, given["q"][:, t], given["k"][:, t], given["v"][:, t], gates)
        reads = [torch.einsum("bhk,bhkv->bhv", given["q"][:, t], m) for m in kept]
        if read == "residual":
            outs.append(own + sum(reads))
        else:
            q = mixer.route_query(x[:, t]).view(1, HEADS, -1)
            begin = t - t % 4
            mean = mixer.route_key(x[:, begin : t + 1]).mean(1).view(1, HEADS, -1)
            scores = [(q * m).sum(-1) for m in (*means, mean)]
            if read == "sparse" and len(kept) > 1:
                best = torch.stack(scores[:-1]).argmax(0)
                scores[:-1] = [torch.where(best == i, s, -torch.inf) for i, s in enumerate(scores[:-1])]
            weights = torch.softmax(torch.stack(scores), 0)
            outs.append(sum(w[..., None] * r for w, r in zip(weights, (*reads, own), strict=True)))
        if t % 4 == 3:
            kept.append(memory["matrix"])
            means.append(
                mixer.route_key(x[:, t - 3 : t + 1]).mean(1).view(1, HEADS, -1) if read != "residual" else None
            )
            memory = fresh if keep == "restart" else memory
    expected = layer.finish(torch.stack(outs, 1), x)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-10, rtol=1e-10)


LINEAR = ("linear_memory(rule=gated_delta)", "neural_memory(rule=titans(chunk=2, depth=1))")
DEEP = ("neural_memory(rule=titans(chunk=2, expansion=2))", "neural_memory(rule=ttt_linear(chunk=2))")


@pytest.mark.parametrize("inner", [*LINEAR, *DEEP])
def test_soup_is_gated_for_memories_that_are_matrices_and_for_no_others(inner):
    """The project's check: 4e-16 for a linear memory."""
    gated, x = made(cached(inner, read="gated")), tokens()
    soup = twin(cached(inner, read="soup"), gated)
    difference = (gated(x)[0] - soup(x)[0]).abs().max()
    assert difference < 1e-14 if inner in LINEAR else difference > 1e-6


@pytest.mark.parametrize("read", ["residual", "gated", "soup", "sparse"])
@pytest.mark.parametrize("inner", [LINEAR[0], DEEP[0]])
def test_within_its_first_segment_a_cache_is_the_memory_alone(inner, read):
    mixer, x = made(cached(inner, read=read)), tokens(4)
    torch.testing.assert_close(mixer(x)[0], mixer.inner(x)[0])
    assert (mixer(tokens())[0][:, 4:] - mixer.inner(tokens())[0][:, 4:]).abs().max() > 1e-6


def test_a_deep_cache_is_read_segment_by_segment():
    """residual, restart: what each segment's own memory says, the finished ones at their ends."""
    inner = "neural_memory(rule=titans(chunk=2, expansion=2), conv=0)"
    mixer, x = made(cached(inner, read="residual", keep="restart")), tokens(8, 1)
    branch = mixer.inner.memory
    given, _ = branch.tokens(x, branch.init_state(1), None)
    parts = [{name: g[:, s] for name, g in given.items()} for s in (slice(0, 4), slice(4, 8))]
    found = []
    for part in parts:
        gates = {name: g for name, g in part.items() if name not in "qkv"}
        found.append(
            branch.rule.run(branch.rule.init_state(1), part["q"], part["k"], part["v"], gates, None, "recurrent")
        )
    second = found[1][0] + branch.rule.ask(found[0][1]["weights"], parts[1]["q"])
    expected = mixer.inner.finish(branch.finish(torch.cat((found[0][0], second), 1), x), x)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("read", ["gated", "soup"])
def test_a_deep_cache_is_weighed_by_its_segments_means(read):
    """carry: the second segment asks the running memory and what it was at the end of the first, or their average."""
    inner = "neural_memory(rule=titans(chunk=2, expansion=2), conv=0)"
    mixer, x = made(cached(inner, read=read)), tokens(8, 1)
    branch = mixer.inner.memory
    given, _ = branch.tokens(x, branch.init_state(1), None)
    memory, first, answers = branch.rule.init_state(1), {}, []
    for t in range(8):
        at = {name: g[:, t : t + 1] for name, g in given.items()}
        q, k, v = (at.pop(name) for name in "qkv")
        own, memory = branch.rule.run(memory, q, k, v, at, None, "recurrent")
        first = memory["weights"] if t == 3 else first
        if t > 3:
            route = mixer.route_query(x[0, t]).view(HEADS, -1)
            means = [mixer.route_key(x[0, a : b + 1]).mean(0).view(HEADS, -1) for a, b in ((0, 3), (4, t))]
            old, new = torch.softmax(torch.stack([(route * m).sum(-1) for m in means]), 0)
            old, new = old.view(-1, 1, 1), new.view(-1, 1, 1)
            if read == "soup":
                own = branch.rule.ask({n: old * first[n] + new * w for n, w in memory["weights"].items()}, q)
            else:
                own = old[:, 0] * branch.rule.ask(first, q) + new[:, 0] * own
        answers.append(own)
    expected = mixer.inner.finish(branch.finish(torch.cat(answers, 1), x), x)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("inner", [LINEAR[0], DEEP[0]])
def test_caches_belong_to_their_document(inner):
    """Rows whose documents began at different times hold caches of different number."""
    mixer, x, reset = made(cached(inner, read="gated")), tokens(11), torch.zeros(2, 11, dtype=torch.bool)
    reset[1, 6] = True
    _, state = mixer(x, reset=reset)
    assert state["cache"]["count"].tolist() == [2, 1]
    assert state["cache"]["place"].tolist() == [3, 1]
    later, (after, alone) = tokens(5), (state, mixer(x[1:, 6:])[1])
    torch.testing.assert_close(mixer(later, after)[0][1:], mixer(later[1:], alone)[0])


# mixture_of_memories


def test_one_memory_is_the_memory_alone():
    for rule in ("gated_delta", "mamba2", "gla"):
        mixer = made(f"mixture_of_memories(linear_memory(rule={rule}), num_memories=1, top=1)").eval()
        x = tokens()
        torch.testing.assert_close(mixer(x)[0], mixer.first(x)[0], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("shared", [False, True])
def test_every_memory_reads_only_its_own_tokens(shared):
    words = f"mixture_of_memories(linear_memory(rule=gated_delta), num_memories=3, top=2, shared={str(shared).lower()})"
    mixer, x = made(words).eval(), tokens(9, 1)
    p = mixer.router(x[0]).softmax(-1)
    first, _ = mixer.first.tokens(x, mixer.first.init_state(1), None)
    state, outs = mixer.init_state(1), [torch.zeros(HEADS, 4, dtype=torch.float64) for _ in range(9)]
    for slot in range(3 + shared):
        own = first
        if slot:
            other = mixer.others[slot - 1]
            own = {"q": first["q"], **other(x, state["tail"][str(slot)], None, 0)[0]}
        rule, memory = (mixer.first if slot == 0 else other).rule, state["memories"][str(slot)]
        for t in range(9):
            best = p[t].argsort(descending=True)[:2].tolist()
            if slot == 3 or slot in best:
                gates = {name: g[:, t] for name, g in own.items() if name not in "qkv"}
                o, memory = rule.step(memory, own["q"][:, t], own["k"][:, t], own["v"][:, t], gates)
                outs[t] = outs[t] + (1.0 if slot == 3 else p[t, slot] / p[t, best].sum()) * o[0]
    expected = mixer.first.finish(torch.stack(outs).unsqueeze(0), x)
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-10, rtol=1e-10)


def test_the_balance_term_counts():
    mixer = made("mixture_of_memories(linear_memory, num_memories=4, top=2, balance=0.5)")
    x = torch.ones(3, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        mixer.router.weight.zero_()
    # alike: E sum f P = 4 * 2 * (1/2 * 1/4) = 1
    assert mixer(x)[1]["auxiliary"]["balance"].item() == pytest.approx(0.5)
    # memory 1 has nearly all of the probability and half of the choices: 4 * 1/2
    with torch.no_grad():
        mixer.router.weight[1], mixer.router.weight[2] = 100.0, 50.0
    assert mixer(x)[1]["auxiliary"]["balance"].item() == pytest.approx(0.5 * 2)
    assert "auxiliary" not in mixer.eval()(x)[1]


def test_balancing_spreads_the_tokens():
    """Training on the term alone moves a router that sends all tokens to one memory."""
    mixer, x = made("mixture_of_memories(linear_memory, num_memories=4, top=1, balance=1)"), tokens(64, 4)
    x = x + 2 * mixer.router.weight[0].detach()
    with torch.no_grad():
        mixer.router.weight[0] *= 4
    optimizer, terms = torch.optim.Adam(mixer.router.parameters(), lr=0.02), []
    for _ in range(60):
        terms.append(mixer(x)[1]["auxiliary"]["balance"])
        optimizer.zero_grad()
        terms[-1].backward()
        optimizer.step()
    assert terms[0] > 1.5
    assert terms[-1] < 1.1


# hippocampus


def test_a_document_that_fits_the_window_is_read_by_attention_alone():
    mixer, x = made("hippocampus(window=6)"), tokens(6)
    torch.testing.assert_close(mixer(x)[0], mixer.attention(x)[0], atol=1e-14, rtol=1e-14)
    assert (mixer(tokens(7))[0] - mixer.attention(tokens(7))[0])[:, 6].abs().max() > 1e-6


@pytest.mark.parametrize("rule", ["gated_delta", "linear", "mamba2"])
def test_the_memory_holds_what_has_left_the_window(rule):
    mixer, x = made(f"hippocampus(window=3, rule={rule})"), tokens(9, 1)
    attention, heads = mixer.attention, (1, HEADS, WIDTH // HEADS)
    memory, outs = mixer._fresh_memory(1), []
    for t in range(9):
        answer = torch.zeros(heads, dtype=torch.float64)
        if t >= 3:
            left = x[:, t - 3 : t - 2]
            q, k, v = attention.query(x[:, t]), attention.key(left), attention.value(left)
            q, k = mixer.rule.prepare(q.view(1, *heads), k.view(1, *heads), t)
            gates = {name: g[:, 0] for name, g in mixer.rule.gates(left).items()}
            o, memory = mixer.rule.step(memory, q[:, 0], k[:, 0], v.view(heads), gates)
            answer = mixer.norm(o)
        outs.append(answer.flatten(1) * torch.nn.functional.silu(mixer.gate(x[:, t])))
    expected = attention(x)[0] + mixer.out(torch.stack(outs, 1))
    y, state = mixer(x)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state["memory"], memory)


def test_what_cannot_be_wrapped_is_refused():
    for words, message in (
        ("memory_cache(attention)", "it got a Attention"),
        ("memory_cache(linear_memory(rule=mlstm))", "it got mlstm"),
        ("memory_cache(linear_memory(rule=linear))", "normaliser=false"),
        ("memory_cache(neural_memory(layout=mag))", "plain neural_memory"),
        ("memory_cache(linear_memory, read=mean)", "residual, gated, soup, sparse"),
        ("memory_cache(linear_memory, keep=all)", "carry, restart"),
        ("mixture_of_memories(attention)", "wraps a linear_memory; it got a Attention"),
        ("mixture_of_memories(linear_memory, top=5)", "top of mixture_of_memories is 5"),
        ("hippocampus(window=0)", "window of attention is 0"),
    ):
        with pytest.raises(UserError, match=message):
            made(words)

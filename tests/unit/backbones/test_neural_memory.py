"""Memories that train themselves: their published equations written out again, layouts attended by hand, and limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from cl.backbones._spec import build, build_mixer, parse_one
from cl.backbones.neural_rules._parts import monomials, orthogonal
from cl.core import UserError

HEADS, WIDTH = 2, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made(words, num_heads=HEADS, head_width=WIDTH):
    shape = {"num_heads": num_heads, "head_width": head_width}
    return build(parse_one(words, "rule"), "neural_rules", "rule", 8, **shape).double()


def stream(num_tokens=7, heads=HEADS, width=WIDTH):
    q, k, v = (torch.randn(1, num_tokens, heads, width, dtype=torch.float64) for _ in range(3))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def gates_of(rule, num_tokens, heads=HEADS):
    """Random ones, for every name that the rule reads."""
    x = torch.randn(1, num_tokens, 8, dtype=torch.float64)
    return {name: gate.detach() for name, gate in rule.gates(x).items()}


def norm(h):
    centred = h - h.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-6)


def answer(weights, x, is_normed):
    """One token, one head, layer by layer."""
    h = x
    for layer, w in enumerate(weights):
        h = (0.5 * h * (1 + torch.erf(h / math.sqrt(2))) if layer else h) @ w
    return x + norm(h) if is_normed else h


def slopes(weights, loss):
    weights = [w.detach().requires_grad_() for w in weights]
    return torch.autograd.grad(loss(weights), weights)


def written_out(rule, q, k, v, gates, update, chunk):
    """Every head by itself; `update(weights now, gradient, head, t, memo)` is the published write."""
    heads = []
    for head in range(q.shape[2]):
        now, start, memo, outs = [w[head].detach() for w in rule.start], None, {}, []
        now = [update.link(w) for w in now] if hasattr(update, "link") else now
        for t in range(q.shape[1]):
            start = now if t % chunk == 0 else start
            gradient = slopes(start, lambda w, h=head, t=t: update.loss(w, h, t))
            now = update(now, gradient, head, t, memo)
            outs.append(answer(now, q[0, t, head], rule.is_normed))
        heads.append(torch.stack(outs))
    return torch.stack(heads, 1).unsqueeze(0)


class Update:
    """A published write on its token stream; subclasses say `loss` and call."""

    def __init__(self, rule, k, v, gates):
        self.rule, self.k, self.v = rule, k[0], v[0]
        self.gates = {name: g[0] for name, g in gates.items()}

    def error(self, weights, head, t):
        return answer(weights, self.k[t, head], self.rule.is_normed) - self.v[t, head]

    def loss(self, weights, head, t):
        return 0.5 * self.error(weights, head, t).square().sum()

    def gate(self, name, t, head):
        return self.gates[name][t, head]


def both(words, update, chunk):
    rule = made(words)
    q, k, v = stream()
    gates = gates_of(rule, 7)
    expected = written_out(rule, q, k, v, gates, update(rule, k, v, gates), chunk)
    for mode in ("chunk", "recurrent"):
        o, _ = rule.run(rule.init_state(1), q, k, v, gates, None, mode)
        torch.testing.assert_close(o, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3])
def test_titans(chunk):
    class Write(Update):
        def __call__(self, now, gradient, head, t, memo):
            eta, theta = self.gate("momentum", t, head).exp(), self.gate("eta", t, head)
            before = memo.get("surprise", [torch.zeros_like(w) for w in now])
            memo["surprise"] = [eta * s - theta * g for s, g in zip(before, gradient, strict=True)]
            kept = self.gate("g", t, head).exp()  # 1 - alpha
            return [kept * w + s for w, s in zip(now, memo["surprise"], strict=True)]

    both(f"titans(chunk={chunk}, expansion=2)", Write, chunk)


@pytest.mark.parametrize("words", ["ttt_linear(chunk=3)", "ttt_mlp(chunk=3, expansion=2)"])
def test_ttt(words):
    class Write(Update):
        def __call__(self, now, gradient, head, t, memo):
            return [w - self.gate("eta", t, head) * g for w, g in zip(now, gradient, strict=True)]

    both(words, Write, 3)


def test_moneta():
    class Write(Update):
        link = staticmethod(lambda a: a / (a.abs() ** 4).sum() ** 0.5)  # |A|_4^2

        def loss(self, weights, head, t):
            return (self.error(weights, head, t).abs() ** 3).sum() / 3

        def __call__(self, now, gradient, head, t, memo):
            a = memo.get("a", [w[head].detach() for w in self.rule.start])
            keep, eta = self.gate("g", t, head).exp(), self.gate("eta", t, head)
            memo["a"] = [keep * old - eta * g for old, g in zip(a, gradient, strict=True)]
            return [self.link(new) for new in memo["a"]]

    both("moneta(chunk=2, expansion=2)", Write, 2)


def test_yaad():
    class Write(Update):
        def loss(self, weights, head, t):
            error, delta = self.error(weights, head, t), self.gate("threshold", t, head)
            return 0.5 * error.square().sum() if error.norm() <= delta else delta * error.abs().sum()

        def __call__(self, now, gradient, head, t, memo):
            keep, eta = self.gate("g", t, head).exp(), self.gate("eta", t, head)
            return [keep * w - eta * g for w, g in zip(now, gradient, strict=True)]

    both("yaad(chunk=2, expansion=2)", Write, 2)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_an_error_of_zero_writes_nothing_and_has_a_gradient(mode):
    """|e|^1.5 has no second derivative at 0: to the gradients such a token is one with a step of zero."""
    rule = made("moneta(chunk=2, p=1.5, expansion=2)")
    q, k, v = stream()
    k[:, 2] = v[:, 2] = 0.0
    gates, found = gates_of(rule, 7), []
    for size in (1.0, 0.0):
        eta = gates["eta"].clone()
        eta[:, 2] *= size
        leaves = [*rule.start, rule.norm_weight, rule.norm_bias, v.requires_grad_()]
        o, _ = rule.run(rule.init_state(1), q, k, v, gates | {"eta": eta}, None, mode)
        found.append(torch.autograd.grad(o.square().sum(), leaves))
    assert all(each.isfinite().all() for each in found[0])
    torch.testing.assert_close(found[0], found[1])


def test_yaad_has_both_kinds_of_errors():
    """The one above would not notice a threshold that nothing crosses."""
    rule = made("yaad(chunk=1, depth=1)")
    q, k, v = stream()
    gates = gates_of(rule, 7)
    found = [
        rule.run(rule.init_state(1), q, k, v, gates | {"threshold": torch.full_like(gates["eta"], size)}, None, "chunk")
        for size in (0.01, 1.5, 100.0)
    ]
    assert all((found[i][0] - found[1][0]).abs().max() > 1e-4 for i in (0, 2))


def test_memora():
    class Write(Update):
        link = staticmethod(lambda a: 0.5 * a.softmax(0))  # in the weights themselves, not in logarithms

        def __call__(self, now, gradient, head, t, memo):
            alpha, eta = self.gate("g", t, head).exp(), self.gate("eta", t, head)
            return [0.5 * torch.softmax(alpha * w.log() - eta * g, 0) for w, g in zip(now, gradient, strict=True)]

    both("memora(chunk=2, expansion=2, mass=0.5)", Write, 2)


def test_memora_stays_on_its_simplex():
    rule = made("memora(chunk=2, depth=1, mass=2)")
    q, k, v = stream(40)
    _, state = rule.run(rule.init_state(1), q, k, v, gates_of(rule, 40), None, "chunk")
    (weights,) = rule.recipe.weights((state["weights"]["0"],))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-2), torch.full((1, HEADS, WIDTH), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("step", ["gradient", "orthogonal"])
def test_atlas(step):
    class Write(Update):
        def loss(self, weights, head, t):
            window = range(max(0, t - 2), t + 1)
            each = (self.gate("omega", i, head) * 0.5 * self.error(weights, head, i).square().sum() for i in window)
            return sum(each)

        def __call__(self, now, gradient, head, t, memo):
            theta, eta = self.gate("momentum", t, head).exp(), self.gate("eta", t, head)
            before, keep = memo.get("s", [torch.zeros_like(w) for w in now]), self.gate("g", t, head).exp()
            if step == "gradient":
                memo["s"] = [theta * s - eta * g for s, g in zip(before, gradient, strict=True)]
                return [keep * w + s for w, s in zip(now, memo["s"], strict=True)]
            memo["s"] = [theta * s - g for s, g in zip(before, gradient, strict=True)]
            return [keep * w + eta * orthogonal(s) for w, s in zip(now, memo["s"], strict=True)]

    both(f"atlas(chunk=2, window=3, degree=1, depth=2, expansion=2, step={step})", Write, 2)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_orthogonal_steps_have_singular_values_near_one(shape):
    matrix = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonal(matrix)
    left, size, right = torch.linalg.svd(matrix, full_matrices=False)
    reached = torch.linalg.svdvals(found)
    assert (reached[size > 0.1 * size.max()] > 0.6).all()
    assert (reached < 1.25).all()
    # the singular vectors are those of the matrix
    inside = left.mT @ found @ right.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9


def test_polynomial_features_are_two_terms_of_the_exponential():
    x, y = torch.randn(2, 6, dtype=torch.float64)
    product = x @ y
    torch.testing.assert_close(monomials(x, 2) @ monomials(y, 2), product + product**2 / 2)
    # as the memory takes them, of length 1: a cosine of 1 gives 3/2 before that
    cosine = F.cosine_similarity(x, y, dim=0)
    left, right = made("atlas", 1, 6).features(torch.stack((3 * x, y)).view(1, 2, 1, 6))[0, :, 0]
    torch.testing.assert_close(left @ right, (cosine + cosine**2 / 2) / 1.5)


def test_gates_by_hand():
    """Five tokens of a chunk, three losses each: their steps sum to max_step at most, repeated by the momentum."""
    rule = made("atlas(chunk=5, window=3, step=gradient, max_step=0.6)")
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    raw = (x @ rule.gate.weight.T + rule.gate_bias).view(1, 2, 4, HEADS).unbind(2)
    step, keep, again, own = (torch.sigmoid(each) for each in raw)
    torch.testing.assert_close(keep[0, 0].mean().item(), 1.0, atol=0.05, rtol=0)
    found = rule.gates(x)
    torch.testing.assert_close(found["eta"], 0.6 * step * (1 - again) / 15)
    torch.testing.assert_close(found["g"], keep.log())
    torch.testing.assert_close(found["momentum"], again.log())
    torch.testing.assert_close(found["omega"], own)
    assert list(found) == ["eta", "g", "momentum", "omega"]
    rule = made("atlas(chunk=5, window=3, max_step=0.6)")
    raw = (x @ rule.gate.weight.T + rule.gate_bias).view(1, 2, 4, HEADS)
    torch.testing.assert_close(rule.gates(x)["eta"], 0.6 * raw[:, :, 0].sigmoid())
    rule = made("yaad(chunk=5, max_step=2)")
    raw = (x @ rule.gate.weight.T + rule.gate_bias).view(1, 2, 3, HEADS)
    torch.testing.assert_close(rule.gates(x)["eta"], 2 * raw[:, :, 0].sigmoid() / 5)
    torch.testing.assert_close(rule.gates(x)["threshold"], (1 + raw[:, :, 2].exp()).log())


def test_chunk_length_is_part_of_the_model():
    """The project's measurement: relative deviation from chunk 1, momentum 0.9, decay 0.02."""
    q, k, v = stream(128, 1, 64)
    size = torch.ones(1, 128, 1, dtype=torch.float64)
    gates = {"eta": 0.1 * size, "g": math.log(0.98) * size, "momentum": math.log(0.9) * size}
    found = []
    for chunk in (1, 2, 4, 8, 16, 64):
        rule = made(f"titans(chunk={chunk}, depth=1)", 1, 64)
        torch.nn.init.zeros_(rule.start[0])
        found.append(rule.run(rule.init_state(1), q, k, v, gates, None, "chunk")[0])
    deviations = [((o - found[0]).norm() / found[0].norm()).item() for o in found[1:]]
    assert deviations == sorted(deviations)
    assert deviations == pytest.approx([0.02, 0.05, 0.10, 0.21, 0.50], rel=0.25)


def test_closed_gates_leave_the_learned_start():
    for words in ("titans", "ttt_mlp", "atlas(degree=1)", "moneta", "memora"):
        rule = made(words)
        q, k, v = stream()
        gates = {name: torch.zeros_like(gate) for name, gate in gates_of(rule, 7).items()}
        gates |= {"momentum": torch.full_like(gates["eta"], -50.0)} if "momentum" in gates else {}
        state = rule.init_state(1)
        o, after = rule.run(state, q, k, v, gates, None, "chunk")
        torch.testing.assert_close(after["weights"], state["weights"])
        torch.testing.assert_close(o, rule.ask(state["weights"], q))


def test_layers_are_taken_in_order():
    """The eleventh layer's name sorts before the third's."""
    rule = made("titans(depth=12, expansion=1, chunk=2)", num_heads=1)
    q, k, v = stream(3, 1)
    gates = gates_of(rule, 3, 1)
    state = rule.init_state(1)
    expected = answer([w[0] for w in rule.start], q[0, 0, 0], False)
    torch.testing.assert_close(rule.ask(state["weights"], q)[0, 0, 0], expected)
    closed = {name: torch.zeros_like(gate) for name, gate in gates.items()} | {"momentum": gates["momentum"] - 50}
    for mode in ("chunk", "recurrent"):
        _, after = rule.run(state, q, k, v, closed, None, mode)
        torch.testing.assert_close(after["weights"], state["weights"])


def spanned(q, k):
    """The part of each query that the keys so far have: sum over them of k (k . q)."""
    parts = [sum((k[:, s] * q[:, t]).sum(-1, keepdim=True) * k[:, s] for s in range(t + 1)) for t in range(q.shape[1])]
    return torch.stack(parts, 1)


@pytest.mark.parametrize("project", [False, True])
def test_tnt_adds_local_memories_that_start_again_in_every_shard(project):
    rule = made(f"tnt(chunk=4, local_chunks=[2], shards=[3], project={str(project).lower()}, expansion=2)")
    alone, local = made("titans(chunk=4, expansion=2)"), made("titans(chunk=2, expansion=2)")
    for own, of_tnt in ((alone, rule.start), (local, rule.local_starts[0])):
        own.start.load_state_dict(of_tnt.state_dict())
    q, k, v = stream()
    gates = gates_of(rule, 7)
    expected = alone.run(alone.init_state(1), q, k, v, gates, None, "chunk")[0]
    shards = [slice(0, 3), slice(3, 6), slice(6, 7)]
    parts = []
    for s in shards:
        asked, own = spanned(q[:, s], k[:, s]) if project else q[:, s], {n: g[:, s] for n, g in gates.items()}
        parts.append(local.run(local.init_state(1), asked, k[:, s], v[:, s], own, None, "chunk")[0])
    expected = expected + torch.cat(parts, 1)
    torch.testing.assert_close(rule.run(rule.init_state(1), q, k, v, gates, None, "chunk")[0], expected)


RULES = ("titans", "titans(depth=1)", "ttt_linear", "ttt_mlp", "atlas", "moneta", "yaad", "memora(mass=2)")


@pytest.mark.parametrize("words", RULES)
def test_what_is_read_again_and_again_is_known(words):
    """With the gates that a new memory has: the error on a few pairs falls while they repeat."""
    rule = made(words)
    _, k, v = (x.repeat(1, 96, 1, 1) for x in stream(4))
    gates = rule.gates(torch.zeros(1, 384, 8, dtype=torch.float64))
    features = rule.features(k)
    o, _ = rule.run(rule.init_state(1), features, features, v, gates, None, "chunk")
    error = (o - v).square().mean((0, 2, 3)).detach()
    assert error[-16:].mean() < 0.8 * error[:16].mean()


@pytest.mark.parametrize("words", [*RULES, "tnt", "atlas(step=gradient, window=16, max_step=1.9)"])
def test_equal_tokens_do_not_blow_a_memory_up(words):
    """Their steps add up within a chunk: what a blank image does."""
    rule = made(words)
    _, k, v = (x.expand(-1, 400, -1, -1) for x in stream(1))
    gates = {name: g.expand(1, 400, HEADS) for name, g in rule.gates(3 * torch.randn(1, 1, 8).double()).items()}
    features = rule.features(k)
    o, _ = rule.run(rule.init_state(1), features, features, v, gates, None, "chunk")
    assert o.isfinite().all()
    assert o.abs().max() < 20 * v.abs().max()


def test_what_cannot_be_built_is_refused():
    for words, message in (
        ("neural_memory(layout=mad)", "layout of neural_memory is 'mad'; it must be one of plain, mac, mag, mal"),
        ("neural_memory(rule=tnt, layout=mac)", "'mac' with the rule tnt"),
        ("neural_memory(rule=titan)", "titans"),
        ("neural_memory(rule=titans(chunk=0))", "chunk of the rule titans is 0"),
        ("neural_memory(rule=atlas(degree=3))", "degree of the rule atlas is 3; it must be 1 or 2"),
        ("neural_memory(rule=atlas(step=adam))", "must be one of orthogonal, gradient"),
        (
            "neural_memory(rule=ttt_linear(max_step=0))",
            "max_step of the rule ttt_linear is 0; it must be a number above",
        ),
        ("neural_memory(rule=titans(max_step=fast))", "max_step of titans is 'fast'; it must be a finite number"),
        ("neural_memory(rule=moneta(p=1))", "p of the rule moneta is 1; it must be a number above 1"),
        ("neural_memory(rule=moneta(p=two))", "p of moneta is 'two'"),
        ("neural_memory(rule=moneta(q=1.5))", "q of the rule moneta is 1.5; it must be a number of at least 2"),
        ("neural_memory(rule=memora(mass=none))", "mass of memora is None; it must be a finite number"),
        ("neural_memory(rule=tnt(shards=[4, 8]))", "two lists of one length"),
        ("neural_memory(rule=tnt(shards=4))", "two lists of one length"),
        ("neural_memory(rule=tnt(shards=[short]))", "two lists of one length"),
    ):
        with pytest.raises(UserError, match=message):
            build_mixer(words, 16, num_heads=2)

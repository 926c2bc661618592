"""Ridge memory against solves written out here, the card's rates of convergence, and the part of lambda's gradient."""

import kernel_properties as props
import pytest
import torch
from kernel_properties import DISTRIBUTIONS
from memory_cases import MEMORY_CASES, tokens

import kernels.ridge_memory as module
from kernels.gated_linear_attention import gated_linear_attention
from kernels.ridge_memory import ridge_memory

unit = torch.nn.functional.normalize


def solved(q, k, v, beta, g, ratio):
    """Per token: build H and U from all tokens so far, solve, read. No recurrence, no state."""
    outs = []
    for t in range(q.shape[1]):
        weight = beta[:, : t + 1] * (g[:, : t + 1].flip(1).cumsum(1).flip(1) - g[:, : t + 1]).exp()
        h = torch.einsum("bth,bthi,bthj->bhij", weight, k[:, : t + 1], k[:, : t + 1])
        u = torch.einsum("bth,bthi,bthj->bhij", weight, k[:, : t + 1], v[:, : t + 1])
        strength = ratio * h.square().sum((-1, -2)).sqrt() + 1e-6
        system = h + strength[..., None, None] * torch.eye(k.shape[3], dtype=k.dtype)
        outs.append(torch.einsum("bhij,bhi->bhj", u, torch.linalg.solve(system, q[:, t])))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_against_solves_without_a_recurrence(kind, dtype, tolerance):
    """At the published strength: 120 steps have converged, so all that is left is rounding."""
    drawn = tokens(torch.Generator().manual_seed(0), 2, 40, kind)
    leaves = [x.to(dtype).requires_grad_() for x in drawn.values()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = solved(*wide, ratio=0.02)
    found, _ = ridge_memory(*leaves, ratio=0.02, steps=120, chunk=16, backend="chunked")
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((found * weights.to(dtype)).sum(), leaves)
    theirs = torch.autograd.grad((truth * weights).sum(), wide)
    errors = [props.error(x, y) for x, y in zip((found, *ours), (truth, *theirs), strict=True)]
    assert max(errors) < tolerance, errors


# mean relative error of x, K = 64, random unit keys, decay 0.99 (method card, measured)
CARD = [(0.02, 10, 8.7e-2), (0.02, 20, 5.1e-3), (0.02, 30, 3.1e-4), (0.1, 10, 2.8e-3), (0.1, 30, 1.1e-8)]
CARD += [(0.005, 30, 2.1e-2)]


@pytest.mark.parametrize(("ratio", "steps", "published"), CARD)
def test_converges_at_the_rate_of_the_card(ratio, steps, published):
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 200, 1, 64, generator=gen, dtype=torch.float64) for _ in range(2))
    g = torch.full((1, 200, 1), 0.99, dtype=torch.float64).log()
    start = torch.zeros(1, 1, 64, 64, dtype=torch.float64)

    def x(number):
        return module._forward(
            q, unit(k, dim=-1), None, g, start, None, ratio, 1e-9, number, 32, "chunked", False, False
        )

    truth = x(400)[0]
    error = ((x(steps)[0] - truth).norm(dim=-1) / truth.norm(dim=-1)).mean()
    assert 0.8 * published < error < 1.25 * published, error


def test_steps_are_spent_in_the_backward_too():
    """The gradient of q is a solve of its own: few steps leave it as wrong as the output."""
    leaves = {n: x.requires_grad_() for n, x in tokens(torch.Generator().manual_seed(0), 1, 30, "cos 0.5").items()}
    grads = {}
    for steps in (3, 120):
        out, _ = ridge_memory(**leaves, steps=steps)
        (grads[steps],) = torch.autograd.grad(out.sum(), [leaves["q"]])
    assert 0.03 < props.error(grads[3], grads[120]) < 1


def test_lambda_follows_the_state():
    """d lambda / d k matters: without it (ratio's part taken away by hand) the key gradient is off by percents."""
    drawn = tokens(torch.Generator().manual_seed(0), 1, 20, "random")
    wide = [x.requires_grad_() for x in drawn.values()]
    q, k, v, beta, _ = wide
    h = torch.einsum("bth,bthi,bthj->bhij", beta, k, k)
    u = torch.einsum("bth,bthi,bthj->bhij", beta, k, v)
    norm = h.square().sum((-1, -2)).sqrt()
    eye = torch.eye(5, dtype=torch.float64)
    keys = {}
    for name, strength in (("whole", 0.1 * norm + 1e-6), ("frozen", 0.1 * norm.detach() + 1e-6)):
        read = torch.linalg.solve(h + strength[..., None, None] * eye, q[:, -1])
        (keys[name],) = torch.autograd.grad(torch.einsum("bhij,bhi->", u, read), [k], retain_graph=True)
    out, _ = ridge_memory(q, k, v, beta, ratio=0.1, steps=80)
    (ours,) = torch.autograd.grad(out[:, -1].sum(), [k])
    assert props.error(ours, keys["whole"]) < 1e-10
    assert props.error(ours, keys["frozen"]) > 1e-2


def test_limits():
    """Strong regularisation is linear attention over lambda; mix 1 is linear attention; exact recall of few keys."""
    drawn = tokens(torch.Generator().manual_seed(0), 1, 12, "random")
    q, k, v, beta, g = drawn.values()
    plain, _ = gated_linear_attention(q, k, v * beta[..., None], g, scale=1.0)
    mixed, _ = ridge_memory(q, k, v, beta, g, torch.ones_like(beta))
    assert props.error(mixed, plain) < 1e-12
    strong, _ = ridge_memory(q, k, v, beta, g, ratio=1e-9, floor=1e8)
    assert props.error(strong * 1e8, plain) < 1e-6
    eye = torch.eye(4, dtype=torch.float64).view(1, 4, 1, 4)
    value = torch.randn(1, 4, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, state = ridge_memory(eye, eye, value)
    read, _ = ridge_memory(eye, eye * 0, value * 0, initial_state=state, ratio=1e-3, steps=400)
    assert props.error(read, value) < 3e-3


def test_asymmetric_state_is_taken_symmetric():
    case = MEMORY_CASES["ridge"]
    inputs = props.draw(case, 6)
    skew = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    other = {**inputs, "initial_state": inputs["initial_state"].clone()}
    other["initial_state"][..., :5] += skew - skew.mT
    for backend in ("chunked", "reference"):
        assert props.error(case.op(**other, backend=backend)[0], case.op(**inputs, backend=backend)[0]) < 1e-12


def test_memory_of_backward():
    """Kept: the inputs, x, two scalars per token, and the chunk states of H and U."""
    inputs = {n: x.float().requires_grad_() for n, x in props.draw(MEMORY_CASES["ridge"], 256).items()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        ridge_memory(**inputs, backend="chunked", chunk=32)
    given = sum(x.numel() for x in inputs.values())
    states = 2 * 2 * 8 * 5 * (5 + 7)
    assert sum(x.numel() for x in kept.values()) <= 2 * given + states

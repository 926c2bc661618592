"""Recurrent attention against its equations solved the other way round, and what its state and its squares promise."""

import math

import kernel_properties as props
import pytest
import torch
from attention_cases import ATTENTION_CASES, HEADS, K, V

from kernels.common import explain
from kernels.recurrent_attention import RecurrentAttentionState, recurrent_attention
from kernels.recurrent_attention.tiles import squares

CASE = ATTENTION_CASES["recurrent_attention"]


def drawn(length=21, batch=2):
    inputs = props.draw(CASE, length)
    del inputs["initial_state"]
    return {n: x[:batch] if CASE.is_tokens(n) else x for n, x in inputs.items()}


def norm(z):
    return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.7, 0.05], dtype=torch.float64)], ids=["plain", "alibi"])
def test_output_solves_the_equations(backend, slopes):
    """All positions at once: given y, keys and values are known, and one masked attention must give y back.

    Token t depends on earlier outputs only, so that the equations have one solution.
    """
    given = drawn()
    y, state = recurrent_attention(**given, slopes=slopes, backend=backend)
    x, q, own_k, own_v, w_out, w_k, w_v, w_up, w_down = given.values()
    k = torch.einsum("btd,dhk->bhtk", norm(y), w_k)
    v = torch.einsum("btd,dhv->bhtv", norm(y), w_v)
    assert props.error(state.keys, k.transpose(1, 2)) < 1e-12
    assert props.error(state.values, v.transpose(1, 2)) < 1e-12
    # a key for every position and, behind them, the own ones
    length = x.shape[1]
    both_k, both_v = (torch.cat([a, b.transpose(1, 2)], dim=2) for a, b in ((k, own_k), (v, own_v)))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    bias = torch.zeros(HEADS, length, length, dtype=torch.float64)
    if slopes is not None:
        bias = -slopes[:, None, None] * distance
    own = torch.zeros(HEADS, length, length, dtype=torch.float64).masked_fill(~torch.eye(length).bool(), -math.inf)
    mask = torch.cat([bias.masked_fill(distance <= 0, -math.inf), own], dim=-1)
    a = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), both_k, both_v, attn_mask=mask)
    u = x + torch.einsum("bhtv,hvd->btd", a, w_out)
    inner = norm(u) @ w_up
    truth = u + (inner * 0.5 * (1 + torch.erf(inner / 2**0.5))) @ w_down
    assert props.error(y, truth) < 1e-12


def test_first_token_sees_only_itself():
    given = drawn(1)
    y, _ = recurrent_attention(**{n: given[n] for n in ("x", "q", "k", "v", "w_out", "w_k", "w_v")})
    assert props.error(y, given["x"] + torch.einsum("bthv,hvd->btd", given["v"], given["w_out"])) < 1e-12


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("length", [1, 7, 16, 33])
def test_squares_cover_every_pair_once(length, chunk):
    """Every key and later query of different chunks once, no key before it is known, each key read by log2 squares."""
    count = torch.zeros(length, length, dtype=torch.int)
    reads = torch.zeros(length, dtype=torch.int)
    for t, width in squares(length, chunk):
        count[t : t + width, t - width : t] += 1
        reads[t - width : t] += 1
    place = torch.arange(length)
    assert torch.equal(count, (place[:, None] // chunk > place // chunk).int())
    assert int(reads.max()) <= math.ceil(math.log2(max(1, -(-length // chunk))))


def test_forgotten_positions_may_be_cut_off():
    given, reset = drawn(12), torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 5] = reset[1, 9] = True
    _, state = recurrent_attention(**given, reset=reset)
    assert state.first.tolist() == [5, 9]
    shorter = RecurrentAttentionState(state.keys[:, 5:], state.values[:, 5:], state.first - 5)
    runs = [recurrent_attention(**given, initial_state=s) for s in (state, shorter)]
    assert props.error(runs[1][0], runs[0][0]) < 1e-12
    assert runs[0][1].keys.shape[1] == 24
    assert runs[1][1].keys.shape[1] == 19
    # and nothing flows back to them
    leaf = state.keys.detach().clone().requires_grad_()
    y, _ = recurrent_attention(**given, initial_state=state._replace(keys=leaf))
    (grad,) = torch.autograd.grad(y.square().sum(), [leaf])
    assert torch.count_nonzero(grad[0, :5]) == torch.count_nonzero(grad[1, :9]) == 0
    assert torch.count_nonzero(grad[0, 5:]) > 0


def test_scores_far_apart():
    """Differences of scores beyond what exp can hold, in float32: the softmax is relative to its largest score."""
    given = {n: x.float() for n, x in drawn(40).items()}
    given["q"], given["w_k"] = 60 * given["q"], 3 * given["w_k"]
    # where a weight saturates, an error of a score is one of the weight: no bars on gradients here, only sanity
    found = recurrent_attention(**given, chunk=4)[0]
    truth = recurrent_attention(**{n: x.double() for n, x in given.items()}, backend="reference")[0]
    assert torch.isfinite(found).all()
    assert props.error(found, truth) < 1e-3


def test_no_weights_of_all_pairs_are_kept():
    """Beside its inputs the backward keeps the outputs, keys, values, attention and a number per query."""
    given = {n: x.float().requires_grad_() for n, x in drawn(128).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        recurrent_attention(**given)
    own = {x.untyped_storage().data_ptr() for x in given.values()}
    extra = {x.untyped_storage().data_ptr(): x.numel() for x in kept if x.untyped_storage().data_ptr() not in own}
    assert sum(extra.values()) <= 2 * 128 * (6 + HEADS * (K + 2 * V + 1)) + 1


def test_explain():
    given = drawn(40)
    found = explain(recurrent_attention, **given)
    assert (found.backend, found.chunk) == ("chunked", 32)
    assert "has no kernel" in found.reason
    assert explain(recurrent_attention, **given, backend="reference").backend == "reference"

"""The parts of TRC2 against their equations written out token by token and slot by slot, and what it refuses."""

import io
import math

import pytest
import torch
import torch.nn.functional as F

from cl.backbones._cells import ages
from cl.backbones.trc2 import Trc2
from cl.backbones.trc2_parts import hippocampus as hippocampus_file
from cl.backbones.trc2_parts.critic import Critic
from cl.backbones.trc2_parts.events import candidates
from cl.backbones.trc2_parts.hippocampus import Hippocampus
from cl.backbones.trc2_parts.thalamus import Thalamus
from cl.core import Setting, StreamInfo, UserError
from cl.seeding import Seeds

CONTEXT = 24
SMALL = {"width": 16, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 8, "num_slots": 12, "top": 3}


def made(**options):
    with Seeds(0).as_global("init"):
        return Trc2(
            StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (CONTEXT,), 11, 1, measure="loss"), **SMALL | options
        )


# the thalamus, token by token


def routed_plainly(part, h, reset, surprise, has_past=True, has_competition=True):
    c = part.down(part.norm(h))
    out = torch.zeros_like(c)
    size = c.shape[2] // part.groups
    for b in range(len(c)):
        start = 0
        for t in range(c.shape[1]):
            start = t if reset[b, t] else start
            focal = sum(part.focal_JR[j] * c[b, t - j] for j in range(4) if t - j >= start)
            past = c[b, start:t].mean(0) if t > start else torch.zeros_like(c[b, t])
            g = torch.sigmoid(part.focal_gate(c[b, t]) + part.alert_2G[0] * surprise[b, t])
            d = torch.sigmoid(part.past_gate(c[b, t]) - part.alert_2G[1] * surprise[b, t]) if has_past else [0.0] * 9
            for group in range(part.groups):
                own = slice(group * size, (group + 1) * size)
                p = g[group] * focal[own] + d[group] * past[own]
                out[b, t, own] = p / (1 + p.abs().mean()) if has_competition else p
    return out


@pytest.mark.parametrize("left_out", [None, "has_past", "has_competition"])
def test_router_is_its_equations_written_out(left_out):
    torch.manual_seed(0)
    switches = {left_out: False} if left_out else {}
    part = Thalamus(12, 8, groups=4, **switches).double()
    for p in part.parameters():
        torch.nn.init.normal_(p)
    h = torch.randn(2, 9, 12, dtype=torch.float64)
    surprise = torch.randn(2, 9, dtype=torch.float64)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = reset[1, 0] = reset[1, 7] = True
    before = ages(9, reset, torch.zeros(2, dtype=torch.int64)) - 1
    z, _ = part(h, part.init_state(2, h.new_zeros(())), before, surprise)
    torch.testing.assert_close(z, routed_plainly(part, h, reset, surprise, **switches), atol=1e-12, rtol=1e-10)
    calm, _ = part(h, part.init_state(2, h.new_zeros(())), before, torch.zeros_like(surprise))
    assert not torch.allclose(z, calm, atol=1e-3)


# the critic, by hand


def test_critic_takes_the_steps_of_td():
    """Two tokens of length 1 along the axes, gamma 0.5, rates 0.1 and 0.01, no value yet."""
    critic = Critic(2, rates=(0.1, 0.01), discount=0.5)
    h = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    reward, known, last = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, True]]), torch.tensor([[False, True]])
    critic.learn(h, reward, known, last)
    # counted from their mean, delta = (0.5, -0.5); mean over two tokens
    torch.testing.assert_close(critic.weight, torch.tensor([[0.025, -0.025], [0.0025, -0.0025]]))
    torch.testing.assert_close(critic.bias, torch.zeros(2), atol=1e-7, rtol=0)
    critic.learn(h, reward, known, last)
    # V_fast = (0.025, -0.025): delta = (0.5 - 0.0125 - 0.025, -0.5 + 0.025) = (0.4625, -0.475)
    torch.testing.assert_close(critic.weight[0], torch.tensor([0.025 + 0.1 * 0.4625 / 2, -0.025 - 0.1 * 0.475 / 2]))
    torch.testing.assert_close(critic.bias[0], torch.tensor(0.1 * (0.4625 - 0.475) / 2))
    gap = critic.gap(h)
    value = (F.normalize(h, dim=-1) @ critic.weight.T + critic.bias)[0]
    torch.testing.assert_close(gap[0], value[:, 0] - value[:, 1])
    # the reward cancels between the two: delta_fast - delta_slow
    wanted = [(2 + 0.5 * value[1, i] - value[0, i]) for i in (0, 1)]
    found = critic.surprise(-gap[:, :1], -gap[:, 1:])
    torch.testing.assert_close(found[0, 0], (wanted[1] - wanted[0]).clamp(min=0))
    assert critic.surprise(gap[:, :1], gap[:, 1:]) == 0


def test_unknown_tokens_teach_nothing_and_one_rate_is_never_surprised():
    critic = Critic(4)
    critic.learn(torch.randn(2, 5, 4), torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5) > 0)
    assert critic.bias.eq(0).all()
    same = Critic(4, rates=(0.1, 0.1))
    h = torch.randn(2, 5, 4)
    same.learn(h, torch.rand(2, 5), torch.ones(2, 5) > 0, torch.zeros(2, 5) > 0)
    assert same.gap(h).eq(0).all()
    assert same.weight.ne(0).all()


def test_surprise_is_counted_in_deviations():
    critic = Critic(4)
    assert critic.normalised(torch.tensor([5.0])) == 0
    for values in ([1.0, 3.0], [2.0, 6.0]):
        critic.note(torch.tensor(values))
    # means 2 and 4, weighed 0.99 to 1; second moments 5 and 20
    total = (0.99 * 2 + 4) / 1.99
    deviation = math.sqrt((0.99 * 5 + 20) / 1.99 - total**2)
    assert critic.normalised(torch.tensor(7.0)).item() == pytest.approx((7 - total) / deviation, rel=1e-4)


# the hippocampus


def filled_store(num_slots=6, filled=4, width=8, has_gate=True):
    torch.manual_seed(0)
    store = Hippocampus(width, rank=4, num_slots=num_slots, top=3, has_gate=has_gate).double()
    store.keys.normal_()
    store.values.normal_()
    store.is_filled[:filled] = True
    return store


def recalled_plainly(store, x):
    """Slot by slot, for one token."""
    q = F.normalize(store.query(x), dim=0)
    keys = {n: F.normalize(store.key(store.keys[n]), dim=0) for n in range(len(store.keys)) if store.is_filled[n]}
    found = [((q @ key).item(), n) for n, key in keys.items()]
    best = sorted(found, reverse=True)[:3]
    if not best:
        return torch.zeros(4, dtype=x.dtype)
    weights = torch.softmax(torch.tensor([16 * s for s, _ in best], dtype=x.dtype), 0)
    m = store.value(sum(w * store.values[n] for w, (_, n) in zip(weights, best, strict=True)))
    event = torch.sigmoid(16 * (best[0][0] - store.threshold))
    gate = torch.sigmoid(store.gate(torch.cat((x, m)))) if store.gate is not None else 1
    return torch.sigmoid(store.opening) * store.feedback(event * gate * m)


@pytest.mark.parametrize("filled", [0, 2, 4, 6])
@pytest.mark.parametrize("at_once", [4096, 2])
@pytest.mark.parametrize("has_gate", [True, False])
def test_read_is_its_equations_written_out(filled, at_once, has_gate, monkeypatch):
    """Also where the store is searched in pieces, and where fewer slots are filled than are read."""
    monkeypatch.setattr(hippocampus_file, "SLOTS_AT_ONCE", at_once)
    store, x = filled_store(filled=filled, has_gate=has_gate), torch.randn(2, 5, 8, dtype=torch.float64)
    feedback, reading = store(x)
    wanted = torch.stack([torch.stack([recalled_plainly(store, token) for token in row]) for row in x])
    torch.testing.assert_close(feedback, wanted, atol=1e-9, rtol=1e-7)
    assert reading.share[:, filled:].eq(0).all()
    assert (filled == 0) == bool(feedback.eq(0).all())


def test_stored_keys_are_found_with_todays_projections():
    """A slot is compared through W_k as it is now: the one that holds what is thought is always the best."""
    store = filled_store(filled=6)
    store.key.weight.data = store.query.weight.data.clone()
    for _ in range(3):
        similarity, slots = store._most_alike(store.keys.unsqueeze(0), store.key(store.keys), True)
        assert slots[0, :, 0].tolist() == list(range(6))
        torch.testing.assert_close(similarity[0, :, 0], torch.ones(6, dtype=torch.float64))
        store.key.weight.data = store.query.weight.data = torch.randn_like(store.key.weight)


def write_one(store, key, surprise, value=None):
    value = key if value is None else value
    own, stored = store.key(key).unsqueeze(0), store.key(store.keys)
    found = torch.tensor([surprise]), torch.tensor([3]), own, stored, store.clock
    store.write(key.unsqueeze(0), value.unsqueeze(0), *found)


def test_micro_batches_of_a_step_know_what_the_ones_before_them_wrote():
    """All are read before any is written: one stores an event, one meets it again, one evicts, one wants it back."""
    store = Hippocampus(8, rank=4, num_slots=2, top=2)
    store.key.weight.data = torch.eye(8)[:2]
    first, second = torch.eye(8)[:2]
    store.tick(torch.zeros(2))
    write_one(store, first, 2.0)
    steps = ((second, 9.0), (second, 1.0), (-first, 3.0), (first, 4.0))
    readings = [store(key.view(1, 1, 8))[1] for key, _ in steps]
    for (key, surprise), reading in zip(steps, readings, strict=True):
        store.tick(reading.share.sum(0))
        found = torch.tensor([surprise]), torch.tensor([0]), reading.own[0], reading.stored, reading.clock
        store.write(key.unsqueeze(0), key.unsqueeze(0), *found)
    torch.testing.assert_close(store.keys, torch.stack((first, second)))
    assert store.step.tolist() == [5, 3]


def test_nothing_is_evicted_while_a_slot_is_free():
    store = Hippocampus(8, rank=4, num_slots=2, top=2)
    store.key.weight.data = torch.eye(8)[:2]
    first, second = torch.eye(8)[:2]
    write_one(store, first, -5.0)
    write_one(store, second, 1.0)
    assert torch.equal(store.keys, torch.stack((first, second)))


def test_writes_free_slots_then_merges_then_evicts_the_worst():
    torch.manual_seed(1)
    store = Hippocampus(8, rank=4, num_slots=3, top=2)
    # keys that are compared as they are, in their first two numbers
    store.key.weight.data = torch.eye(8)[:2]
    first, second, third = (torch.zeros(8) for _ in range(3))
    first[0], second[1], third[0] = 1.0, 1.0, -1.0
    for number, key in enumerate((first, second, third)):
        store.tick(torch.zeros(3))
        write_one(store, key, 2.0 + number)
    assert torch.equal(store.keys, torch.stack((first, second, third)))
    assert store.step.tolist() == [1, 2, 3]
    # surprise fades by 0.999 a step
    torch.testing.assert_close(store.surprise, torch.tensor([2.0 * 0.999**2, 3.0 * 0.999, 4.0]))
    # cosine of about 0.995 with the first: it moves a tenth of the way, and keeps the larger surprise
    near = torch.zeros(8)
    near[0], near[1] = 2.0, 0.2
    write_one(store, near, 1.5)
    torch.testing.assert_close(store.keys[0], 0.9 * first + 0.1 * near)
    torch.testing.assert_close(store.surprise[0], torch.tensor(2.0 * 0.999**2))
    assert store.step.tolist() == [3, 2, 3]
    # worth = use + surprise / 2: the first is the least surprising, but it is read
    store.use[:] = torch.tensor([1.0, 0.0, 0.0])
    away = torch.zeros(8)
    away[1] = -1.0
    write_one(store, away, 9.0)
    assert torch.equal(store.keys[1], away)
    assert store.use[1] == 0
    assert store.experience[1] == 3
    assert torch.equal(store.keys[2], third)


def test_use_follows_what_is_read():
    store = Hippocampus(8, rank=4, num_slots=4, top=2)
    store.tick(torch.tensor([3.0, 1.0, 0.0, 0.0]))
    # shares of all reading, 1 being an even one: 3, 1, 0, 0; a hundredth of the way
    torch.testing.assert_close(store.use, torch.tensor([0.03, 0.01, 0.0, 0.0]))


# which tokens are stored


def test_the_most_surprising_tokens_are_candidates():
    """At most one per chunk, four per row, as many as may be written per step; none below the threshold."""
    surprise = torch.full((2, CONTEXT), float("-inf"))
    peaks = [(0, 1, 9.0), (0, 2, 8.0), (0, 5, 7.0), (0, 9, 6.0), (0, 13, 5.0), (0, 17, 4.0), (1, 20, 6.5), (1, 3, 1.4)]
    for row, token, value in peaks:
        surprise[row, token] = value
    row, token, found = candidates(surprise, chunk=4, num_writes=6, min_surprise=1.5)
    assert list(zip(row.tolist(), token.tolist(), found.tolist(), strict=True)) == [
        (0, 1, 9.0), (0, 5, 7.0), (1, 20, 6.5), (0, 9, 6.0), (0, 13, 5.0),
    ]  # fmt: skip
    assert len(candidates(surprise, chunk=4, num_writes=2, min_surprise=1.5)[0]) == 2


# what is refused


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"num_slots": 10**12}, "backbone.num_slots is 1000000000000, which would take .* GB; it must be at most"),
        ({"num_slots": 0}, "backbone.num_slots is 0"),
        ({"chunk": 7}, "backbone.chunk is 7; it must divide the 24 tokens"),
        ({"injection": 4}, "backbone.injection is 4 for 4 columns; it must be an integer from 1 to"),
        ({"injection": 0}, "backbone.injection is 0"),
        ({"num_layers": 1}, "backbone.injection is None for 1 columns"),
        ({"rank": 12}, "backbone.rank is 12; it must be a multiple of backbone.groups=8"),
        ({"discount": 1}, "backbone.discount is 1"),
        ({"reads_store": "often"}, "backbone.reads_store is 'often'; it must be one of always, training, never"),
        ({"min_surprise": "high"}, "backbone.min_surprise is 'high'"),
    ],
)
def test_refuses_in_one_sentence(options, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        made(**options)
    assert "\n" not in str(caught.value)


def test_refuses_a_store_of_another_size():
    file = io.BytesIO()
    torch.save(made().state_dict(), file)
    file.seek(0)
    with pytest.raises(UserError, match="num_slots is 6, but the store that was saved has 12 slots"):
        made(num_slots=6).load_state_dict(torch.load(file, weights_only=True))


def test_the_oracles_notice_a_router_that_sees_the_present_sum(monkeypatch):
    """Switch the strictly-past rule off, and the router's oracle fails."""
    whole = Thalamus._past

    def with_present(c, carried, before):
        mean, total = whole(c, carried, before)
        return mean + c, total

    monkeypatch.setattr(Thalamus, "_past", staticmethod(with_present))
    with pytest.raises(AssertionError):
        test_router_is_its_equations_written_out(None)

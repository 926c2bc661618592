"""The rules of engrams against lists and loops, and by hand."""

import pytest
import torch

from cl.backbones._engrams import LONG, SHORT, WORKING, Rules, compact, empty, ties
from cl.backbones.memoria import Memoria
from cl.core import Batch, Setting, StreamInfo


def remembered(rules, data, kinds, count, step=0):
    """The rules of reminding in lists and loops; places by number."""
    places = range(len(kinds))
    working = [i for i in places if kinds[i] == WORKING]

    def near(i):
        return -sum(float((data[w] - data[i]).square().sum()) for w in working)

    draw = ties(torch.tensor([step]), len(kinds))[0].tolist()
    short = sorted((i for i in places if kinds[i] == SHORT), key=near, reverse=True)[: rules.remind_short]
    long = [i for i in places if kinds[i] == LONG]
    walks = []
    for i in short if long else []:
        walks.append([max(long, key=lambda j, i=i: count[i][j] + draw[j])])
    found = {walk[0] for walk in walks}
    for _ in range(rules.depth):
        free = [j for j in long if j not in found]
        if not free:
            break
        steps = [max(free, key=lambda j, walk=walk: (count[walk[-1]][j], -j)) for walk in walks]
        for walk, step in zip(walks, steps, strict=True):
            walk.append(step)
        found |= set(steps)
    return set(short) | set(sorted(found, key=near, reverse=True)[: rules.remind_long])


@pytest.mark.parametrize("seed", range(8))
def test_engrams_are_reminded_as_the_rules_say(seed):
    generator = torch.Generator().manual_seed(seed)
    rules = Rules(num_short=4, remind_short=2, remind_long=3, depth=2, life=9, gain=8)
    data = torch.randn(1, 12, 3, generator=generator)
    kind = torch.tensor([[LONG] * 6 + [SHORT] * 4 + [WORKING] * 2])
    count = torch.randint(4, (1, 12, 12), generator=generator).float()
    count = count + count.transpose(1, 2)
    engrams = {"data": data, "kind": kind, "life": torch.ones(1, 12), "count": count}
    found = rules.reminded(engrams, torch.tensor([seed]))[0].nonzero().flatten().tolist()
    assert set(found) == remembered(rules, data[0], kind[0].tolist(), count[0].tolist(), seed)


def test_what_all_engrams_have_in_common_brings_none_nearer():
    """Moved by 2048, which float32 adds exactly here: products of what is large would drown the differences."""
    rules = Rules(num_short=80, remind_short=9, remind_long=4, depth=2, life=9, gain=8)
    data = (64 * torch.randn(1, 104, 8, generator=torch.Generator().manual_seed(0))).round() / 64
    kind = torch.tensor([[LONG] * 20 + [SHORT] * 80 + [WORKING] * 4])
    engrams = empty(1, 104, 8, data) | {"kind": kind}
    here, moved = (rules.reminded(engrams | {"data": data + c}, torch.tensor([0])) for c in (0.0, 2048.0))
    assert torch.equal(here, moved)
    assert here.sum() > 9


def test_nothing_is_reminded_without_working_memory():
    rules = Rules(4, 2, 2, 2, 9, 8)
    engrams = empty(1, 4, 3, torch.zeros(1)) | {"kind": torch.tensor([[LONG, SHORT, SHORT, SHORT]])}
    assert not rules.reminded(engrams, torch.tensor([0])).any()


def test_engrams_fire_age_move_on_and_die():
    """By hand: two working, two short of which one is reminded, one long that dies."""
    rules = Rules(num_short=3, remind_short=1, remind_long=1, depth=1, life=9, gain=8)
    engrams = empty(1, 5, 1, torch.zeros(1))
    engrams["kind"] = torch.tensor([[LONG, SHORT, SHORT, WORKING, WORKING]])
    engrams["life"] = torch.tensor([[1.0, 5.0, 0.5, 9.0, 9.0]])
    engrams["data"] = torch.arange(5.0).view(1, 5, 1)
    reminded = torch.tensor([[False, True, False, False, False]])
    after = rules.aged(engrams, reminded, torch.tensor([[0.0, 0.25, 0.0, 0.0, 0.0]]), num_places=5)
    # the third dies as well: 0.5 - 1; the first short one gains 8 * 0.25 * 1 and loses 1
    assert after["data"].flatten().tolist() == [0.0, 0.0, 1.0, 3.0, 4.0]
    assert after["life"].flatten().tolist() == [0.0, 0.0, 6.0, 8.0, 8.0]
    # four were short, one more than fit: the oldest has become long-term
    assert after["kind"].flatten().tolist() == [0, 0, LONG, SHORT, SHORT]
    assert after["count"][0, 2:, 2:].tolist() == [[1.0] * 3] * 3, "who fired together is wired together"
    assert after["count"].sum() == 9


def test_short_term_memory_keeps_its_places():
    """By hand: long-term engrams that live longer do not push out what is new; the least living of them does go."""
    rules = Rules(num_short=2, remind_short=1, remind_long=1, depth=1, life=9, gain=8)
    engrams = empty(1, 6, 1, torch.zeros(1)) | {"data": torch.arange(6.0).view(1, 6, 1)}
    engrams["kind"] = torch.tensor([[LONG, LONG, SHORT, SHORT, WORKING, WORKING]])
    engrams["life"] = torch.tensor([[90.0, 50.0, 60.0, 70.0, 9.0, 9.0]])
    after = rules.aged(engrams, torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6), num_places=4)
    assert after["data"].flatten().tolist() == [0.0, 3.0, 4.0, 5.0]
    assert after["kind"].flatten().tolist() == [LONG, LONG, SHORT, SHORT]


def test_a_row_forgets_everything_after_its_period():
    """What comes after it is read as if it stood alone, unless it is of a document that began in its last segment."""
    info = StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (12,), 11, 1, measure="loss", separator=10)
    torch.manual_seed(0)
    net, ids = Memoria(info, width=8, num_heads=2, segment=4, period=2).double().eval(), torch.arange(1)
    tokens = torch.arange(12).view(1, 12) % 10
    later, alone = (net(Batch(part, part, ids, ids)).logits[:, -4:] for part in (tokens, tokens[:, 8:]))
    torch.testing.assert_close(later, alone, atol=1e-12, rtol=0)
    tokens[0, 6] = 10
    began = net(Batch(tokens, tokens, ids, ids)).logits[:, -4:]
    net.period = None
    assert torch.equal(began, net(Batch(tokens, tokens, ids, ids)).logits[:, -4:])
    assert (began - alone).abs().max() > 1e-9


def test_the_least_living_make_room():
    engrams = empty(1, 4, 1, torch.zeros(1)) | {
        "kind": torch.tensor([[LONG, LONG, SHORT, SHORT]]),
        "life": torch.tensor([[3.0, 1.0, 2.0, 4.0]]),
        "data": torch.arange(4.0).view(1, 4, 1),
    }
    assert compact(engrams, 3)["data"].flatten().tolist() == [0.0, 2.0, 3.0]


def test_ties_are_a_fair_draw_of_their_own():
    draw = ties(torch.arange(200), 50)
    assert torch.equal(draw, ties(torch.arange(200), 50))
    assert abs(draw.mean() - 0.5) < 4 * (1 / 12 / draw.numel()) ** 0.5
    assert 0 <= draw.min() <= draw.max() < 1
    assert ties(torch.tensor([926]), 52)[0, 51] < 1, "its bits are ones at the top: they must not round up"
    assert len(draw.argmax(1).unique()) > 40
    before = torch.get_rng_state()
    ties(torch.arange(2), 3)
    assert torch.equal(before, torch.get_rng_state())

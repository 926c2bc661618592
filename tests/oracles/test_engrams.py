"""The rules of engrams against lists and loops, and by hand."""

import pytest
import torch

from cl.backbones._engrams import LONG, SHORT, WORKING, Rules, compact, empty, ties


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
    assert len(draw.argmax(1).unique()) > 40
    before = torch.get_rng_state()
    ties(torch.arange(2), 3)
    assert torch.equal(before, torch.get_rng_state())

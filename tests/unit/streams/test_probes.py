"""The probes: every label recomputed row by row from what can be read in the row, and what the rows are made of."""

import itertools
from collections import Counter

import pytest
import torch

from cl.core import IGNORED, Setting, UserError
from cl.testing import configs
from streams.probes._bits import bits
from streams.probes._sequences import BLOCK, Part, as_drawn
from streams.probes.forgetting_mqar import forgetting_mqar
from streams.probes.mqar import mqar, recall
from streams.probes.n_delayed_match import n_delayed_match
from streams.probes.n_parity import n_parity, parity
from streams.probes.needle import needle
from streams.probes.selective_copying import selective_copying
from streams.probes.selectivity import rule_of, selectivity
from streams.probes.word_problem import GROUPS, elements, table, word_problem

PROBES = {config.name.removeprefix("probes/"): config for config in configs("stream") if "probes/" in config.name}


def made(name, **changes):
    config = PROBES[name]
    return config.target()(**(config.arguments(seed=0) | changes))


def rows(item):
    """Inputs and targets of each row, as lists."""
    data = item.load()
    batch = data.rows(torch.arange(len(data)))
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


def asked(targets):
    return {t: target for t, target in enumerate(targets) if target != IGNORED}


def every_set(stream):
    return [*stream.experiences, *stream.eval_sets]


@pytest.mark.parametrize("name", ["mqar", "forgetting_mqar"])
def test_recall_asks_for_the_last_value_of_a_key(name):
    options = {"train": [[32, 3, 20], [32, 5, 20]], "test": [[48, 8]]}
    if name == "forgetting_mqar":
        options = {"train": [[32, 3, 2, 20], [32, 4, 4, 20]], "test": [[48, 8, 3]]}
    for item in every_set(made(name, **options, eval_rows=20)):
        pairs, *rest = (int(word) for word in item.domain.replace(",", "").split() if word.isdigit())
        context = 2 * (pairs + (rest[0] if len(rest) > 1 else 0))
        for inputs, targets in rows(item):
            known = {}
            for key, value in zip(inputs[0:context:2], inputs[1:context:2], strict=True):
                assert 1 <= key < 64 <= value < 128
                assert known.get(key) != value, "a new value is another one"
                known[key] = value
            found = asked(targets)
            assert {inputs[t]: target for t, target in found.items()} == known, "every key is asked once"
            assert len(found) == pairs
            assert min(found) >= context
            assert all(t % 2 == 0 for t in found)


def test_recall_is_zoologys_law():
    """Distribution of gaps against numpy's choice, as zoology draws them, and what lies between."""
    import numpy as np

    pairs, tokens, power, count = 3, 32, 0.01, 4000
    _, targets = recall(tokens, pairs, 0, 64, power, True, count, torch.Generator().manual_seed(0))
    space = (tokens - 2 * pairs) // 2
    ours = ((targets != IGNORED).float().mean(0)[2 * pairs :: 2]).numpy()
    p = power * np.arange(1, space + 1) ** (power - 1)
    p = p / p.sum()
    draw = np.random.RandomState(0)
    theirs = np.bincount(
        np.concatenate([draw.choice(space, pairs, replace=False, p=p) for _ in range(count)]), minlength=space
    )
    # 4 binomial deviations of the difference of two shares
    assert np.abs(ours - theirs / count).max() < 4 * np.sqrt(2 * 0.25 / count)
    assert ours[0] > 2 * ours[-1]
    inputs, targets = recall(tokens, pairs, 0, 64, power, False, 50, torch.Generator().manual_seed(0))
    between = (targets == IGNORED) & (torch.arange(tokens) >= 2 * pairs)
    assert (inputs[between] == 0).all(), "unfilled rows hold 0 between"


def test_the_largest_power_asks_at_the_end():
    """Chances of the longest rows are still numbers."""
    _, targets = recall(4096, 3, 0, 64, 20, True, 50, torch.Generator().manual_seed(0))
    assert ((targets != IGNORED).sum(1) == 3).all()
    assert (targets[:, : 4096 // 2] == IGNORED).all()


def test_defaults_are_zoologys_sizes():
    import inspect

    assert inspect.signature(mqar).parameters["train"].default[0] == (64, 4, 100_000)
    assert inspect.signature(mqar).parameters["test"].default[-1] == (1024, 256)
    assert inspect.signature(forgetting_mqar).parameters["train"].default[3] == (256, 25, 4, 20_000)


def test_shorter_rows_are_filled_with_what_is_not_asked():
    stream = mqar([[16, 2, 10], [32, 2, 10]], [], vocabulary=32, eval_rows=10)
    assert stream.info.input_shape == (32,)
    short = stream.experiences[0].load().rows(torch.arange(10))
    assert (short.inputs[:, 16:] == 0).all()
    assert (short.targets[:, 16:] == IGNORED).all()
    assert stream.eval_sets[0].load().rows(torch.arange(10)).inputs.shape == (10, 16), (
        "measured rows are as long as they are"
    )


def test_copying_writes_what_was_there_in_order():
    for item in every_set(made("selective_copying", train_rows=30, eval_rows=30)):
        places = Counter()
        for inputs, targets in rows(item):
            wanted = [token for token in inputs if token >= 2]
            found = asked(targets)
            assert list(found.values()) == wanted
            assert [inputs[t] for t in found] == [1] * 8
            assert list(found) == list(range(min(found), min(found) + 8)), "the marks stand together, at the end"
            places.update(t for t, token in enumerate(inputs) if token >= 2)
        assert len(places) > 20, "the places are drawn anew"


def test_selectivity_follows_the_rule_over_gaps():
    stream = selectivity(2, symbols=5, length=40, gaps=[1, 3], train_rows=50, eval_rows=50, seed=3)
    for item in every_set(stream):
        k, low, high = (int(word) for word in item.domain.replace(",", "").split() if word.isdigit())
        rule, first = rule_of(3, k, 5), 1 + 4 + 5 * k
        ruled = free = 0
        gaps = Counter()
        for inputs, targets in rows(item):
            symbols, gap, found = [], 0, asked(targets)
            for t, token in enumerate(inputs):
                if token == 0:
                    assert found.pop(t) == first + rule[symbols[-2], symbols[-1]]
                    ruled += 1
                    assert t + 1 == len(inputs) or inputs[t + 1] == targets[t], "what is asked is then shown"
                elif token >= first:
                    if len(symbols) >= 2 and inputs[t - 1] != 0:
                        free += 1
                    gaps[gap] += 1
                    symbols.append(token - first)
                    gap = 0
                else:
                    assert 1 <= token < 5
                    gap += 1
            assert not found
        assert set(gaps) == set(range(low, high + 1))
        assert 0.1 < free / (ruled + free) < 0.32, "a fifth is drawn"


def test_rules_are_permutations_that_depend_on_both():
    rule = rule_of(0, 0, 6)
    assert rule.sort(1).values.tolist() == [list(range(6))] * 6
    assert len({tuple(row) for row in rule.tolist()}) > 1
    assert not torch.equal(rule, rule_of(0, 1, 6))


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_words_are_products_of_permutations(group):
    every = elements(group)
    assert len(every) == {"z2": 2, "s3": 6, "a4": 12, "s4": 24, "a5": 60, "s5": 120}[group]
    assert every[0] == tuple(range(len(every[0]))), "the identity comes first"
    product = table(group)
    n = len(every)
    assert product.sort(1).values.tolist() == [list(range(n))] * n, "a table of a group is a Latin square"
    assert product[0].tolist() == product[:, 0].tolist() == list(range(n))
    stream = word_problem(group, [5], [9], train_rows=20, eval_rows=20)
    for item in every_set(stream):
        for inputs, targets in rows(item):
            things = list(range(len(every[0])))
            for number, target in zip(inputs, targets, strict=True):
                things = [every[number][thing] for thing in things]
                assert tuple(things) == every[target]
    last = word_problem(group, [5], [], asked="last", train_rows=20, eval_rows=20)
    assert [t[-1] for _, t in rows(word_problem(group, [5], [], train_rows=20, eval_rows=20).experiences[0])] == [
        asked(t)[4] for _, t in rows(last.experiences[0])
    ]


@pytest.mark.parametrize(("group", "size"), [("s3", 3), ("s4", 4), ("s5", 5)])
def test_words_of_swaps_move_two_neighbours_with_every_letter(group, size):
    every, seen = elements(group), set()
    stream = word_problem(group, [6], [12], letters="swaps", train_rows=50, eval_rows=20)
    for item in every_set(stream):
        for inputs, targets in rows(item):
            products = [tuple(range(size)), *(every[target] for target in targets)]
            for before, after in itertools.pairwise(products):
                places = [i for i in range(size) if before[i] != after[i]]
                assert len(places) == 2
                assert abs(before[places[0]] - before[places[1]]) == 1, "the letter comes after what was there"
            seen |= set(inputs)
    assert len(seen) == size - 1


def test_parity_is_the_smallest_group():
    for inputs, targets in rows(made("parity", train_rows=20, eval_rows=20).eval_sets[2]):
        assert targets == [total % 2 for total in itertools.accumulate(inputs)]


def test_a5_is_not_commutative_and_even():
    product = table("a5")
    assert not torch.equal(product, product.T)
    assert set(elements("a5")) < set(elements("s5"))


def test_needle_lies_as_many_segments_back_as_said():
    stream = needle(12, 3, [5], distractors=2, keys=6, train_rows=60, eval_rows=60)
    assert [e.domain for e in stream.eval_sets] == [
        "0 of 3 segments back", "1 of 3 segments back", "2 of 3 segments back", "4 of 5 segments back",
    ]  # fmt: skip
    for item in every_set(stream):
        distance, segments = (int(word) for word in item.domain.split() if word.isdigit())
        seen = set()
        for inputs, targets in rows(item):
            assert len(inputs) == 12 * segments
            assert inputs[-2] == 1
            assert list(asked(targets)) == [len(inputs) - 1]
            facts = {inputs[t + 1]: (t, inputs[t + 2]) for t, token in enumerate(inputs) if token == 0}
            assert len(facts) == 3, "three needles with different keys"
            place, value = facts[inputs[-1]]
            assert value == targets[-1]
            assert segments - 1 - place // 12 == distance
            assert place // 12 == (place + 2) // 12, "a needle lies within a segment"
            assert all(2 <= key < 8 <= value < 14 for key, (_, value) in facts.items())
            seen.add(place % 12)
        assert len(seen) >= 3, "anywhere in its segment"


@pytest.mark.parametrize(("segment", "fit"), [(8, 8), (9, 11)])
def test_as_many_needles_as_fit_leave_the_one_that_is_asked_for(segment, fit):
    """A row full of needles once lost it to one with another key: 4 segments of 8 tokens hold 2 each, not 30 // 3."""
    stream = needle(segment, 4, [], distractors=fit - 1, keys=fit, train_rows=20, eval_rows=20)
    for item in every_set(stream):
        for inputs, targets in rows(item):
            facts = {inputs[t + 1]: inputs[t + 2] for t, token in enumerate(inputs) if token == 0}
            assert len(facts) == fit
            assert facts[inputs[-1]] == targets[-1]


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (n_parity, lambda bits, n: sum(bits[-n:]) % 2),
        (n_delayed_match, lambda bits, n: int(bits[-1] == bits[-n])),
    ],
)
def test_bits_are_labelled_by_the_last_n(make, law):
    sizes = [2, 3, 5]
    for setting in (Setting.DOMAIN_INCREMENTAL, Setting.TASK_INCREMENTAL):
        stream = make(sizes, setting=str(setting), train_rows=80, eval_rows=80)
        assert stream.info.num_heads == (3 if setting == Setting.TASK_INCREMENTAL else 1)
        for item, size in zip(every_set(stream), sizes * 2, strict=True):
            lengths = set()
            data = item.load()
            for steps, target in rows(item):
                read = [step.index(1.0) for step in steps if sum(step)]
                assert all(sum(step) in (0, 1) for step in steps)
                assert [sum(step) for step in steps] == [0] * (len(steps) - len(read)) + [1] * len(read)
                assert target == law(read, size)
                lengths.add(len(read))
            assert min(lengths) >= size + 2
            assert max(lengths) <= max(4 * size, size + 2)
            assert len(lengths) > 2
            head = data.rows(torch.arange(2)).task_id
            assert head is None if setting == Setting.DOMAIN_INCREMENTAL else head.tolist() == [sizes.index(size)] * 2


def test_bits_are_fair():
    inputs, targets = bits(parity, 4, 16, 4000, torch.Generator().manual_seed(0))
    assert abs(targets.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs(inputs[:, -1, 1].mean() - 0.5) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("name", sorted(PROBES))
def test_loss_and_accuracy_are_of_what_is_asked(name):
    info = made(name).info
    is_text = name not in ("n_parity", "n_delayed_match")
    assert info.setting == (Setting.CONTINUAL_PRETRAINING if is_text else Setting.DOMAIN_INCREMENTAL)
    assert info.measure == "accuracy"
    assert info.separator is None


@pytest.mark.parametrize("name", sorted(PROBES))
def test_digest_tells_data_apart(name):
    assert made(name).content == made(name).content
    assert len({made(name).content, made(name, seed=1).content, made(name, eval_rows=12).content}) == 3


def test_no_more_is_drawn_than_is_asked_for():
    """A hundred thousand rows cost the blocks that are read, and each the same rows whoever reads first."""
    drawn = []

    def law(num_rows, generator):
        drawn.append(num_rows)
        return torch.randint(100, (num_rows, 6), generator=generator), torch.zeros(num_rows, 6, dtype=torch.int64)

    num_rows = 100_000 + 7
    part = Part("numbers", law, num_rows)
    data = part.load(3, 0)
    drawn.clear()
    first = data.rows(torch.tensor([5, 0, 3 * BLOCK + 1]))
    assert drawn == [BLOCK, BLOCK]
    assert first.sample_ids.tolist() == [5, 0, 3 * BLOCK + 1]
    last = data.rows(torch.tensor([num_rows - 1, 5]))
    assert drawn == [BLOCK, BLOCK, num_rows % BLOCK], "what was drawn is kept, the last block is short"
    other = part.load(3, 0)
    again = other.rows(torch.tensor([num_rows - 1, 3 * BLOCK + 1, 5, 0]))
    assert torch.equal(again.inputs, torch.stack((last.inputs[0], first.inputs[2], last.inputs[1], first.inputs[1])))
    assert torch.equal(first.inputs[0], last.inputs[1])
    assert not torch.equal(first.inputs[1], other.rows(torch.tensor([BLOCK])).inputs[0]), "blocks differ"
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(as_drawn(50, 0, generator), torch.arange(50))
    second = as_drawn(50, 1, generator)
    assert sorted(second.tolist()) == list(range(50))
    assert not torch.equal(second, torch.arange(50))


def test_experiences_that_come_again_are_told_apart():
    stream = mqar([[16, 2, 10], [32, 2, 10], [16, 2, 10]], [], vocabulary=32, eval_rows=10)
    assert [e.name for e in stream.experiences] == ["2 pairs in 16", "2 pairs in 32", "2 pairs in 16 again 2"]
    assert len(stream.eval_sets) == 2
    first, again = (stream.experiences[k].load().rows(torch.arange(10)).inputs for k in (0, 2))
    assert not torch.equal(first, again), "new rows of the same law"


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (mqar, {"train": [[64, 4]]}, "stream.train holds [64, 4]; it must be a list of [tokens, pairs, rows]"),
        (mqar, {"train": "many"}, "stream.train is 'many'; it must be a list of [tokens, pairs, rows]"),
        (mqar, {"train": [[64, 0, 10]]}, "stream.train: pairs is 0; it must be an integer of at least 1"),
        (mqar, {"train": [[31, 4, 10]]}, "an even number of at least 16"),
        (mqar, {"train": [[64, 20, 10]]}, "an even number of at least 80"),
        (mqar, {"vocabulary": 8, "train": [[64, 4, 10]], "test": []}, "stream.vocabulary is 8, too few for 4 keys"),
        (mqar, {"power": 0}, "stream.power is 0; it must be a number above 0 and at most 20"),
        (mqar, {"power": float("inf")}, "stream.power is inf; it must be a number above 0 and at most 20"),
        (mqar, {"power": float("nan")}, "stream.power is nan"),
        (forgetting_mqar, {"power": 1e9}, "stream.power is 1000000000.0"),
        (mqar, {"power": True}, "stream.power is True"),
        (mqar, {"is_filled": "no"}, "stream.is_filled is 'no'"),
        (forgetting_mqar, {"train": [[64, 4, 5, 10]]}, "5 of 4 keys cannot be given another value"),
        (selective_copying, {"lengths": [4], "test_lengths": []}, "it must be at least stream.tokens=16"),
        (selective_copying, {"lengths": [32, 32]}, "stream.lengths is [32, 32]; every number comes once"),
        (selectivity, {"gaps": [3, 1]}, "a gap of 3 to 1 tokens is none"),
        (selectivity, {"gaps": 3}, "stream.gaps is 3"),
        (selectivity, {"restart": 1.0}, "stream.restart is 1.0; it must be a number from 0 to below 1"),
        (selectivity, {"length": 20}, "stream.length is 20; it must be an integer of at least 28"),
        (word_problem, {"group": "s6"}, "stream.group is 's6'; it must be one of z2, s3"),
        (word_problem, {"asked": "first"}, "stream.asked is 'first'; it must be one of every, last"),
        (word_problem, {"letters": "few"}, "stream.letters is 'few'; it must be one of all, swaps"),
        (
            word_problem,
            {"group": "a5", "letters": "swaps"},
            "stream.group (of words of swaps) is 'a5'; it must be one of s3, s4, s5",
        ),
        (word_problem, {"lengths": []}, "stream.lengths is []; it must be a list of integers"),
        (needle, {"distractors": 16}, "stream.distractors is 16; it must be below stream.keys=16"),
        (needle, {"segment": 4}, "stream.segment is 4; it must be an integer of at least 8"),
        (
            needle,
            {"segment": 8, "segments": 1, "distractors": 3},
            "stream.distractors is 3; it must be below the 2 needles that 1 segments of 8 tokens hold",
        ),
        (needle, {"segment": 8, "test_segments": [], "distractors": 8}, "below the 8 needles that 4 segments"),
        (needle, {"segment": 8, "test_segments": [2], "distractors": 4}, "below the 4 needles that 2 segments"),
        (n_parity, {"sizes": [2, 2]}, "every number comes once"),
        (n_parity, {"setting": "class_incremental"}, "stream.setting is 'class_incremental'"),
        (n_delayed_match, {"sizes": [1]}, "stream.sizes is 1; it must be an integer of at least 2"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_sentence(make, options, says):
    with pytest.raises(UserError) as caught:
        make(**options)
    assert says in str(caught.value)

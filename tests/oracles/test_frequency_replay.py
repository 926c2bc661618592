"""Which classes are replayed, against the published code's rules; which rows, by hand; what a run then trains on."""

from __future__ import annotations

import heapq
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cl.core import Setting, Source, TensorData, UserError
from cl.testing import toy_stream
from strategies.frequency_replay import FrequencyReplay
from strategies.replay import Replay

NUM_CLASSES, PER_CLASS = 8, 30


def stream_of(subsets):
    """A class-incremental stream with these classes; row numbers tell class and place."""
    toy = toy_stream(Setting.CLASS_INCREMENTAL)

    def load(k, classes):
        targets = torch.tensor([c for c in classes for _ in range(PER_CLASS)])
        draw = torch.Generator().manual_seed(k)
        return TensorData(torch.randint(256, (len(targets), 1, 8, 8), generator=draw, dtype=torch.uint8), targets, k)

    first = toy.experiences[0]
    experiences = [
        replace(
            first,
            id=k,
            name=f"subset {k}",
            domain="all",
            load=lambda k=k, classes=classes: load(k, classes),
            num_samples=PER_CLASS * len(classes),
            classes=classes,
        )
        for k, classes in enumerate(subsets)
    ]
    info = replace(toy.info, num_outputs=NUM_CLASSES, num_experiences=len(subsets))
    return replace(toy, info=info, experiences=experiences)


def subsets(count, seed=0):
    """Random pairs in which the high classes are rare."""
    p = torch.tensor([2.0**-c for c in range(NUM_CLASSES)])
    draw = torch.Generator().manual_seed(seed)
    return [tuple(sorted(torch.multinomial(p, 2, generator=draw).tolist())) for _ in range(count)]


def published(sequence, low, high, trigger):
    """Classes replayed before each task, as the published class does it with a heap."""
    stats, occurrences, tasks, out = {}, {}, 0, []
    for current in sequence:
        heap = [(value, c) for c, value in stats.items()]
        heapq.heapify(heap)
        chosen = []
        while len(chosen) != len(current) and heap:
            value, c = heapq.heappop(heap)
            if c in current or occurrences[c] < trigger:
                continue
            if value / tasks > high:
                break
            if value / tasks > low:
                chosen.append(c)
        out.append(chosen)
        tasks += 1
        for c in [*current, *chosen]:
            stats[c] = stats.get(c, 0) + 1
            occurrences[c] = occurrences.get(c, 0) + 1
    return out


class Spy(FrequencyReplay):
    """Notes what was chosen, and how the store stood after each experience."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.chosen, self.stores = [], []

    def on_experience_start(self, state):
        super().on_experience_start(state)
        self.chosen.append(list(self.replayed))

    def on_experience_end(self, state):
        super().on_experience_end(state)
        self.stores.append(
            {c: set(zip(r.experience_id.tolist(), r.sample_ids.tolist(), strict=True)) for c, r in self.store.items()}
        )


OPTIONS = {"rows_per_class": 20, "low_frequency": 0.02, "high_frequency": 0.4, "min_occurrences": 2}


def chosen_by_us(lab, sequence, strategy):
    lab.run([strategy], stream_of(sequence), evaluate="seen", eval_rows=1)
    return strategy.chosen


def check(lab, strategy):
    sequence = subsets(40)
    wanted = published(sequence, 0.02, 0.4, 2)
    assert chosen_by_us(lab, sequence, strategy) == wanted
    assert sum(map(len, wanted)) > 15, "the test needs replays"


def test_classes_are_those_of_the_published_rule(lab):
    check(lab, Spy(**OPTIONS))


@pytest.mark.parametrize("change", [{"min_occurrences": 4}, {"high_frequency": 0.2}, {"low_frequency": 0.15}])
def test_every_threshold_matters(lab, change):
    lab.dies(lambda: check(lab, Spy(**(OPTIONS | change))))


def test_stores_are_renewed_by_the_published_numbers(lab):
    """All rows at first, then max(n / (o + 1), n / 20) of them, o occurrences before."""
    strategy = Spy(rows_per_class=20, high_frequency=0.02, low_frequency=0.01)
    lab.run([strategy], stream_of([(0, 1), (0, 2), (0, 3), (1, 2)]), evaluate="seen", eval_rows=1)
    first, second, third, fourth = strategy.stores
    assert [len(rows) for rows in first.values()] == [20, 20]
    assert len(second[0] - first[0]) == 20 // 2
    assert len(third[0] - second[0]) == 20 // 3
    assert len(fourth[1] - third[1]) == 20 // 2
    assert fourth[3] == third[3]
    assert all(len(rows) == 20 for rows in fourth.values())
    assert {k for k, _ in third[0]} == {0, 1, 2}
    # row numbers are those of the class
    assert all(PER_CLASS * 1 <= i < PER_CLASS * 2 for k, i in third[3])


@pytest.mark.parametrize(
    ("rows_per_class", "before", "num"),
    [(200, 0, 200), (200, 1, 100), (200, 2, 66), (200, 18, 10), (200, 19, 10), (200, 60, 10), (10, 30, 1)],
)
def test_a_twentieth_is_renewed_however_often_a_class_came(rows_per_class, before, num):
    strategy = FrequencyReplay(rows_per_class)
    strategy.occurrences = {3: before}
    assert strategy.num_renewed(3) == num


@pytest.mark.parametrize("select", ["random", "frequency"])
def test_a_class_that_an_experience_only_names_is_not_replayed(lab, select):
    """Class 7 has no rows where it is named, so that nothing of it is stored."""
    stream = stream_of([(0, 1), (0, 1, 2)])
    first, second = stream.experiences
    named = replace(stream, experiences=[replace(first, classes=(0, 1, 7)), second])
    strategy = Spy(rows_per_class=10, select=select, low_frequency=0.0, high_frequency=2.0, min_occurrences=1)
    lab.run([strategy], named, evaluate="seen", eval_rows=1)
    assert strategy.chosen == [[], []]


def test_an_epoch_replays_every_stored_row_once_in_one_mean(lab):
    strategy = Spy(rows_per_class=25, select="random")
    stream = stream_of([(0, 1), (2, 3), (4, 5)])
    recorder, _ = lab.run([strategy], stream, evaluate="seen", eval_rows=1, epochs=2)
    assert [len(chosen) for chosen in strategy.chosen] == [0, 2, 2]
    for k in (1, 2):
        steps = [step for step in recorder.steps if step.experience == k]
        replayed = Counter(row for s in steps for part in s.batch.parts[1:] for row in lab.rows_of(s.batch[part.rows]))
        stored = set().union(*(strategy.stores[k - 1][c] for c in strategy.chosen[k]))
        assert set(replayed) == stored
        assert set(replayed.values()) == {2}
        shares = [len(part) for s in steps for part in s.batch.parts[1:]]
        assert max(shares) - min(shares) <= 1 + 50 * lab.batch_size // 60 - 50 * 12 // 60
        assert all(part.source == Source.REPLAY for s in steps for part in s.batch.parts[1:])
    step = next(step for step in recorder.steps if len(step.batch.parts) > 1)
    model = deepcopy(recorder.start)
    model.load_state_dict(step.before)
    plain = F.cross_entropy(model(step.batch).logits, step.batch.targets)
    lab.close(step.terms["cross_entropy"], plain.item())


@pytest.mark.parametrize("is_first", [True, False])
def test_rows_of_others_keep_their_weight(lab, is_first):
    strategies = [Replay(capacity=40, replay_batch_size=8), FrequencyReplay(20, "random")]
    recorder, _ = lab.run(strategies[:: 1 if is_first else -1], Setting.CLASS_INCREMENTAL)
    mixed = [step.batch for step in recorder.steps if step.batch.parts_of("frequency_replay")]
    assert len(mixed) > 10
    for batch in mixed:
        (other,), (own,) = batch.parts_of("replay"), batch.parts_of("frequency_replay")
        both = batch.num_current + len(own)
        assert other.weight == 1
        assert (batch.parts[0].weight, own.weight) == (batch.num_current / both, len(own) / both)


def test_random_replays_classes_seen_before_within_budget(lab):
    strategy = Spy(rows_per_class=10, select="random", budget=0.5)
    sequence = subsets(60, seed=3)
    chosen = chosen_by_us(lab, sequence, strategy)
    for k, classes in enumerate(chosen):
        seen = {c for earlier in sequence[:k] for c in earlier}
        assert set(classes) <= seen - set(sequence[k])
        assert len(set(classes)) == len(classes) <= 2
    assert 0.6 < sum(map(len, chosen[10:])) / 50 < 1.4
    assert not any(chosen_by_us(lab, sequence, Spy(rows_per_class=10, select="random", budget=0.0)))


def test_freq_acc_counts_an_occurrence_by_its_accuracy(lab):
    strategy = Spy(select="freq_acc", rows_per_class=10)
    recorder, _ = lab.run([strategy], stream_of([(0, 1), (0, 1)]), evaluate="seen", eval_rows=1)
    right = Counter()
    for step in recorder.steps:
        model = deepcopy(recorder.start)
        model.load_state_dict(step.before)
        hits = model(step.batch).logits.argmax(-1) == step.batch.targets
        for c in (0, 1):
            right[c] += int(hits[step.batch.targets == c].sum())
    assert strategy.weights == pytest.approx({c: right[c] / PER_CLASS for c in (0, 1)})
    assert strategy.occurrences == {0: 2, 1: 2}
    resumed = FrequencyReplay(select="freq_acc")
    resumed.load_state_dict(strategy.state_dict())
    assert resumed.hits == strategy.hits and sorted(resumed.hits) == [0, 1]


def test_freq_acc_knows_no_accuracy_of_what_is_replayed(lab):
    """An occurrence that counts nothing, as in the published code."""
    kept = []

    class Counting(Spy):
        def on_experience_end(self, state):
            super().on_experience_end(state)
            kept.append((dict(self.weights), dict(self.occurrences)))

    strategy = Counting(select="freq_acc", rows_per_class=10, low_frequency=0.0, high_frequency=2.0, min_occurrences=1)
    lab.run([strategy], stream_of([(0, 1), (2, 3)]), evaluate="seen", eval_rows=1)
    (first, _), (second, occurrences) = kept
    replayed = strategy.chosen[1]
    assert replayed and set(replayed) <= {0, 1}
    assert all(second[c] == first[c] > 0 and occurrences[c] == 2 for c in replayed)


def test_bytes_are_those_of_the_stored_rows(lab):
    strategy = Spy(rows_per_class=20)
    _, trainer = lab.run([strategy], stream_of([(0, 1)]), evaluate="seen", eval_rows=1)
    assert strategy.cost(trainer.state, 16).buffer_bytes == 40 * (64 + 3 * 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rows_per_class": -1}, "frequency_replay.rows_per_class is -1; it must be an integer of at least 0"),
        ({"select": "rare"}, "frequency_replay.select is 'rare'; it must be one of frequency, freq_acc, random"),
        ({"high_frequency": 0.0}, "frequency_replay.high_frequency is 0.0; it must be above"),
        ({"min_occurrences": 0}, "frequency_replay.min_occurrences is 0; it must be an integer of at least 1"),
        ({"budget": 1.5}, "frequency_replay.budget is 1.5; it must be at most 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        FrequencyReplay(**arguments)


def test_experiences_must_name_their_classes():
    stream = stream_of([(0, 1)])
    unnamed = replace(stream, experiences=[replace(e, classes=()) for e in stream.experiences])
    with pytest.raises(UserError, match=r"frequency_replay counts how often classes come back, and experience 0"):
        FrequencyReplay().check(unnamed)

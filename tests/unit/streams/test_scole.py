"""Which classes come when, and what each experience then holds."""

from itertools import combinations

import pytest
import torch

from cl.core import UserError
from streams._subsets import class_probabilities, num_couples, subsets
from streams.scole import scole


def drawn(kind, count=4000, classes=10, size=2, seed=0, **options):
    return list(subsets(kind, count, classes, size, torch.Generator().manual_seed(seed), **options))


def p_of(observed, expected):
    from scipy.stats import chisquare

    observed, expected = torch.as_tensor(observed).double(), torch.as_tensor(expected).double()
    return float(chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue)


def frequency(found, classes=10):
    return torch.tensor([c for subset in found for c in subset]).bincount(minlength=classes)


def test_random_subsets_are_all_equally_likely():
    found = drawn("random", 9000)
    pairs = dict.fromkeys(combinations(range(10), 2), 0)
    for pair in found:
        pairs[pair] += 1
    assert p_of(list(pairs.values()), [1] * 45) > 1e-3


def test_imbalance_is_the_published_formula():
    p = 1 / 10 - 1 / 10 * torch.arange(10.0, dtype=torch.float64) * 0.05
    p = p / p.sum()
    p = p**6 / (p**6).sum()
    found = class_probabilities(10, 6.0, torch.Generator().manual_seed(1))
    assert torch.allclose(found.sort(descending=True).values, p)
    assert not torch.equal(found.sort(descending=True).values, found), "classes are shuffled"
    assert torch.allclose(
        class_probabilities(100, 1.0, torch.Generator()).sort().values[0],
        torch.tensor(0.01 / sum(1 - 0.01 * i for i in range(100)), dtype=torch.float64),
    )


def test_unequal_classes_are_drawn_without_replacement():
    """Of two, the first follows p, the second p without the first: sum_a p_a p_c / (1 - p_a)."""
    found = drawn("random", 20000, 5, 2, seed=4, entropy_decrease=8.0)
    p = class_probabilities(5, 8.0, torch.Generator().manual_seed(4))
    expected = [p[c] + sum(p[a] * p[c] / (1 - p[a]) for a in range(5) if a != c) for c in range(5)]
    assert p_of(frequency(found, 5), expected) > 1e-3
    assert p_of(frequency(found, 5), [1] * 5) < 1e-6


def test_halves_and_forgetting():
    found = drawn("halves", 101)
    assert {c for subset in found[:51] for c in subset} == set(range(5))
    assert {c for subset in found[51:] for c in subset} == set(range(5, 10))
    found = drawn("forgetting", 200)
    assert {c for subset in found[:100] for c in subset} == set(range(10))
    assert {c for subset in found[100:] for c in subset} == set(range(5))


def test_cycle_without_and_with_replacements():
    ordered = list(combinations(range(10), 2))
    assert drawn("cycle", 100) == (ordered * 3)[:100]
    found = drawn("cycle", 9000, replaced_frac=0.3)
    same = sum(subset == ordered[k % 45] for k, subset in enumerate(found)) / 9000
    # both classes kept, or replaced by the same again (or by each other): (0.7 + 0.03)^2 + 0.03^2
    assert same == pytest.approx(0.73**2 + 0.03**2, abs=0.02)
    assert {len(subset) for subset in found} == {1, 2}


def test_many_classes_have_more_subsets_than_memory():
    """5 of 100 classes: 75 million subsets, of which a cycle begins with the first."""
    generator = torch.Generator().manual_seed(0)
    assert list(subsets("cycle", 2, 100, 5, generator)) == [(0, 1, 2, 3, 4), (0, 1, 2, 3, 5)]


def test_more_couples_than_a_list_holds_are_refused(monkeypatch):
    monkeypatch.setattr("streams.scole.MOST_SUBSETS", 44)
    with pytest.raises(UserError, match=r"is 2; 10 classes have 45 subsets of so many; kind=couples goes"):
        scole("digits", 5, kind="couples")


def test_couples_are_few_and_equally_likely():
    found = drawn("couples", 5000, couples_frac=0.2)
    assert len(set(found)) == num_couples(10, 2, 0.2) == 9
    assert p_of([found.count(pair) for pair in set(found)], [1] * 9) > 1e-3
    assert len(set(drawn("couples", 5000))) == 45


def test_prob_reduction_levels_the_visits():
    free, levelled = (frequency(drawn("random", 300, prob_reduction=r)).float().std() for r in (1.0, 2.0))
    assert levelled < 0.3 * free


def test_iid_has_every_class():
    assert drawn("iid", 3) == [tuple(range(10))] * 3


def test_seed_decides():
    assert drawn("random", 50) == drawn("random", 50) != drawn("random", 50, seed=1)


def test_experiences_hold_their_classes_and_evaluation_stays_linear():
    stream = scole("digits", 300, rows_per_class=20)
    assert [e.domain for e in stream.eval_sets] == [f"class {c}" for c in range(10)]
    assert sum(e.num_samples for e in stream.eval_sets) == 360
    for experience in stream.experiences[:20]:
        data = experience.load()
        rows = data.rows(torch.arange(len(data)))
        assert rows.targets.unique().tolist() == list(experience.classes)
        assert rows.targets.bincount()[list(experience.classes)].tolist() == [20, 20]
        assert experience.practises == tuple(f"class {c}" for c in experience.classes)
        assert torch.equal(rows.inputs, data.inputs[rows.sample_ids])
    assert stream.practised_domains[:20] == [list(e.classes) for e in stream.experiences[:20]]
    assert set(stream.trained_domains) == {-1}


def test_rows_are_drawn_anew_and_know_the_first_visit():
    stream = scole("digits", 100, rows_per_class=30)
    first, again = [e for e in stream.experiences if 3 in e.classes][:2]
    rows = [e.load().rows(torch.arange(60)) for e in (first, again)]
    ids = [batch.sample_ids[batch.targets == 3].tolist() for batch in rows]
    assert set(ids[0]) != set(ids[1])
    assert set(rows[1].experience_id[rows[1].targets == 3].tolist()) == {first.id}


def test_whole_classes_by_default():
    stream = scole("digits", 5)
    targets = torch.cat([stream.experiences[0].load().rows(torch.arange(1)).targets])
    assert stream.experiences[0].num_samples > 250
    assert targets.dtype == torch.int64


WRONG = [
    ({"classes_per_experience": 11}, "stream.classes_per_experience is 11; with kind random there are 10 classes"),
    (
        {"classes_per_experience": 6, "kind": "halves"},
        "stream.classes_per_experience is 6; with kind halves there are 5",
    ),
    ({"kind": "daily"}, "stream.kind is 'daily'; it must be one of random, halves"),
    ({"entropy_decrease": -1}, "stream.entropy_decrease is -1; it must be a number of at least 0"),
    ({"entropy_decrease": 2, "kind": "iid"}, "stream.entropy_decrease is 2, which kind iid does not have"),
    ({"replaced_frac": 1.5, "kind": "cycle"}, "stream.replaced_frac is 1.5; it must be a number from 0 to 1"),
    ({"replaced_frac": 0.5}, "stream.replaced_frac is 0.5, which kind random does not have; it must be 0 unless"),
    ({"couples_frac": 0.01, "kind": "couples"}, "stream.couples_frac is 0.01, which leaves none of the 45 subsets"),
    ({"entropy_decrease": 5000}, "stream.entropy_decrease=5000 and stream.prob_reduction=1.0 leave experience 0 fewer"),
    (
        {"prob_reduction": 1e9, "kind": "halves", "num_experiences": 400},
        "stream.entropy_decrease=0.0 and stream.prob_reduction=1000000000.0 leave experience",
    ),
    ({"prob_reduction": 0.5}, "stream.prob_reduction is 0.5; it must be a number of at least 1"),
    ({"rows_per_class": 0}, "stream.rows_per_class is 0; it must be an integer of at least 1"),
    ({"num_experiences": 0}, "stream.num_experiences is 0; it must be an integer of at least 1"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as found:
        scole("digits", **({"num_experiences": 5} | arguments))
    assert str(found.value).startswith(sentence)

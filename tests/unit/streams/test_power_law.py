"""The schedules by their laws, and the rows that they bring."""

import math
import pickle
from dataclasses import replace

import pytest
import torch

from cl.core import UserError
from streams.permuted import permuted
from streams.power_law import BUDGETED, SHAPES, counts, power_law
from streams.split import split

N = 57_927
"""Rows of an experience in the published code."""

# archana53/power-law-for-CI, values of the formulas for t = 9 and r = 1, which the code rounds down
PUBLISHED_POWER_LAW = [1389, 2034, 2880, 3967, 5336, 7032, 9104, 11602, 14582]
PUBLISHED_EXPONENTIAL = [36621, 13472, 4956, 1823, 671, 247, 91, 33, 12]
PUBLISHED_TOTALS = {0: 57_927, 1: 91_896, 2: 112_763, 3: 126_092, 9: 151_757}


def test_published_schedules():
    assert counts("power_law", 10, N)[:9, 9].tolist() == pytest.approx(PUBLISHED_POWER_LAW, abs=1)
    assert counts("exponential", 10, N)[:9, 9].flip(0).tolist() == pytest.approx(PUBLISHED_EXPONENTIAL, abs=1)
    totals = counts("power_law_unrestricted", 10, N).sum(dim=0)
    for t, total in PUBLISHED_TOTALS.items():
        # the closed form fits the code's list within 0.024 %
        assert totals[t].item() == pytest.approx(total, rel=2.4e-4)
    # 1.1, 1.2 and 1.3 to the power of -5.6: 0.586, 0.360 and 0.230, to whole rows
    assert counts("power_law_unrestricted", 4, 100)[:, 3].tolist() == [23, 36, 59, 100]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_every_schedule_shows_the_new_rows_and_nothing_of_the_future(kind, T):
    n = counts(kind, T, 500)
    assert n.diagonal().tolist() == [500] * T
    assert not n.tril(-1).any()
    assert (n >= 0).all() and (n <= 500).all()


@pytest.mark.parametrize("ratio", [1.0, 0.75, 0.5, 0.25, 0.1, 0.0021])
def test_equal_rehearsal_across_schedules(ratio):
    totals = {kind: (counts(kind, 12, 1003, ratio).sum(dim=0) - 1003)[1:].tolist() for kind in BUDGETED}
    assert set(map(tuple, totals.values())) == {(math.floor(ratio * 1003),) * 11}


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 2.5])
def test_lag_power_is_a_power_of_the_lag(exponent, offset):
    """log n is linear in log (lag + c) with slope -a, up to whole rows."""
    n = counts("lag_power", 30, 1_000_000, exponent=exponent, offset=offset)[:29, 29].double().flip(0)
    lag = torch.arange(1, 30, dtype=torch.float64)
    expected = (lag + offset) ** -exponent
    expected *= 1_000_000 / expected.sum()
    assert (n - expected).abs().max() <= 1


def test_power_law_is_a_power_of_the_position():
    n = counts("power_law", 10, 10**6)[:9, 9].double()
    assert (n[8] / n[0]).item() == pytest.approx((0.18 / 0.10) ** 4, rel=1e-4)
    assert n.diff().min() > 0


def test_exponential_and_uniform():
    n = counts("exponential", 6, 10**6, scale=2.0)[:5, 5].double()
    assert (n[1:] / n[:-1]).tolist() == pytest.approx([math.exp(0.5)] * 4, rel=1e-4)
    assert counts("uniform", 4, 10)[:3, 3].sort().values.tolist() == [3, 3, 4]


def test_zero_exponent_is_uniform():
    assert torch.equal(counts("lag_power", 8, 700, exponent=0), counts("uniform", 8, 700))


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    from scipy.stats import chisquare

    return float(chisquare(observed.numpy(), expected.numpy()).pvalue)


def test_rows_follow_the_schedule_and_every_old_row_is_as_likely():
    """Chi-square over phases: which experiences rows come from, and which rows of an experience."""
    base = permuted("digits", 6, train_rows=300)
    stream = power_law(base, "lag_power", ratio=0.5, seed=3)
    n = counts("lag_power", 6, 300, 0.5)
    drawn = torch.zeros(300)
    for t, experience in enumerate(stream.experiences):
        batch = experience.load().batch
        assert torch.equal(batch.experience_id.bincount(minlength=6), n[:, t])
        for j in range(t):
            rows = batch.sample_ids[batch.experience_id == j]
            assert len(rows.unique()) == len(rows), "an old experience repeats no row within a phase"
            drawn += rows.bincount(minlength=300)
    assert chi_square_p(drawn, torch.full((300,), drawn.mean())) > 1e-3
    # the check bites: a buffer of a sixth of the rows is drawn from six times as often
    few = power_law(base, "lag_power", ratio=0.5, buffer_rows=250, seed=3)
    drawn = sum(
        (b := e.load().batch).sample_ids[b.experience_id < e.id].bincount(minlength=300) for e in few.experiences[1:]
    ).float()
    assert chi_square_p(drawn, torch.full((300,), drawn.mean())) < 1e-6


def test_rows_are_those_of_their_experience():
    base = permuted("digits", 4)
    batch = power_law(base, ratio=0.3).experiences[3].load().batch
    for j in range(4):
        mine = batch.experience_id == j
        again = base.experiences[j].load().rows(batch.sample_ids[mine])
        assert torch.equal(again.inputs, batch.inputs[mine])
        assert torch.equal(again.targets, batch.targets[mine])


def test_phases_draw_anew():
    stream = power_law(permuted("digits", 3), "uniform", ratio=0.2)
    first, second = (e.load().batch for e in stream.experiences[1:])
    rows = [batch.sample_ids[batch.experience_id == 0].tolist() for batch in (first, second)]
    assert len(set(rows[0]) & set(rows[1])) < 0.5 * len(rows[1])


def test_bounded_buffer_redraws_the_same_few_rows():
    stream = power_law(permuted("digits", 4), "uniform", ratio=1.0, buffer_rows=90)
    kept = {j: set() for j in range(3)}
    for experience in stream.experiences:
        batch = experience.load().batch
        for j in range(experience.id):
            rows = batch.sample_ids[batch.experience_id == j]
            kept[j].update(rows.tolist())
            assert rows.bincount().unique().numel() <= 3, "stored rows repeat equally often, give or take one"
    assert {len(rows) for rows in kept.values()} == {30}


def test_experiences_say_what_they_practise():
    stream = power_law(split("digits"), "exponential", ratio=0.05, num_rows=200)
    names = [eval_set.domain for eval_set in stream.eval_sets]
    # ten rows at lag 4: e^-3 of 63 % of them is less than a row, so the oldest is left out
    assert stream.experiences[1].practises == (names[0], names[1])
    assert names[0] not in stream.experiences[4].practises
    assert stream.trained_domains == [0, 1, 2, 3, 4]
    assert stream.practised_domains[1] == [0, 1]
    assert stream.experiences[1].classes == (0, 1, 2, 3)
    assert [e.num_samples for e in stream.experiences] == [200, 210, 210, 210, 210]


def test_a_thousand_experiences_load_nothing_before_they_are_asked():
    base = permuted("digits", 1000)
    loads = []

    def counted(experience):
        return replace(experience, load=lambda: loads.append(experience.id) or experience.load())

    stream = power_law(replace(base, experiences=[counted(each) for each in base.experiences]))
    assert loads == []
    last = stream.experiences[999].load()
    assert len(last) == stream.experiences[999].num_samples == 2 * 1437
    assert len(set(loads)) < 1000, "an experience reads those it rehearses, not every earlier one"


def test_a_thousand_experiences_are_small():
    assert len(pickle.dumps(power_law(permuted("digits", 1000)).experiences)) < 40_000_000


BASE = permuted("digits", 3)
WRONG = [
    ({"ratio": 0}, "stream.ratio is 0; it must be above 0 and at most 1"),
    ({"ratio": 1e-4}, "stream.ratio is 0.0001, which rehearses none of 1437 rows; it must be at least 1 / 1437"),
    ({"ratio": 1.5}, "stream.ratio is 1.5; it must be above 0 and at most 1"),
    ({"ratio": float("nan")}, "stream.ratio is nan; it must be above 0"),
    ({"ratio": 0.5, "kind": "joint"}, "stream.ratio is 0.5, which kind joint does not have"),
    ({"exponent": -1}, "stream.exponent is -1; it must be a finite number of at least 0"),
    ({"exponent": float("inf")}, "stream.exponent is inf; it must be a finite number of at least 0"),
    ({"exponent": "steep"}, "stream.exponent is 'steep'; it must be a finite number of at least 0"),
    ({"offset": 0}, "stream.offset is 0; it must be a finite number above 0"),
    ({"scale": 0, "kind": "exponential"}, "stream.scale is 0; it must be a finite number above 0"),
    ({"exponent": 1, "kind": "uniform"}, "stream.exponent is 1, which kind uniform does not have; it has no parameter"),
    ({"scale": 1}, "stream.scale is 1, which kind power_law does not have; it has exponent, offset"),
    ({"ratio": True}, "stream.ratio is True; it must be above 0 and at most 1"),
    ({"kind": "cubic"}, "stream.kind is 'cubic'; it must be one of power_law, lag_power"),
    ({"num_rows": 2000}, "stream.num_rows is 2000; the smallest experience of the base has 1437 rows"),
    ({"num_rows": 0}, "stream.num_rows is 0; it must be an integer of at least 1"),
    ({"buffer_rows": 1}, "stream.buffer_rows is 1; it must be at least 2, one row for each past experience"),
    ({"base": "permuted"}, "stream.base is 'permuted'; it must be a stream"),
    ({"base": permuted("digits", 2, "task_incremental")}, "stream.base is permuted_digits in the setting task_incr"),
    ({"base": power_law(BASE)}, "stream.base is power_law_permuted_digits, whose experiences share rows already"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError) as found:
        power_law(**({"base": BASE} | arguments))
    assert str(found.value).startswith(sentence)
    assert "\n" not in str(found.value)


def test_a_buffer_must_fill_a_batch():
    stream = power_law(BASE, buffer_rows=50)
    stream.check_batch(50)
    with pytest.raises(UserError, match=r"stream.buffer_rows is 50, less than one batch; .* trainer.batch_size=64"):
        stream.check_batch(64)

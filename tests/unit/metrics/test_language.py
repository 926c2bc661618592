"""Language metrics by hand, in nats."""

import math

import pytest

from cl.metrics import (
    EvalTable,
    adaptation_gap,
    aufc,
    aufc_log_perplexity,
    bits_per_byte,
    cumulative_forgetting,
    joint_gap,
    language_summary,
    perplexity,
    source_forgetting,
)

# domain "web" is the old distribution, never trained on
TABLE = EvalTable.from_rows(
    [[3.2, 2.0, 3.5], [3.6, 2.6, 1.5], [3.4, 2.2, 1.7]],
    R_init=[3.0, 4.0, 3.8],
    trained=[1, 2, 1],
    domains=["web", "code", "maths"],
    measure="loss",
)


@pytest.mark.filterwarnings("error")
def test_perplexity_averages_in_nats():
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert perplexity([math.log(2), math.log(8)], num_tokens=[3, 1]) == pytest.approx(2 * math.sqrt(2))
    assert math.isinf(perplexity(1e4))
    assert math.isnan(perplexity([1.0, math.nan]))


def test_bits_per_byte():
    # a uniform model over bytes needs 8 bits each, whatever the tokenizer
    assert float(bits_per_byte(math.log(256), 100, 100)) == pytest.approx(8)
    assert float(bits_per_byte(4 * math.log(256), 25, 100)) == pytest.approx(8)
    assert bits_per_byte([math.log(2), 2 * math.log(2)], [10, 10], [40, 40]).tolist() == pytest.approx([0.25, 0.5])


def test_source_forgetting_is_a_curve():
    assert source_forgetting(TABLE, "web").tolist() == pytest.approx([0.2, 0.6, 0.4])
    with pytest.raises(ValueError, match="no domain 'books' in the table; there are web, code, maths"):
        source_forgetting(TABLE, "books")


def test_cumulative_forgetting_counts_repaired_damage():
    # code rises by 0.6 in experience 1 and is repaired in 2; maths rises by 0.2 in 2; web is not of the stream
    assert cumulative_forgetting(TABLE) == pytest.approx(0.6 + 0.2)
    # a rise before the end of the first visit is bad learning, not forgetting
    assert cumulative_forgetting(EvalTable.from_rows([[2.0, 3.0], [2.5, 9.0]], measure="loss")) == 0.5
    assert math.isnan(cumulative_forgetting(TABLE.upto(1)))
    assert math.isnan(cumulative_forgetting(EvalTable.from_rows([[2.0, 3.0], [None, 1.0]], measure="loss")))


def test_gaps_to_references():
    assert adaptation_gap(TABLE, single=[9.9, 1.9, 1.2]) == pytest.approx((0.1 + 0.3) / 2)
    assert joint_gap(TABLE, joint=[3.1, 2.0, 1.6]) == pytest.approx((0.3 + 0.2 + 0.1) / 3)


def test_aufc_of_the_log_perplexity_is_the_one_of_the_loss():
    # code: 0, 0.6, 0.2 over two experiences; maths: 0, 0.2 over one
    assert aufc_log_perplexity(TABLE) == pytest.approx(((0.3 + 0.4) / 2 + 0.1) / 2)
    assert aufc_log_perplexity(TABLE, [10, 20, 40]) == aufc(TABLE, [10, 20, 40])


def test_summary_with_and_without_inputs():
    bare = language_summary(TABLE)
    assert {key for key, value in bare.items() if not math.isnan(value)} == {"perplexity", "cumulative_forgetting"}
    full = language_summary(
        TABLE,
        num_tokens=[10, 10, 20],
        num_bytes=[40, 20, 80],
        source="web",
        single=[9.9, 1.9, 1.2],
        joint=[3.1, 2.0, 1.6],
    )
    assert set(full) == set(bare)
    assert full == pytest.approx(
        {
            "perplexity": math.exp((3.4 + 2.2 + 1.7) / 3),
            "perplexity_micro": math.exp((3.4 + 2.2 + 2 * 1.7) / 4),
            "bits_per_byte": (3.4 / 4 + 2.2 / 2 + 1.7 / 4) / 3 / math.log(2),
            "cumulative_forgetting": 0.8,
            "source_forgetting": 0.4,
            "adaptation_gap": 0.2,
            "joint_gap": 0.2,
        }
    )
    stopped = language_summary(TABLE.upto(0), source="web", single=[1, 1, 1], joint=[1, 1, 1])
    assert all(math.isnan(value) for value in stopped.values())


@pytest.mark.parametrize(
    "metric",
    [
        cumulative_forgetting,
        aufc_log_perplexity,
        language_summary,
        lambda table: adaptation_gap(table, [1.0]),
        lambda table: joint_gap(table, [1.0]),
        lambda table: source_forgetting(table, "0"),
    ],
)
def test_accuracies_are_refused(metric):
    with pytest.raises(ValueError, match="needs losses in nats; the table holds the measure 'accuracy'"):
        metric(EvalTable.from_rows([[0.9]]))

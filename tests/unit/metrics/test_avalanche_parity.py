"""Where Avalanche defines the same thing, the same number comes out; its standalone metrics are driven with R.

Forgetting (first minus last), BWT and forward transfer agree on streams without revisits. Known differences, which
the last two tests pin down: Avalanche has no value for a single experience but logs 0 in its stream metrics, and a
revisit overwrites its initial value.
"""

import math

import numpy as np
import pytest

from cl.metrics import EvalTable, bwt, forgetting_first, fwt

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def avalanche_metrics():
    """Imported once, and here only: it takes 10 seconds."""
    return pytest.importorskip("avalanche.evaluation.metrics")


def drive_forgetting(metric, table):
    """As its plugin does: the value of the trained domain after training is `initial`, later ones are `last`."""
    for row, taught in zip(table.R, table.trained, strict=True):
        metric.update(taught, row[taught], initial=True)
        for j in range(table.num_domains):
            if j != taught:
                metric.update(j, row[j])
    return metric.result()


@pytest.mark.parametrize("T", [2, 3, 6])
def test_forgetting_and_bwt(avalanche_metrics, T):
    table = EvalTable.from_rows(RNG.uniform(size=(T, T)))
    forgotten = drive_forgetting(avalanche_metrics.Forgetting(), table)
    transferred = drive_forgetting(avalanche_metrics.BWT(), table)
    # a domain learned last keeps the `last` value from before its training; the stream metric counts earlier ones only
    earlier = np.flatnonzero(table.earlier)
    assert forgetting_first(table) == pytest.approx(np.mean([forgotten[j] for j in earlier]))
    assert bwt(table) == pytest.approx(np.mean([transferred[j] for j in earlier]))


@pytest.mark.parametrize("T", [2, 3, 6])
def test_forward_transfer(avalanche_metrics, T):
    table = EvalTable.from_rows(RNG.uniform(size=(T, T)), R_init=RNG.uniform(size=T))
    metric = avalanche_metrics.ForwardTransfer()
    for j, value in enumerate(table.R_init):
        metric.update(j, value, initial=True)
    for i in range(T - 1):
        metric.update(i + 1, table.R[i, i + 1])
    assert fwt(table) == pytest.approx(np.mean(list(metric.result().values())))


def test_one_experience_is_undefined_here_and_empty_there(avalanche_metrics):
    table = EvalTable.from_rows([[0.9]])
    assert drive_forgetting(avalanche_metrics.Forgetting(), table) == {}
    assert math.isnan(forgetting_first(table))


def test_a_revisit_keeps_the_first_value_here_and_loses_it_there(avalanche_metrics):
    table = EvalTable.from_rows([[0.9, 0.1], [0.5, 0.8], [0.7, 0.6]], trained=[0, 1, 0])
    theirs = drive_forgetting(avalanche_metrics.Forgetting(), table)
    # they compare the second visit with the value before it
    assert theirs[0] == pytest.approx(0.7 - 0.5)
    assert forgetting_first(table) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.6)) / 2)

"""What the core makes of experiences that train on several domains: columns of R, cuts, evaluation, results."""

from functools import partial

import pytest
import torch

from cl.backbones.mlp import Mlp
from cl.config import TrainerConfig
from cl.metrics import EvalTable, bwt, forward_facilitation, learning, seen_average, steps_to_reach
from cl.trainer import Trainer
from strategies.joint import Joint
from strategies.naive import Naive
from streams.permuted import permuted
from streams.power_law import power_law
from streams.scole import scole
from streams.text_domains import text_domains


def run(stream, strategy=None, **config):
    trainer = Trainer(
        stream,
        Mlp,
        [strategy or Naive()],
        optimizer=partial(torch.optim.SGD, lr=0.05),
        config=TrainerConfig(**({"max_steps": 3, "batch_size": 16, "device": "cpu"} | config)),
    )
    return trainer.run()


def test_columns_of_what_is_practised():
    stream = scole("digits", 6, kind="cycle")
    assert [e.name for e in stream.experiences[:2]] == ["classes 0 1", "classes 0 2"]
    assert stream.practised_domains[:3] == [[0, 1], [0, 2], [0, 3]]
    assert stream.trained_domains == [-1] * 6
    assert permuted("digits", 3).practised_domains == []


def test_a_mixture_teaches_all_that_is_new_in_it(text_root):
    """Of two domains that are new together the last one alone once counted as taught."""
    domains = [{"name": name, "path": "news.jsonl", "eval_path": "held.jsonl"} for name in "abc"]
    order = [["a", "b"], {"a": 1, "c": 3}, ["b", "a"]]
    stream = text_domains(domains, order=order, root=str(text_root), context=16)
    assert stream.trained_domains == [-1, 2, -1]
    assert stream.practised_domains == [[0, 1], [0, 2], [0, 1]]
    R = [[2.0, 4.0, 5.0], [2.5, 4.5, 1.0], [2.0, 4.0, 1.5]]
    table = EvalTable.from_rows(R, trained=stream.trained_domains, practises=stream.practised_domains, measure="loss")
    # after the first experience the mean of a and b; each is learnt when it is new
    assert seen_average(table).tolist() == pytest.approx([3.0, 8 / 3, 2.5])
    assert learning(table) == pytest.approx((2.0 + 4.0 + 1.0) / 3)
    assert bwt(table) == pytest.approx((0.0 + 0.0 + 0.5) / 3)


def test_the_first_experiences_are_measured_on_what_they_practise_and_on_what_nobody_does():
    cut = scole("digits", 6, kind="cycle").first(2)
    never = [f"class {c}" for c in (7, 8, 9)]
    assert [e.domain for e in cut.eval_sets] == ["class 0", "class 1", "class 2", *never]
    assert cut.practised_domains == [[0, 1], [0, 2]]


def test_a_run_writes_down_what_it_practised():
    stream = scole("digits", 4, kind="cycle")
    result = run(stream)
    assert result.practises == [[0, 1], [0, 2], [0, 3], [0, 4]]
    table = EvalTable.from_result(vars(result))
    assert table.first_visit.tolist() == [0, 0, 1, 2, 3, *[4] * 5]
    assert result.metrics["learning"] == sum(table.R[k, j] for k, j in ((0, 0), (0, 1), (1, 2), (2, 3), (3, 4))) / 5
    # the full test set, class by class
    assert result.metrics["final"] == sum(result.R[-1]) / 10
    assert run(permuted("digits", 2)).practises == []


def test_only_seen_domains_are_evaluated_where_that_is_asked():
    result = run(scole("digits", 3, kind="cycle"), evaluate="seen")
    known = [[j for j, value in enumerate(row) if value is not None] for row in result.R]
    assert known == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    rehearsed = run(power_law(permuted("digits", 3, train_rows=100)), evaluate="seen", eval_every=2)
    assert {(i, j) for i, _, j, _ in rehearsed.within} == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}


def test_facilitation_of_a_run():
    """Steps until later experiences reach the level, from evaluations inside them."""
    stream = power_law(permuted("digits", 3, train_rows=320), "uniform")
    result = run(stream, max_steps=None, epochs=8, eval_every=5)
    table = EvalTable.from_result(vars(result))
    steps = steps_to_reach(table, 0.3)
    assert set(steps) == {0, 1, 2}
    assert result.cost["updates"] == 8 * (20 + 40 + 40)
    for i, count in steps.items():
        start = [0, 160, 480][i]
        reached = [step for k, step, j, value in result.within if (k, j) == (i, i) and value >= 0.3]
        assert count == reached[0] - start
    assert forward_facilitation(table, 0.3) == steps[0] / ((steps[1] + steps[2]) / 2)


def test_joint_sees_everything_once():
    result = run(scole("digits", 5, rows_per_class=20), Joint())
    assert result.practises == []
    assert result.trained == [-1]
    assert len(result.R) == 1

"""Where a run on text stands, in tokens: what is kept, tracked and drawn of it, against numbers worked out by hand."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cl.config import TrainerConfig
from cl.core import EvalSet, Setting
from cl.report.curves import view
from cl.report.html import page
from cl.report.load import sections
from cl.report.payload import payload
from cl.report.tokens import by_tokens
from cl.result import Result
from cl.schedules import linear
from cl.testing import ToyNet, toy_stream
from cl.tracking import Memory, points
from cl.trainer import Trainer
from strategies.naive import Naive

TEXT = Setting.CONTINUAL_PRETRAINING
STEP = 16 * 8
"""Tokens of a step: 16 rows of 8."""


def trainer_of(run_dir=None, observers=(), stream=None, **config):
    return Trainer(
        stream or with_general(),
        ToyNet,
        [Naive()],
        optimizer=partial(torch.optim.SGD, lr=0.5),
        schedule=linear,
        config=TrainerConfig(**({"batch_size": 16, "max_steps": 6, "eval_every": 4, "device": "cpu"} | config)),
        run_dir=run_dir,
        observers=observers,
    )


def with_general():
    """The toy stream of text, and held-out text of a fourth table of successors, which nothing teaches."""
    stream, other = toy_stream(TEXT), toy_stream(TEXT, seed=9)
    general = EvalSet("general", other.eval_sets[0].load, other.eval_sets[0].num_samples)
    return replace(stream, eval_sets=[*stream.eval_sets, general])


@pytest.fixture(scope="module")
def done():
    memory = Memory(every_steps=1)
    trainer = trainer_of(observers=[memory])
    return trainer.run(), trainer, memory


def test_the_course_names_step_tokens_and_rate(done):
    course = done[0].course
    assert course[0] == [-1, 0, 0, 0.0], "before training"
    by_step = {step: (experience, tokens, rate) for experience, step, tokens, rate in course}
    # 18 steps, so every one is kept; the rate of step n is 0.5 (1 - n / 18)
    assert sorted(by_step) == list(range(19))
    assert by_step[4] == (0, 4 * STEP, pytest.approx(0.5 * (1 - 3 / 18)))
    assert by_step[18] == (2, 18 * STEP, pytest.approx(0.5 * (1 - 17 / 18)))


def test_without_a_measurement_before_training_the_course_begins_at_the_first_step():
    assert trainer_of(max_steps=2, evaluate="seen").run().course[0] == [0, 1, STEP, 0.5]


def test_where_all_are_running_text_there_are_bits_per_byte():
    """Each domain is 96 rows of 8 tokens; their texts are of different length."""
    stream, sizes = toy_stream(TEXT), [1000, 3000, 500]
    sets = [replace(each, num_bytes=size) for each, size in zip(stream.eval_sets, sizes, strict=True)]
    result = trainer_of(max_steps=2, stream=replace(stream, eval_sets=sets)).run()
    assert (result.num_tokens, result.num_bytes) == ([768] * 3, sizes)
    bits = [loss * 768 / size / np.log(2) for loss, size in zip(result.R[-1], sizes, strict=True)]
    assert result.metrics["bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-12)
    assert result.metrics["perplexity"] == pytest.approx(np.exp(np.mean(result.R[-1])), rel=1e-12)
    assert "bits_per_byte" not in trainer_of(max_steps=2).run().metrics


def test_where_one_domain_is_no_running_text_there_are_no_bits_per_byte():
    stream = toy_stream(TEXT)
    first, *others = stream.eval_sets
    mixed = trainer_of(max_steps=1, stream=replace(stream, eval_sets=[replace(first, num_bytes=1000), *others])).run()
    assert mixed.num_tokens == mixed.num_bytes == []
    assert "bits_per_byte" not in mixed.metrics


def test_images_have_no_course():
    assert trainer_of(stream=toy_stream(Setting.DOMAIN_INCREMENTAL)).run().course == []


def test_a_long_run_keeps_two_hundred_points_and_every_measurement():
    trainer = trainer_of(max_steps=500, eval_every=0, eval_rows=4)
    course = trainer.run().course
    assert len(course) < 230
    assert {500, 1000, 1500} <= {step for _, step, *_ in course}


def test_text_that_nothing_teaches_is_measured_inside_experiences(done):
    within = done[0].within
    assert sorted({int(j) for i, _, j, _ in within if i == 0}) == [0, 3]
    assert sorted({int(j) for i, _, j, _ in within if i == 2}) == [0, 1, 2, 3]


def test_curves_over_tokens_are_tracked(done):
    result, _, memory = done
    expected = [(0, result.R_init[0])]
    for i, row in enumerate(result.R):
        inside = {step: value for experience, step, j, value in result.within if (experience, j) == (i, 0)}
        expected += [(step * STEP, inside[step]) for step in sorted(inside)] + [(6 * (i + 1) * STEP, row[0])]
    found = dict(memory.curve("tokens/task_00"))
    assert {tokens: found[tokens] for tokens, _ in expected} == dict(expected)
    assert [(p.step, p.value) for p in points(result) if p.name == "tokens/task_00"] == expected
    rates = dict(memory.curve("tokens/lr"))
    assert rates[4 * STEP] == pytest.approx(0.5 * (1 - 3 / 18))


def test_a_resumed_run_has_the_same_course_and_curves(tmp_path, done):
    memory = Memory(every_steps=1)
    first = trainer_of(tmp_path, [memory], checkpoint_every=3)
    flush = first.ledger.flush

    def stop(state):
        flush(state)
        if state.step == 9:
            first.request_stop()

    first.ledger.flush = stop
    assert first.run().status == "interrupted"
    resumed = trainer_of(tmp_path, [memory], checkpoint_every=3).run(resume=True)
    assert resumed.course == done[0].course
    assert sorted(memory.curve("tokens/task_01")) == sorted(
        (p.step, p.value) for p in points(done[0]) if p.name == "tokens/task_01"
    )


def test_token_accuracy_is_the_share_of_next_tokens_predicted(done):
    result, trainer, _ = done
    found = {(i, j): value for name, i, j, value in result.extra if name == "token_accuracy"}
    data = trainer.state.stream.eval_sets[1].load()
    rows = data.rows(torch.arange(len(data)))
    with torch.no_grad():
        said = trainer.state.model.eval()(rows).logits.argmax(-1)
    assert found[2, 1] == pytest.approx((said == rows.targets).float().mean().item())
    assert len(found) == 4 * 4, "every domain, before training and after every experience"
    assert result.metrics["token_accuracy"] == pytest.approx(np.mean([found[2, j] for j in range(4)]))


def test_the_area_under_the_forgetting_curve_is_over_tokens():
    result = trainer_of(max_steps=[6, 12, 6]).run()
    R = np.array(result.R)
    # experiences end after 6, 18 and 24 steps; of the first domain the curve is 0, a, b at these
    a, b = R[1, 0] - R[0, 0], R[2, 0] - R[0, 0]
    first = (12 * a / 2 + 6 * (a + b) / 2) / 18
    second = (R[2, 1] - R[1, 1]) / 2
    assert result.metrics["aufc_log_perplexity"] == pytest.approx((first + second) / 2)
    assert result.metrics["aufc"] != pytest.approx(result.metrics["aufc_log_perplexity"])


# the report


def test_curves_for_the_report_average_over_seeds(done):
    result = done[0]
    other = replace(result, seed=1, R=[[v + 1 for v in row] for row in result.R], R_init=[9.0] * 4)
    found = by_tokens([result, other])
    assert found.tokens == [k * STEP for k in (0, 4, 6, 10, 12, 16, 18)]
    assert found.ends == [6 * STEP, 12 * STEP, 18 * STEP]
    assert found.values[0, 2] == pytest.approx(result.R[0][0] + 0.5)
    assert np.isnan(found.values[1, 1]), "the second domain is not measured inside the first experience"
    assert found.rate[-1] == pytest.approx(0.5 / 18) and found.rate_at[-1] == 18 * STEP
    assert found.num_seeds == 2


def test_the_line_of_the_rate_jumps_where_the_schedule_does():
    """Borders of experiences between points that a long run keeps: the rate falls to 0, and begins anew."""
    result = trainer_of(max_steps=[300, 301, 299], eval_every=0, eval_rows=4, schedule_span="experience").run()
    found = by_tokens([result])
    at = dict.fromkeys(found.rate_at, 0)
    for tokens in at:
        rates = [rate for place, rate in zip(found.rate_at, found.rate, strict=True) if place == tokens]
        at[tokens] = rates
    assert at[0] == [0.5] and at[900 * STEP] == [pytest.approx(0.5 / 299)]
    assert at[300 * STEP] == [pytest.approx(0.5 / 300), 0.5]
    assert at[601 * STEP] == [pytest.approx(0.5 / 301), 0.5]
    assert at[301 * STEP] == [0.5], "the first step of an experience is kept"
    assert found.rate_at == sorted(found.rate_at)


def test_runs_without_a_course_have_no_curves(done):
    assert by_tokens([replace(done[0], course=[])]) is None
    assert by_tokens([replace(done[0], domains=[str(j) for j in range(13)])]) is None


def test_the_page_and_the_figures_show_them(done, tmp_path):
    from cl.report.figures import save_figures

    section = view(sections([done[0]])[0])
    assert any(path.name == "tokens.png" for path in save_figures(section, tmp_path))
    text = page([section], "text")
    assert 'data-chart="tokens"' in text and " tokens/s</td>" in text
    drawn = json.loads(payload([section]))["sections"][0]["strategies"][0]["tokens"]
    assert drawn["tokens"][-1] == drawn["at"][-1] == 18 * STEP and len(drawn["values"]) == 4
    old = Result(**{k: v for k, v in vars(done[0]).items() if k != "course"})
    assert 'data-chart="tokens"' not in page([view(sections([old])[0])], "text")

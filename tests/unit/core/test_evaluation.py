"""Measuring: right numbers, and no trace on the model, the random state or the training."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.config import TrainerConfig
from cl.core import IGNORED, Batch, EvalSet, Output, Setting, TensorData
from cl.evaluation import evaluating, measure, predict
from cl.hooks import Strategy
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer

DIL, TEXT = Setting.DOMAIN_INCREMENTAL, Setting.CONTINUAL_PRETRAINING


def state_of(setting, backbone=ToyNet):
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return Trainer(toy_stream(setting), backbone, [], optimizer=optimizer, config=TrainerConfig(device="cpu")).state


class Wobbly(ToyNet):
    """Dropout and batch norm, one of them frozen on purpose: modes that must come back as they were."""

    def __init__(self, info):
        super().__init__(info)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(12)
        self.norm.eval()

    def features(self, inputs):
        return self.drop(self.norm(super().features(inputs)))


def test_accuracy_is_the_share_of_right_rows():
    state = state_of(DIL)
    eval_set = state.stream.eval_sets[1]
    rows = state.prepare(eval_set.load().rows(torch.arange(eval_set.num_samples)))
    with torch.no_grad():
        right = (state.model(rows).logits.argmax(1) == rows.targets).float().mean().item()
    value, num_tokens = measure(state, [], eval_set, batch_size=7)
    assert value == pytest.approx(right)
    assert num_tokens == eval_set.num_samples, "a row that is no text is one token"


def test_loss_is_the_mean_over_tokens_in_nats():
    state = state_of(TEXT)
    eval_set = state.stream.eval_sets[0]
    rows = state.prepare(eval_set.load().rows(torch.arange(eval_set.num_samples)))
    with torch.no_grad():
        expected = F.cross_entropy(state.model(rows).logits.flatten(0, 1), rows.targets.flatten()).item()
        value, _ = measure(state, [], eval_set, batch_size=7)
    assert value == pytest.approx(expected, rel=1e-6)
    assert value == pytest.approx(math.log(8), rel=0.3), "an untrained model is about uniform over 8 tokens"


@pytest.mark.parametrize("batch_size", [1, 13, 1000])
def test_batch_size_changes_speed_only(batch_size):
    state = state_of(DIL)
    with torch.no_grad():
        assert measure(state, [], state.stream.eval_sets[0], batch_size) == measure(
            state, [], state.stream.eval_sets[0], 96
        )


def test_some_rows_are_always_the_same_ones():
    state = state_of(DIL)
    eval_set = state.stream.eval_sets[0]
    value, num_tokens = measure(state, [], eval_set, batch_size=8, max_rows=20)
    assert num_tokens == 20
    assert measure(state, [], eval_set, batch_size=7, max_rows=20) == (value, 20)


def test_tokens_that_are_not_to_be_learnt_count_nowhere():
    """Logits 0, ..., 0, log 9 over 8 tokens: the last one has the probability 9/16, any other 1/16."""

    class Certain(Strategy):
        def eval_forward(self, state, batch):
            return Output(torch.tensor([0.0] * 7 + [math.log(9)]).expand(*batch.targets.shape, 8))

    targets = torch.tensor([[7, 0, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 7], [IGNORED] * 4])
    text, extra = EvalSet("text", lambda: TensorData(torch.zeros_like(targets), targets), 3), {}
    value, num_tokens = measure(state_of(TEXT), [Certain()], text, batch_size=2, extra=extra)
    assert value == pytest.approx((2 * math.log(16 / 9) + math.log(16)) / 3)
    assert extra == {"token_accuracy": pytest.approx(2 / 3)}
    assert num_tokens == 3 * 4, "but they were read, as in a budget in tokens"


def test_a_domain_with_a_score_of_its_own_is_measured_by_it():
    asked, extra = [], {}

    def score(data, answer, num_rows, batch_size):
        asked.append((len(answer(data.rows(torch.arange(2))).logits), num_rows, batch_size))
        return {"exact": 0.25, "length": 3.0}

    state = state_of(DIL)
    with torch.no_grad():
        found = measure(state, [], replace(state.stream.eval_sets[0], score=score), 7, max_rows=5, extra=extra)
    assert (found, extra, asked) == ((0.25, 5), {"length": 3.0}, [(2, 5, 7)])


def test_text_is_measured_in_batches_whose_logits_fit(monkeypatch):
    """3 rows of 8 tokens have 192 logits over a vocabulary of 8; half a row is measured as one."""

    class Sizes(Strategy):
        def eval_forward(self, state, batch):
            sizes.append(len(batch))

    state = state_of(TEXT)
    for limit, expected in ((3 * 64 + 63, [3, 3, 3, 1]), (32, [1] * 10), (1 << 26, [4, 4, 2])):
        sizes = []
        monkeypatch.setattr("cl.evaluation.MAX_LOGITS", limit)
        with torch.no_grad():
            measure(state, [Sizes()], state.stream.eval_sets[0], batch_size=4, max_rows=10)
        assert sizes == expected


def test_modes_random_state_and_gradient_mode_are_as_found():
    model = Wobbly(toy_stream(DIL).info)
    modes = [(name, module.training) for name, module in model.named_modules()]
    before = torch.get_rng_state()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
        torch.rand(3)
    assert [(name, module.training) for name, module in model.named_modules()] == modes
    assert not dict(modes)["norm"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error():
    model = Wobbly(toy_stream(DIL).info)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training
    assert not model.norm.training


class Answers(Strategy):
    """Predicts class `answer`, or leaves it to the next."""

    def __init__(self, answer):
        self.answer = answer

    def eval_forward(self, state, batch):
        if self.answer is None:
            return None
        return Output(F.one_hot(torch.full((len(batch),), self.answer), 4).float())


def test_the_first_strategy_with_an_answer_predicts():
    state = state_of(DIL)
    ids = torch.arange(2)
    batch = Batch(torch.zeros(2, 1, 8, 8), ids, ids, ids)
    assert predict(state, [Answers(None), Answers(3), Answers(1)], batch).logits.argmax(1).tolist() == [3, 3]
    expected = state.model(batch).logits
    assert torch.equal(predict(state, [Answers(None)], batch).logits, expected)


class Hears(Strategy):
    """What strategies are told of measurements: the columns that have a number, and the rows behind each."""

    settings = frozenset(Setting)

    def __init__(self):
        self.told = []

    def on_evaluation(self, state, row, max_rows):
        self.told.append(([j for j, value in enumerate(row) if value is not None], max_rows))


def run(eval_every=0, backbone=Wobbly, stream=None, strategies=(), **config):
    trainer = Trainer(
        stream or toy_stream(DIL),
        backbone,
        strategies,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        config=TrainerConfig(epochs=2, batch_size=16, eval_every=eval_every, device="cpu", **config),
    )
    return trainer.run(), trainer.state.model.state_dict()


def test_measuring_within_experiences_changes_nothing_else():
    (plain, weights), (watched, same) = run(), run(eval_every=5)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert watched.R == plain.R
    assert plain.within == []


def test_within_measures_the_domains_seen_at_every_period():
    result, _ = run(eval_every=10)
    # 24 steps per experience; its end is a row of R and not repeated here
    assert sorted({(stage, step) for stage, step, _, _ in result.within}) == [
        (0, 10),
        (0, 20),
        (1, 34),
        (1, 44),
        (2, 58),
        (2, 68),
    ]
    assert {j for stage, _, j, _ in result.within if stage == 1} == {0, 1}
    assert all(0 <= value <= 1 for *_, value in result.within)


def test_rows_within_can_be_fewer():
    fewer, _ = run(eval_every=10, within_eval_rows=5)
    assert {round(value * 5, 6) % 1 for *_, value in fewer.within} == {0.0}
    assert fewer.R == run()[0].R


def test_evaluating_what_was_seen_leaves_the_rest_open():
    result, _ = run(evaluate="seen")
    assert [[value is None for value in row] for row in result.R] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert result.R_init == [None, None, None]
    assert [row[:i] for i, row in enumerate(run()[0].R, 1)] == [row[:i] for i, row in enumerate(result.R, 1)]


def test_every_measurement_can_be_of_fewer_rows():
    hears = Hears()
    fewer, _ = run(eval_every=20, eval_rows=32, strategies=[hears])
    values = [*(value for row in (fewer.R_init, *fewer.R) for value in row), *(value for *_, value in fewer.within)]
    assert {value * 32 % 1 for value in values} == {0.0}
    assert fewer.R != run(eval_every=20)[0].R
    ends, all_columns = [([0], 32), ([0, 1], 32), ([0, 1, 2], 32)], ([0, 1, 2], 32)
    assert hears.told == [told for end in ends for told in (end, all_columns)], "and nothing before training"
    both = Hears()
    assert run(eval_every=20, eval_rows=32, within_eval_rows=5, strategies=[both])[0].R == fewer.R
    assert [max_rows for _, max_rows in both.told] == [5, 32] * 3
    assert run(eval_rows=1000)[0].R == run()[0].R, "there are no more than 96"


def columns_within(stream, backbone=Wobbly):
    """By experience, the columns measured inside it, and those that strategies are told of."""
    hears = Hears()
    result, _ = run(eval_every=20, backbone=backbone, stream=stream, strategies=[hears])
    measured = [sorted({j for stage, _, j, _ in result.within if stage == i}) for i in range(len(result.R))]
    return measured, [columns for columns, _ in hears.told[::2]]


def with_stranger(stream):
    """A fourth domain, which no experience teaches."""
    return replace(stream, eval_sets=[*stream.eval_sets, replace(stream.eval_sets[0], domain="stranger")])


def test_which_domains_are_measured_within():
    plain, text = toy_stream(DIL), toy_stream(TEXT)
    seen = [[0], [0, 1], [0, 1, 2]]
    assert columns_within(with_stranger(plain)) == (seen, seen)
    general = [[*columns, 3] for columns in seen]
    assert columns_within(with_stranger(text), ToyNet) == (general, seen), "what language itself loses is for us"
    first, *others = plain.experiences
    rehearsing = replace(plain, experiences=[replace(first, practises=("toy 2",)), *others])
    assert columns_within(rehearsing)[0] == [[0, 2], [0, 1, 2], [0, 1, 2]]
    nameless = replace(plain, experiences=[replace(first, domain="all of them"), *others])
    assert columns_within(nameless)[0] == [[0, 1, 2]] * 3
    strange = with_stranger(text)
    unsaid = replace(strange, experiences=[*text.experiences[:2], replace(text.experiences[2], domain="all of them")])
    assert columns_within(unsaid, ToyNet)[0] == [[0], [0, 1], [0, 1, 2, 3]], "it may teach the stranger"

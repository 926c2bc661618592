"""Update periods against a loop written by hand, with optimizers that remember."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.core import Setting, UserError
from strategies.gdumb import Gdumb
from strategies.recall_merge import RecallMerge
from strategies.update_periods import UpdatePeriods

PERIODS = {"first.bias": 1, "first.*": 3, "head.w*": 2}


def by_hand(recorder, optimizer, reduce="sum", periods=(("first.weight", 3), ("head.weight", 2))):
    """Train again on the recorded batches: gradients added up in lists, one optimizer per period."""
    model = recorder.start
    names = dict(model.named_parameters())
    slow = dict(periods)
    groups = {period: [p for n, p in names.items() if slow.get(n, 1) == period] for period in (1, 2, 3)}
    optimizers = {period: optimizer(group) for period, group in groups.items() if group}
    lists = {name: [] for name in names}
    for number, step in enumerate(recorder.steps, 1):
        loss = F.cross_entropy(model(step.batch).logits, step.batch.targets)
        for name, grad in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
            lists[name].append(grad)
        for period, own in optimizers.items():
            if number % period:
                continue
            for name, p in names.items():
                if slow.get(name, 1) == period:
                    p.grad = torch.stack(lists[name]).sum(0) / (period if reduce == "mean" else 1)
                    lists[name] = []
            own.step()
        yield {name: p.detach().clone() for name, p in names.items()}


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.01),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_every_step_is_that_of_a_loop_by_hand(lab, optimizer, reduce):
    recorder, _ = lab.run([UpdatePeriods(PERIODS, reduce)], optimizer=optimizer, max_steps=8, epochs=None)
    wanted = list(by_hand(recorder, optimizer, reduce))
    assert len(wanted) > 20
    for step, weights in zip(recorder.steps, wanted, strict=True):
        lab.close(step.after, weights, rtol=1e-5, atol=1e-6)


def test_the_oracle_notices_another_period(lab):
    recorder, _ = lab.run([UpdatePeriods(PERIODS | {"first.*": 4})], max_steps=8, epochs=None)
    last = list(by_hand(recorder, partial(torch.optim.SGD, lr=0.1)))[-1]
    lab.dies(lambda: lab.close(recorder.steps[-1].after, last, rtol=1e-5, atol=1e-6))


def test_slow_parameters_stand_still_between_their_steps(lab):
    recorder, trainer = lab.run([UpdatePeriods({"first.weight": 5})], max_steps=12, epochs=None)
    for number, step in enumerate(recorder.steps, 1):
        moved = not torch.equal(step.before["first.weight"], step.after["first.weight"])
        assert moved == (number % 5 == 0), "counted over the run, not anew in every experience"
        assert not torch.equal(step.before["head.weight"], step.after["head.weight"])
    # 36 steps: the last one has been gathered since the 35th
    gathered = trainer.strategies[0].state_dict()["gathered"]
    assert set(gathered) == {"first.weight"}
    wanted = recorder.steps[-1].gradients["first.weight"]
    lab.close(gathered["first.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_one_period_for_all_is_a_larger_batch(lab):
    """C steps of batch B with a mean of gradients are one step of batch C B, where nothing else depends on the step."""
    recorder, _ = lab.run([UpdatePeriods({"*": 2}, "mean")], max_steps=2, epochs=None)
    first, second = recorder.steps[:2]
    lab.close(first.after, first.before, rtol=0, atol=0)
    both = first.batch.cat((first.batch, second.batch))
    gradient = lab.gradient(recorder.start, lab.label_loss(recorder.start, both))
    wanted = {name: first.before[name] - lab.lr * g for name, g in gradient.items()}
    lab.close(second.after, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [Gdumb(), RecallMerge()], ids=lambda other: other.name)
def test_no_gradient_outlives_weights_that_are_put_back(lab, other):
    for pair in ([UpdatePeriods({"*": 2}), other], [other, UpdatePeriods({"*": 2})]):
        with pytest.raises(UserError, match=rf"{other.name} .* and update_periods would still step it by gradients of"):
            lab.run(pair)
    lab.run([RecallMerge(start="merged"), UpdatePeriods({"*": 2})], max_steps=2, epochs=None)


def test_texts_too(lab):
    strategy = UpdatePeriods({"first.*": 2})
    assert Setting.CONTINUAL_PRETRAINING in strategy.settings
    recorder, _ = lab.run([strategy], Setting.CONTINUAL_PRETRAINING, max_steps=3, epochs=None)
    first = recorder.steps[0]
    assert torch.equal(first.before["first.weight"], first.after["first.weight"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"periods": 3}, "update_periods.periods is 3"),
        (
            {"periods": {"head.*": 0}},
            "update_periods.periods: that of head.* is 0; it must be an integer of at least 1",
        ),
        ({"reduce": "max"}, "update_periods.reduce is 'max'; it must be one of sum, mean"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, says):
    with pytest.raises(UserError) as caught:
        UpdatePeriods(**arguments)
    assert says in str(caught.value)


def test_a_pattern_that_fits_nothing_is_named(lab):
    with pytest.raises(UserError, match=r"names 'body\.\*', which fits no parameter; there are head\.weight"):
        lab.run([UpdatePeriods({"body.*": 2})])

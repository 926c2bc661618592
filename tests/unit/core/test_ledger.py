"""The books of a run: what is told to observers, what is written, and how a broken loss ends a run."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cl.config import TrainerConfig
from cl.core import Setting, TensorData
from cl.hooks import Strategy
from cl.ledger import Ledger, NonFiniteLoss, peak_memory_bytes
from cl.observe import Observer
from cl.result import Result
from cl.state import Cost
from cl.testing import ToyNet, toy_stream
from cl.trainer import Trainer


class Breaks(Strategy):
    """A penalty that is not finite at one step."""

    def __init__(self, at, value=float("nan")):
        self.at, self.value = at, value

    def penalty(self, state, batch, output):
        return output.logits.new_tensor(self.value if state.step == self.at else 0.0)


class Events(Observer):
    """Names of the events, in order."""

    def __init__(self):
        self.seen = []
        self.steps = []
        self.rates = []

    def on_start(self, result, settings):
        self.seen.append("on_start")
        self.settings = settings

    def on_experience_start(self, state, num_steps):
        self.seen.append(f"on_experience_start {num_steps}")

    def on_step(self, state, losses, lr):
        self.steps.append(losses)
        self.rates.append(lr)
        if self.seen[-1] != "on_step":
            self.seen.append("on_step")

    def on_within(self, state, values):
        self.seen.append("on_within")

    def on_evaluation(self, state, result):
        self.seen.append(f"on_evaluation {len(result.R)}")

    def on_checkpoint(self, state, path):
        self.seen.append("on_checkpoint")

    def on_end(self, result):
        self.seen.append(f"on_end {result.status}")


def trainer_of(
    strategies=(), run_dir=None, observers=(), lr=0.1, setting=Setting.DOMAIN_INCREMENTAL, stream=None, **config
):
    return Trainer(
        stream or toy_stream(setting, num_experiences=2),
        ToyNet,
        strategies,
        optimizer=partial(torch.optim.SGD, lr=lr),
        config=TrainerConfig(**({"max_steps": 6, "batch_size": 16, "device": "cpu"} | config)),
        run_dir=run_dir,
        observers=observers,
        settings={"seed": 0},
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    trainer = trainer_of([Breaks(8, value)], tmp_path, checkpoint_every=3)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.run()
    sentence = str(caught.value)
    assert "at step 8 (experience 1, 'toy 1')" in sentence
    assert re.search(r"cross_entropy = [\d.]+, test_ledger = (nan|-?inf)", sentence)
    assert f"the last good checkpoint is {tmp_path}/checkpoints/step-000000006.pt" in sentence
    result = Result.load(tmp_path / "result.json")
    assert (result.status, result.error) == ("failed", sentence)
    assert len(result.R) == 1, "what was measured before stays"


def test_the_step_that_broke_is_not_taken(tmp_path):
    broken = trainer_of([Breaks(8)], tmp_path)
    with pytest.raises(NonFiniteLoss):
        broken.run()
    assert all(tensor.isfinite().all() for tensor in broken.state.model.state_dict().values())


def test_weights_that_an_update_broke_are_not_saved_and_three_are_named(tmp_path):
    class BreaksAll(Strategy):
        def on_step_end(self, state, batch, output):
            if state.step == 6:
                for p in state.parameters().values():
                    p.data.fill_(float("nan"))

    trainer = trainer_of([BreaksAll()], tmp_path)
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.run()
    first, second, third, *more = trainer.state.parameters()
    assert more
    told = f"experience 0, 'toy 0'): {first} = nan, {second} = nan, {third} = nan; the last good checkpoint is"
    assert str(caught.value).startswith(f"the update left weights that are not finite at step 5 ({told} {tmp_path}")
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["step-000000000.pt"]


def test_without_a_folder_it_says_that_there_is_no_checkpoint():
    with pytest.raises(NonFiniteLoss, match="there is no checkpoint"):
        trainer_of([Breaks(0)]).run()


def test_the_last_good_checkpoint_can_be_resumed(tmp_path):
    with pytest.raises(NonFiniteLoss):
        trainer_of([Breaks(8)], tmp_path, checkpoint_every=3).run()
    assert trainer_of([Breaks(-1)], tmp_path, checkpoint_every=3).run(resume=True).status == "done"


def test_any_other_error_of_a_hook_fails_the_run_with_its_words(tmp_path):
    class Raises(Strategy):
        def on_step_end(self, state, batch, output):
            raise RuntimeError("out of luck")

    events = Events()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_of([Raises()], tmp_path, [events]).run()
    result = Result.load(tmp_path / "result.json")
    assert (result.status, result.error) == ("failed", "out of luck")
    assert events.seen[-1] == "on_end failed"


def test_observers_are_told_in_order(tmp_path):
    events = Events()
    trainer_of(run_dir=tmp_path, observers=[events], eval_every=4).run()
    experience = ["on_step", "on_within", "on_step", "on_checkpoint"]
    assert events.seen == [
        "on_start",
        "on_checkpoint",
        "on_experience_start 6",
        *experience,
        "on_evaluation 1",
        "on_experience_start 6",
        *experience,
        "on_evaluation 2",
        "on_end done",
    ]
    assert events.settings == {"seed": 0}
    assert len(events.steps) == 12


def test_losses_are_told_as_terms_that_add_up():
    events = Events()
    trainer_of([Breaks(3, 0.5)], observers=[events]).run()
    assert events.steps[3] == {
        "loss": pytest.approx(events.steps[3]["cross_entropy"] + 0.5),
        "cross_entropy": events.steps[3]["cross_entropy"],
        "test_ledger": 0.5,
    }


def test_the_result_counts_work(tmp_path):
    trainer_of(run_dir=tmp_path).run()
    content = json.loads((tmp_path / "result.json").read_text())
    cost = content["cost"]
    assert (cost["forwards"], cost["backwards"], cost["updates"]) == (192, 192, 12)
    assert cost["wall_s"] >= cost["train_s"] > 0
    assert cost["eval_s"] > 0
    assert cost["train_samples_per_s"] == pytest.approx(192 / cost["train_s"])
    assert cost["eval_samples_per_s"] == pytest.approx(96 * 2 * 3 / cost["eval_s"])
    assert cost["peak_memory_bytes"] > 10_000_000
    assert content["metrics"]["final"] == pytest.approx(sum(content["R"][-1]) / 2)
    assert content["env"]["device"] == "cpu"
    assert not {"token_accuracy", "bits_per_byte"} & set(content["metrics"]), "which are of text"


def test_the_speed_on_text_is_in_tokens():
    """Twelve steps of 16 rows of 8 tokens; three measurements of 96 such rows and of 96 that are 12 long."""
    stream = toy_stream(Setting.CONTINUAL_PRETRAINING, num_experiences=2)
    first, second = stream.eval_sets
    inputs = torch.zeros(96, 12, dtype=torch.int64)
    longer = replace(second, load=lambda: TensorData(inputs, inputs), num_samples=96)
    cost = trainer_of(stream=replace(stream, eval_sets=[first, longer])).run().cost
    assert cost["train_samples_per_s"] * cost["train_s"] == pytest.approx(12 * 16 * 8, rel=1e-12)
    assert first.num_samples == 96
    assert cost["eval_samples_per_s"] * cost["eval_s"] == pytest.approx(3 * 96 * (8 + 12), rel=1e-12)


def test_the_final_measure_is_averaged_over_rows_too(tmp_path):
    """The second test set is three times as long as the first; the mean over domains does not see that."""
    stream = toy_stream(Setting.DOMAIN_INCREMENTAL, num_experiences=2)
    first, second = stream.eval_sets
    thrice = TensorData.concat([second.load()] * 3)
    stream = replace(stream, eval_sets=[first, replace(second, load=lambda: thrice, num_samples=3 * 96)])
    trainer_of(stream=stream, run_dir=tmp_path, lr=0.5).run()
    content = json.loads((tmp_path / "result.json").read_text())
    old, new = content["R"][-1]
    assert old != new
    assert content["metrics"]["final"] == pytest.approx((old + new) / 2, rel=1e-12)
    assert content["metrics"]["final_micro"] == pytest.approx((old + 3 * new) / 4, rel=1e-12)


def test_rows_that_nobody_differentiates_by_go_forward_only():
    class Looks(Strategy):
        def on_step_end(self, state, batch, output):
            with torch.no_grad():
                state.forward(batch[:4])

    cost = trainer_of([Looks()]).run().cost
    assert (cost["forwards"], cost["backwards"]) == (192 + 12 * 4, 192)


def test_heads_that_were_never_trained_say_nothing_of_transfer():
    one_head, heads = trainer_of().run(), trainer_of(setting=Setting.TASK_INCREMENTAL).run()
    assert one_head.metrics["fwt"] == pytest.approx(one_head.R[0][1] - one_head.R_init[1])
    assert heads.R[0][1] is not None and heads.R_init[1] is not None
    assert math.isnan(heads.metrics["fwt"])
    assert heads.metrics["bwt"] == pytest.approx(heads.R[1][0] - heads.R[0][0])


def test_the_result_names_what_ran():
    result = trainer_of([Breaks(-1)]).run()
    assert result.strategy == ["test_ledger"]
    assert result.stream == "toy_domain_incremental"
    assert result.backbone == "toynet"
    assert (result.setting, result.measure, result.seed) == ("domain_incremental", "accuracy", 0)
    assert result.experiences == result.domains == ["toy 0", "toy 1"]
    assert result.trained == [0, 1]


class Slow(Strategy):
    """Its hooks take known times of a clock that stands still otherwise; it keeps fewer bytes as the run goes on."""

    def __init__(self, clock):
        self.name, self.clock = "slow", clock

    def cost(self, state, batch_size):
        return Cost(buffer_bytes=100 - state.step)

    def on_run_start(self, state):
        self.clock.append(1)

    def on_experience_start(self, state):
        self.clock.append(10)

    def on_batch(self, state, batch):
        self.clock.append(100)
        return batch

    def on_experience_end(self, state):
        self.clock.append(10_000)
        state.note("length", 2.5)
        state.trace("height", 3.5)

    def eval_forward(self, state, batch):
        self.clock.append(100_000)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are appended."""
    passed = []
    monkeypatch.setattr("cl.ledger.time.perf_counter", lambda: float(sum(passed)))
    return passed


def test_what_strategies_do_is_charged_to_training_wherever_they_do_it(clock):
    cost = trainer_of([Slow(clock)]).run().cost
    # two experiences of 6 steps; two domains are measured three times, each in one batch
    assert cost["train_s"] == 1 + 2 * 10 + 12 * 100 + 2 * 10_000
    assert cost["eval_s"] == 3 * 2 * 100_000
    assert cost["wall_s"] == cost["train_s"] + cost["eval_s"]


def test_the_books_of_a_run_that_was_resumed_are_those_of_one_that_was_not(tmp_path, clock):
    """The second one fails two steps after its checkpoint, and nothing of these is booked."""
    whole = trainer_of([Slow(clock)]).run()
    with pytest.raises(NonFiniteLoss):
        trainer_of([Slow(clock), Breaks(8)], tmp_path).run()
    resumed = trainer_of([Slow(clock), Breaks(-1)], tmp_path).run(resume=True)
    for key in set(whole.cost) - {"peak_memory_bytes"}:
        assert resumed.cost[key] == whole.cost[key], key
    assert resumed.cost["buffer_bytes"] == 100
    assert resumed.cost["train_samples_per_s"] == 192 / whole.cost["train_s"]
    assert resumed.extra == whole.extra == [["length", 0, 0, 2.5], ["length", 1, 1, 2.5]]
    assert resumed.traces == whole.traces == [["height", 6, 3.5], ["height", 12, 3.5]]


def test_what_is_measured_of_no_experience_or_of_no_single_domain_has_a_column():
    class Notes(Strategy):
        def on_run_start(self, state):
            state.note("before", 1)

        def on_experience_end(self, state):
            state.note("after", 2)

    stream = toy_stream(Setting.DOMAIN_INCREMENTAL, num_experiences=2)
    first, second = stream.experiences
    mixed = replace(stream, experiences=[replace(first, domain="both of them"), second])
    result = trainer_of([Notes()], stream=mixed).run()
    assert result.trained == [-1, 1]
    assert result.extra == [["before", -1, 0, 1.0], ["after", 0, 0, 2.0], ["after", 1, 1, 2.0]]
    assert all(type(value) is float for *_, value in result.extra)


def test_time_goes_on_until_a_card_is_done(clock, monkeypatch):
    """Work is only asked for when the loop goes on, and nobody else is charged with the waiting."""
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: clock.append(5))
    ledger = Ledger(trainer_of().ledger.result, [], None, torch.device("cuda", 0))
    with ledger.charged("train_s"):
        clock.append(2)
    assert ledger.clock["train_s"] == 7


def test_no_time_is_no_speed(clock):
    cost = trainer_of().run().cost
    assert cost["train_s"] == cost["eval_s"] == 0
    assert cost["train_samples_per_s"] == cost["eval_samples_per_s"] == 0


def test_peak_memory_is_what_the_card_or_the_system_says(monkeypatch):
    monkeypatch.setattr("torch.cuda.max_memory_allocated", {torch.device("cuda", 1): 123}.get)
    assert peak_memory_bytes(torch.device("cuda", 1)) == 123
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells it in a file")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    assert peak_memory_bytes(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_peak_memory_is_that_of_the_whole_run_and_of_no_run_before(tmp_path, monkeypatch):
    peaks = iter([700, 900, *[50] * 10])
    monkeypatch.setattr("cl.ledger.peak_memory_bytes", lambda device: next(peaks))
    with pytest.raises(NonFiniteLoss):
        trainer_of([Breaks(8)], tmp_path).run()
    assert trainer_of([Breaks(-1)], tmp_path).run(resume=True).cost["peak_memory_bytes"] == 900
    forgotten = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", forgotten.append)
    Ledger(trainer_of().ledger.result, [], None, torch.device("cuda", 0)).open({})
    assert forgotten == [torch.device("cuda", 0)]

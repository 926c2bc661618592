"""Every promise of the strategy contract is broken on purpose here, and the test for it must notice."""

import pickle
import random

import pytest
import torch

from cl.buffers.reservoir import Reservoir
from cl.core import Batch, Setting, Source
from cl.hooks import Contract, Strategy
from cl.state import Cost, tensor_bytes
from cl.testing import StrategyContract
from strategies._pooled import added

DIL = Setting.DOMAIN_INCREMENTAL


class Good(Strategy):
    """Replays four rows. Source: none, it is an example."""

    settings = frozenset({DIL})
    contract = Contract(zero={"size": 0}, forgets_less_by=0.02)

    def __init__(self, size=4):
        self.size, self.buffer = size, Reservoir(60)

    def on_batch(self, state, batch):
        if not self._extra():
            return batch
        return added(state, batch, self.size, lambda: self.drawn(state), Source.REPLAY, self.name, weight=1.0)

    def drawn(self, state):
        generator = state.seeds.named(self.name)
        return state.prepare(self.buffer.rows(self.buffer.draw(self.size, generator)))

    def on_step_end(self, state, batch, output):
        self.buffer.add(batch, state.seeds.named(self.name))

    def _extra(self):
        return self.size if len(self.buffer) else 0

    def cost(self, state, batch_size):
        return Cost(self._extra(), self._extra(), tensor_bytes(self.buffer.columns))

    def state_dict(self):
        return self.buffer.state_dict()

    def load_state_dict(self, state):
        self.buffer.load_state_dict(state)


class DrawsForEveryPiece(Good):
    """Of a step that is cut into micro-batches, and so replays more rows."""

    def on_batch(self, state, batch):
        return batch.extended(self.drawn(state), Source.REPLAY, self.name) if self._extra() else batch


class DrawsGlobally(Good):
    def on_step_end(self, state, batch, output):
        torch.rand(1)


class DrawsFromPython(Good):
    def on_step_end(self, state, batch, output):
        super().on_step_end(state, batch, output)
        self.size = random.choice([3, 4])


class ForgetsItsState(Good):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class LeavesEvalMode(Good):
    def on_experience_end(self, state):
        state.model.eval()


class LeavesAHook(Good):
    def on_run_start(self, state):
        state.model.register_forward_hook(lambda *_: None)


class Freezes(Good):
    def on_experience_end(self, state):
        next(state.model.parameters()).requires_grad_(False)


class HidesRows(Good):
    def cost(self, state, batch_size):
        return Cost(0, 0, tensor_bytes(self.buffer.columns))


class HidesBytes(Good):
    def cost(self, state, batch_size):
        return Cost(self._extra(), self._extra(), 0)


class CallsTheModelItself(Good):
    """One more forward pass that neither `cost` nor the run's books mention."""

    def on_experience_end(self, state):
        with torch.no_grad():
            state.model(state.prepare(self.buffer.rows(torch.arange(4))))


class WorksUnderVmap(Good):
    """Per-sample gradients that nobody counted."""

    def on_experience_end(self, state):
        model, rows = state.model, state.prepare(self.buffer.rows(torch.arange(5)))

        def loss(weights, x):
            ids = torch.zeros(1, dtype=torch.int64)
            batch = Batch(x.unsqueeze(0), ids, ids, ids)
            return torch.func.functional_call(model, weights, (batch,)).logits.square().sum()

        weights = {name: p.detach() for name, p in model.named_parameters()}
        torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, rows.inputs)


class CountsWorkUnderVmap(WorksUnderVmap):
    def on_experience_end(self, state):
        super().on_experience_end(state)
        state.count(forwards=5, backwards=5)


class MakesAMaskElsewhere(Good):
    """A mask that is made without asking where the batch lies."""

    def on_batch(self, state, batch):
        batch.inputs = batch.inputs * torch.ones(batch.inputs.shape)
        return batch


class OverlooksTheScale(Good):
    """Adds to gradients while they are still multiplied."""

    def on_batch(self, state, batch):
        weight = next(state.model.parameters())
        self.hook = weight.register_hook(lambda gradient: gradient + 0.1)
        return batch

    def on_step_end(self, state, batch, output):
        self.hook.remove()


class Explodes(Good):
    def on_gradients(self, state):
        if state.step == 20:
            next(iter(state.parameters().values())).grad.fill_(float("nan"))


class Overfills(Good):
    def on_step_end(self, state, batch, output):
        super().on_step_end(state, batch, output)
        if state.step == 50:
            self.buffer.filled = 61


class StoresGraphs(Good):
    def on_batch(self, state, batch):
        self.kept = state.parameters()
        return super().on_batch(state, batch)

    def state_dict(self):
        return super().state_dict() | {"kept": getattr(self, "kept", {})}


class IsNeverZero(Good):
    contract = Contract(zero={"size": 1})


class ActsAtOnce(Good):
    def penalty(self, state, batch, output):
        return output.logits.square().mean()


class DoesNotHelp(Good):
    contract = Contract(forgets_less_by=0.9)


class StopsLearning(Good):
    """Forgets nothing because it learns nothing more."""

    def on_gradients(self, state):
        if state.experience.id > 0:
            for p in state.parameters().values():
                p.grad.zero_()


class SavesObjects(Good):
    def state_dict(self):
        return super().state_dict() | {"when": random.Random(0)}


class SaysNothing(Good):
    """No origin is given."""

    contract = Contract()


PROMISES = [
    (DrawsForEveryPiece, "test_a_step_is_the_same_however_it_is_cut"),
    (DrawsGlobally, "test_global_random_state_is_untouched"),
    (DrawsFromPython, "test_same_seed_same_run"),
    (DrawsFromPython, "test_global_random_state_is_untouched"),
    (LeavesEvalMode, "test_leaves_modes_hooks_and_requires_grad_as_found"),
    (LeavesAHook, "test_leaves_modes_hooks_and_requires_grad_as_found"),
    (Freezes, "test_leaves_modes_hooks_and_requires_grad_as_found"),
    (HidesRows, "test_declared_cost_is_counted_cost"),
    (CallsTheModelItself, "test_declared_cost_is_counted_cost"),
    (WorksUnderVmap, "test_declared_cost_is_counted_cost"),
    (HidesBytes, "test_declared_bytes_cover_what_is_kept"),
    (Explodes, "test_gradients_and_weights_are_finite"),
    (Overfills, "test_buffers_stay_within_capacity_and_detached"),
    (StoresGraphs, "test_buffers_stay_within_capacity_and_detached"),
    (IsNeverZero, "test_zero_strength_is_naive"),
    (ActsAtOnce, "test_first_step_is_naive"),
    (SavesObjects, "test_state_survives_a_safe_load"),
    (MakesAMaskElsewhere, "test_runs_on_a_card"),
    (OverlooksTheScale, "test_loss_scaling_changes_nothing"),
]


def contract_of(strategy):
    return type(f"Contract{strategy.__name__}", (StrategyContract,), {"strategy": strategy})()


@pytest.mark.parametrize(("strategy", "promise"), PROMISES, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_promise_is_noticed(strategy, promise):
    with pytest.raises((AssertionError, pickle.UnpicklingError, RuntimeError)):
        getattr(contract_of(strategy), promise)(DIL)


@pytest.mark.parametrize("strategy", [ForgetsItsState, DrawsFromPython])
def test_a_run_that_does_not_go_on_exactly_is_noticed(strategy, tmp_path):
    with pytest.raises(AssertionError):
        contract_of(strategy).test_resumes_exactly(DIL, tmp_path)


@pytest.mark.parametrize("strategy", [DoesNotHelp, StopsLearning])
def test_no_use_is_noticed(strategy):
    with pytest.raises(AssertionError):
        contract_of(strategy).test_forgets_less_than_naive()


@pytest.mark.parametrize(
    "promise", ["test_docstring_says_what_it_is_and_where_it_comes_from", "test_contract_is_complete"]
)
def test_silence_is_noticed(promise):
    with pytest.raises(AssertionError):
        getattr(contract_of(SaysNothing), promise)()


def test_counted_work_under_vmap_is_accepted():
    contract_of(CountsWorkUnderVmap).test_declared_cost_is_counted_cost(DIL)


class TestGood(StrategyContract):
    """The unbroken one passes everything."""

    strategy = Good

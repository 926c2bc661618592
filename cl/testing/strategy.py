"""The contract of a strategy, as a test class to inherit:

class TestMine(StrategyContract):
    strategy = Mine
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cl.core import Setting, Stream, UserError
from cl.hooks import Strategy, overrides
from cl.state import tensor_bytes
from cl.testing.card import CARD, pretended_card
from cl.testing.companion import Companion, Curious
from cl.testing.probe import BATCH_SIZE, LEARNING_RATE, RECIPE, Record, buffers_of, equal, train, weights_of
from cl.testing.toy import ToyNet, toy_stream

STOPS = (35, 49)
"""Steps after which runs are interrupted, at the end of an experience and inside one: the toy's have 36 steps each."""
ACTS_BEFORE_DATA = ("plan", "wrap", "make_optimizer", "step", "on_run_start")
"""Whoever overrides one of these may differ from naive training from the first step on."""
SEEDS = (0, 1)
Metrics = Mapping[str, Any]


class StrategyContract:
    """What every strategy must keep. Each test names the promise; `Strategy.contract` holds its parameters.

    Class attributes:
        strategy: the class under test; built with `contract.toy` and, where a test asks for it, `contract.zero`.
        backbone: network of the toy runs. Replace it by a subclass of `ToyNet`, which counts the rows that pass.
    """

    strategy: type[Strategy]
    backbone: Callable[..., nn.Module] = ToyNet

    def make(self, **arguments: Any) -> Strategy:
        """The strategy for the toy stream."""
        return self.strategy(**{**self.strategy.contract.toy, **arguments})

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per setting the strategy declares."""
        if "setting" in metafunc.fixturenames:
            metafunc.parametrize("setting", sorted(self.strategy.settings), ids=str)

    def run(self, setting: Setting) -> Record:
        """A plain run of the strategy, made once for all tests that look at it."""
        return _plain_run(type(self), setting)

    def train(self, setting: Setting | Stream, strategies: Sequence[Strategy] | None = None, **options: Any) -> Record:
        """A toy run of the strategy, or of the strategies given."""
        made = [self.make()] if strategies is None else strategies
        return train(setting, made, backbone=type(self).backbone, **options)

    # what it says of itself

    def test_docstring_says_what_it_is_and_where_it_comes_from(self) -> None:
        module_doc = sys.modules[self.strategy.__module__].__doc__ or ""
        text = module_doc + (inspect.getdoc(self.strategy) or "")
        assert "Source:" in text, "the docstring of the module or the class must have a line `Source: ...`"

    def test_contract_is_complete(self) -> None:
        contract = self.strategy.contract
        assert self.strategy.settings, "declare at least one setting"
        assert contract.zero is not None or contract.why_not_zero, "give contract.zero, or why_not_zero"
        assert contract.forgets_less_by is not None or contract.why_not_better, (
            "give contract.forgets_less_by, or why_not_better"
        )

    def test_refuses_other_settings(self) -> None:
        for setting in sorted(set(Setting) - self.strategy.settings):
            with pytest.raises(UserError, match=setting):
                self.train(setting)

    # what it must not change

    def test_zero_strength_is_naive(self, setting: Setting) -> None:
        zero = self.strategy.contract.zero
        if zero is None:
            pytest.skip(self.strategy.contract.why_not_zero)
        run, naive = self.train(setting, [self.make(**zero)]), naive_run(setting, type(self).backbone)
        assert run.losses == naive.losses
        assert equal(run.weights, naive.weights), f"arguments {dict(zero)} must leave training as it is, bit for bit"
        assert run.result.R == naive.result.R

    def test_first_step_is_naive(self, setting: Setting) -> None:
        acting = [hook for hook in ACTS_BEFORE_DATA if overrides(self.make(), hook)]
        if acting:
            pytest.skip(f"overrides {', '.join(acting)}, which act before there is a past")
        if self.strategy.contract.acts_at_once:
            pytest.skip("declares that it acts at once")
        run, naive = self.run(setting), naive_run(setting, type(self).backbone)
        assert run.losses[0] == naive.losses[0]
        assert equal(run.after_first_step, naive.after_first_step), "with nothing stored, the first step must be naive"

    def test_leaves_modes_hooks_and_requires_grad_as_found(self, setting: Setting) -> None:
        run = self.run(setting)
        changed = {name: (old, run.after[name]) for name, old in run.before.items() if run.after[name] != old}
        assert not changed, f"found before the run and after it: {changed}"

    # what it draws, keeps and spends

    def test_same_seed_same_run(self, setting: Setting) -> None:
        run = self.run(setting)
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            again = self.train(setting)
        assert again.losses == run.losses, "the run must depend on its seed only"
        assert equal(again.weights, run.weights)
        assert again.result.R == run.result.R

    def test_global_random_state_is_untouched(self, setting: Setting) -> None:
        assert not self.run(setting).drew, (
            "draw from `state.seeds.named(self.name)`; a global generator is shared with every other strategy"
        )

    def test_gradients_and_weights_are_finite(self, setting: Setting) -> None:
        # gradients are checked at every step by the probe of the run
        for name, tensor in self.run(setting).weights.items():
            assert tensor.isfinite().all(), f"{name} is not finite after the run"

    def test_buffers_stay_within_capacity_and_detached(self, setting: Setting) -> None:
        run = self.run(setting)
        strategy = run.trainer.strategies[1]
        for i, buffer in enumerate(buffers_of(strategy)):
            most = max(run.largest[i], len(buffer))
            assert most <= buffer.capacity, f"a buffer of {buffer.capacity} rows held {most}"
        for tensor in tree_leaves(strategy.state_dict()):
            assert not isinstance(tensor, Tensor) or not tensor.requires_grad, "stored tensors must be detached"

    def test_declared_cost_is_counted_cost(self, setting: Setting) -> None:
        """Rows are counted by the toy network itself: its calls, and the gradients that come back to its outputs."""
        run = self.run(setting)
        for step, (declared, counted) in enumerate(zip(run.declared, run.counted, strict=True)):
            rows = (counted.forwards, counted.backwards)
            assert (declared.forwards, declared.backwards) == rows, f"extra rows (forward, backward) of step {step}"
        spent = run.trainer.state.spent
        assert (spent.forwards, spent.backwards) == (run.tally.forwards, run.tally.backwards), (
            "rows in result.json against rows the network saw: send them through `state.forward`, or `state.count` them"
        )

    def test_cost_and_state_can_be_asked_before_the_run(self, setting: Setting) -> None:
        """A run that fails in its first hook still writes its result."""
        fresh = self.make()
        assert fresh.cost(self.run(setting).trainer.state, BATCH_SIZE).forwards >= 0
        fresh.state_dict()

    def test_declared_bytes_cover_what_is_kept(self, setting: Setting) -> None:
        run = self.run(setting)
        strategy = run.trainer.strategies[1]
        kept = tensor_bytes(strategy.state_dict())
        assert strategy.cost(run.trainer.state, BATCH_SIZE).buffer_bytes >= kept, f"state_dict() holds {kept} bytes"

    def test_penalty_may_be_asked_twice(self, setting: Setting) -> None:
        """Strategies that need the whole loss of a batch (`state.loss`) ask the others once more."""
        if not overrides(self.make(), "penalty"):
            pytest.skip("has no penalty")
        run, asked = self.run(setting), self.train(setting, [self.make(), Curious()])
        assert asked.losses == run.losses, "`penalty` must not change anything"
        assert equal(asked.weights, run.weights)

    # how it goes on

    def test_state_survives_a_safe_load(self, setting: Setting) -> None:
        saved = self.run(setting).trainer.strategies[1].state_dict()
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        fresh = self.make()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert equal(fresh.state_dict(), saved)

    def test_resumes_exactly(self, setting: Setting, tmp_path: Path) -> None:
        self._resumes_exactly(self.run(setting), setting, lambda: [self.make()], STOPS, tmp_path)

    def test_resumes_exactly_among_others(self, setting: Setting, tmp_path: Path) -> None:
        """With rows of others before and after its own in the batch."""

        def all_three() -> list[Strategy]:
            return [Companion("companion_before"), self.make(), Companion("companion_after")]

        whole = self.train(setting, all_three())
        self._resumes_exactly(whole, setting, all_three, STOPS[1:], tmp_path)

    def _resumes_exactly(
        self, whole: Record, setting: Setting, make: Callable[[], list[Strategy]], stops: Sequence[int], folder: Path
    ) -> None:
        """One run in pieces, with a checkpoint file between them, against one uninterrupted run."""
        losses: list[float] = []
        for number, stop in enumerate((*stops, None)):
            piece = self.train(setting, make(), run_dir=folder, stop_at=stop, resume=number > 0)
            assert piece.result.status == ("done" if stop is None else "interrupted")
            losses += piece.losses
            assert losses == whole.losses[: len(losses)], f"the losses of piece {number} differ"
        assert len(losses) == len(whole.losses)
        assert piece.result.R == whole.result.R
        assert equal(piece.weights, whole.weights)
        states = [[s.state_dict() for s in record.trainer.strategies] for record in (piece, whole)]
        assert equal(*states), "the weights agree, but the state of a strategy does not"

    def test_through_the_avalanche_adapter_the_weights_match(self, setting: Setting) -> None:
        """Avalanche's template with the strategy as a plugin trains the same weights; skipped where it is absent."""
        if find_spec("avalanche") is None:
            pytest.skip("avalanche-lib is not installed")
        if setting == Setting.CONTINUAL_PRETRAINING:
            pytest.skip("Avalanche's data sets have one class per row")
        if self.make().needs_evaluation:
            pytest.skip("follows measurements that no template of Avalanche makes")
        from cl.interop.avalanche import train_in_template

        template = train_in_template(
            toy_stream(setting),
            type(self).backbone,
            [self.make()],
            optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
            epochs=RECIPE["epochs"],
            batch_size=BATCH_SIZE,
        )
        found, wanted = weights_of(template.our_plugin.state.model), self.run(setting).weights
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(
                found[name], wanted[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )

    # where it works, and what it is good for

    def test_a_step_is_the_same_however_it_is_cut(self, setting: Setting) -> None:
        """Gradient accumulation saves memory and changes nothing; a replay batch of 10 rows cannot be cut evenly."""
        is_told = "replay_batch_size" in inspect.signature(self.strategy).parameters
        given = {"replay_batch_size": 10} if is_told else {}
        whole, cut = (
            self.train(
                setting,
                [self.make(**given)],
                batch_size=BATCH_SIZE // pieces,
                accumulation=pieces,
                epochs=None,
                max_steps=4,
            )
            for pieces in (1, 4)
        )
        assert cut.result.status == "done"
        assert all(tensor.isfinite().all() for tensor in cut.weights.values())
        if not self.strategy.contract.why_not_cut:
            assert cut.losses == pytest.approx(whole.losses, rel=1e-4, abs=0), (
                "rows are drawn, and means taken, for the whole step; or say contract.why_not_cut"
            )

    def test_works_under_half_precision(self, setting: Setting) -> None:
        for precision in ("bf16", "fp16"):
            run = self.train(setting, precision=precision, epochs=2)
            assert run.result.status == "done"
            weights = [tensor for tensor in run.weights.values() if tensor.is_floating_point()]
            assert all(tensor.dtype == torch.float32 for tensor in weights), f"weights stay float32 under {precision}"
            assert all(tensor.isfinite().all() for tensor in run.weights.values())

    def test_runs_on_a_card(self, setting: Setting) -> None:
        """What it makes lies where the batches do. The card is pretended, so the numbers are those of the processor."""
        assert equal(self._weights_on_card(setting), self.train(setting, epochs=1).weights)

    def test_loss_scaling_changes_nothing(self, setting: Setting) -> None:
        """With float16 losses are multiplied by a power of two until the step; what acts on gradients must know it."""
        assert equal(self._weights_on_card(setting, precision="fp16"), self.train(setting, epochs=1).weights)

    def _weights_on_card(self, setting: Setting, **options: Any) -> dict[str, Tensor]:
        with pretended_card():
            try:
                run = self.train(setting, epochs=1, device=str(CARD), **options)
            except RuntimeError as error:
                if "already associated to a python object" in str(error):
                    pytest.skip("makes tensors of a class of its own, which a pretended card cannot hold")
                raise
            return {name: tensor.cpu() for name, tensor in run.weights.items()}

    def test_forgets_less_than_naive(self) -> None:
        contract = self.strategy.contract
        if contract.forgets_less_by is None:
            pytest.skip(contract.why_not_better)
        pairs = {(s, seed): self._with_and_without(s, seed) for s in sorted(self.strategy.settings) for seed in SEEDS}
        less = {key: naive["forgetting_first"] - ours["forgetting_first"] for key, (ours, naive) in pairs.items()}
        assert fmean(less.values()) >= contract.forgets_less_by, f"less forgetting than naive: {less}"
        better = {key: _sign(key[0]) * (ours["final"] - naive["final"]) for key, (ours, naive) in pairs.items()}
        assert fmean(better.values()) >= 0, f"it forgets less because it learns less; final minus naive's: {better}"

    def _with_and_without(self, setting: Setting, seed: int) -> tuple[Metrics, Metrics]:
        backbone = type(self).backbone
        # seed 0 is the plain run, which is there already
        run = self.run(setting) if seed == 0 else self.train(toy_stream(setting, seed), seed=seed)
        return run.result.metrics, naive_run(setting, backbone, seed).result.metrics


def _sign(setting: Setting) -> int:
    """A higher measure is better, unless it is a loss."""
    return -1 if setting == Setting.CONTINUAL_PRETRAINING else 1


@cache
def naive_run(setting: Setting, backbone: Callable[..., nn.Module] = ToyNet, seed: int = 0) -> Record:
    """Training without any strategy."""
    return train(toy_stream(setting, seed), [], backbone=backbone, seed=seed)


@cache
def _plain_run(contract: type[StrategyContract], setting: Setting) -> Record:
    return contract().train(setting)

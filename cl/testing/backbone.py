"""The contract of a backbone, as a test class to inherit:

class TestMine(BackboneContract):
    backbone = Mine
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cl.backbones import Backbone, load_backbone, save_backbone
from cl.core import Batch, Output, Setting, StreamInfo, UserError
from cl.hooks import ALL_SETTINGS
from cl.seeding import Seeds
from cl.testing.card import CARD, pretended_card
from cl.testing.probe import equal, weights_of

NUM_ROWS = 6
NUM_OUTPUTS = 5
NUM_HEADS = 3


class BackboneContract:
    """What every backbone must keep.

    Class attributes:
        backbone: `StreamInfo` -> module; a class, or a `functools.partial` with the arguments of a small form.
        input_shape: of a row it reads; the smallest one that shows everything.
        text_shape: the same where rows are tokens.
        settings: where it is used.
    """

    backbone: Callable[[StreamInfo], nn.Module]
    input_shape: tuple[int, ...] = (1, 8, 8)
    text_shape: tuple[int, ...] = (16,)
    settings: frozenset[Setting] = ALL_SETTINGS

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per setting the backbone declares."""
        if "setting" in metafunc.fixturenames:
            metafunc.parametrize("setting", sorted(self.settings), ids=str)

    def info(self, setting: Setting) -> StreamInfo:
        """A stream that the backbone is built for."""
        num_heads = NUM_HEADS if setting == Setting.TASK_INCREMENTAL else 1
        return StreamInfo("contract", setting, self.shape(setting), NUM_OUTPUTS, NUM_HEADS, num_heads)

    def shape(self, setting: Setting) -> tuple[int, ...]:
        return self.text_shape if setting == Setting.CONTINUAL_PRETRAINING else self.input_shape

    def build(self, setting: Setting, seed: int = 0) -> nn.Module:
        with Seeds(seed).as_global("init"):
            return type(self).backbone(self.info(setting))

    def batch(self, setting: Setting, num_rows: int = NUM_ROWS) -> Batch:
        """Rows of every task the setting has."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(num_rows)
        if setting == Setting.CONTINUAL_PRETRAINING:
            tokens = torch.randint(NUM_OUTPUTS, (num_rows, *self.shape(setting)), generator=generator)
            return Batch(tokens, tokens.roll(-1, dims=1), torch.zeros_like(rows), rows)
        inputs = torch.rand(num_rows, *self.shape(setting), generator=generator)
        task_id = rows % NUM_HEADS if setting == Setting.TASK_INCREMENTAL else None
        return Batch(inputs, rows % NUM_OUTPUTS, torch.zeros_like(rows), rows, task_id)

    def test_output_has_the_announced_shape(self, setting: Setting) -> None:
        model, batch = self.build(setting), self.batch(setting)
        output = model(batch)
        assert isinstance(output, Output)
        assert output.logits.shape == (*batch.targets.shape, NUM_OUTPUTS)
        assert output.logits.dtype == torch.float32
        assert output.logits.isfinite().all()
        if getattr(model, "commits", False):
            assert output.state is not None, "what `commit` writes from is Output.state; it is not called without one"

    def test_hidden_is_what_the_head_reads(self, setting: Setting) -> None:
        """Feature distillation and kNN heads rely on it."""
        model, batch = self.build(setting), self.batch(setting)
        hidden = model(batch).hidden
        assert hidden is not None, "return the input of the last layer as Output.hidden"
        assert hidden.shape[:-1] == batch.targets.shape
        widths = {layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)}
        assert hidden.shape[-1] in widths, f"no linear layer reads {hidden.shape[-1]} features; there are {widths}"
        assert hidden.shape[-1] == getattr(model, "num_features", hidden.shape[-1])

    def test_stages_are_the_features_cut_in_steps(self, setting: Setting) -> None:
        """Strategies freeze, quantise and mask inner layers by them."""
        model, batch = self.build(setting).eval(), self.batch(setting)
        if not isinstance(model, Backbone):
            pytest.skip("is no cl.backbones.Backbone, so it cannot be split")
        try:
            stages = model.stages()
        except NotImplementedError as reason:
            pytest.skip(f"cannot be split: {reason}")
        whole, outputs = model(batch), model.stage_outputs(batch.inputs)
        assert len(outputs) == len(stages)
        assert equal(outputs[-1], whole.hidden)
        for start, hidden in enumerate(outputs, 1):
            assert equal(model(replace(batch, inputs=hidden, raw=None), start=start).logits, whole.logits)
        owned = [id(p) for stage in stages for module in stage.modules for p in module.parameters()]
        assert len(owned) == len(set(owned)), "a parameter belongs to two stages"
        wanted = {id(p) for name, p in model.named_parameters() if not name.startswith("head.")}
        assert set(owned) == wanted, "every parameter but the head's belongs to a stage"
        model.between[1] = torch.zeros_like
        assert equal(model(batch).logits, model(replace(batch, inputs=torch.zeros_like(outputs[0])), start=1).logits)

    def test_same_seed_same_network(self, setting: Setting) -> None:
        left, right, other = self.build(setting), self.build(setting), self.build(setting, seed=1)
        assert equal(weights_of(left), weights_of(right)), "draw initial weights from torch's global generator only"
        assert not equal(weights_of(left), weights_of(other))
        batch = self.batch(setting)
        assert torch.equal(left.eval()(batch).logits, right.eval()(batch).logits)

    def test_rows_do_not_see_each_other(self, setting: Setting) -> None:
        """At evaluation a row's output must not depend on the batch it comes in."""
        model, batch = self.build(setting).eval(), self.batch(setting)
        together = model(batch).logits
        for row in range(len(batch)):
            alone = model(batch[row : row + 1]).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)

    def test_heads_are_independent(self) -> None:
        if Setting.TASK_INCREMENTAL not in self.settings:
            pytest.skip("not used where the setting gives task labels")
        setting = Setting.TASK_INCREMENTAL
        model, batch = self.build(setting).eval(), self.batch(setting)
        other = batch[slice(0, len(batch))]
        other.task_id = (torch.arange(len(batch)) + 1) % NUM_HEADS
        assert not torch.allclose(model(batch).logits, model(other).logits), "the task_id changes nothing"

    def test_state_dict_round_trip(self, setting: Setting) -> None:
        model, batch = self.build(setting), self.batch(setting)
        model(batch)  # running statistics are state too
        copy = self.build(setting, seed=1)
        copy.load_state_dict(model.state_dict())
        assert torch.equal(copy.eval()(batch).logits, model.eval()(batch).logits)

    def test_a_folder_brings_it_back(self, setting: Setting, tmp_path: Path) -> None:
        """What `cl export` writes is enough: class, options and weights, what it has committed included."""
        model, batch, made = self.build(setting), self.batch(setting), type(self).backbone
        if "<locals>" in type(model).__qualname__:
            pytest.skip("is a class inside a function, which cannot be imported")
        if getattr(model, "commits", False):
            model.commit(batch, model(batch))
        save_backbone(tmp_path, model, self.info(setting), getattr(made, "keywords", {}))
        assert equal(load_backbone(tmp_path)(batch).logits, model.eval()(batch).logits)

    def test_gradient_reaches_every_parameter(self, setting: Setting) -> None:
        model, batch = self.build(setting), self.batch(setting)
        if getattr(model, "commits", False):
            # what reads a memory learns once there is something in it
            for _ in range(3):
                model.commit(batch, model(batch))
        self._loss(model, batch).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, f"no gradient reaches {name}"
            assert p.grad.isfinite().all(), f"the gradient of {name} is not finite"
            assert p.grad.abs().sum() > 0, f"the gradient of {name} is zero"

    def test_runs_under_half_precision(self, setting: Setting) -> None:
        model, batch = self.build(setting), self.batch(setting)
        for dtype in (torch.bfloat16, torch.float16):
            model.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = self._loss(model, batch)
            loss.backward()
            assert loss.isfinite()
            finite = [name for name, p in model.named_parameters() if p.grad is None or p.grad.isfinite().all()]
            assert finite == [name for name, _ in model.named_parameters()], dtype
            assert all(p.dtype == torch.float32 for p in model.parameters()), "weights stay float32 under autocast"

    def test_runs_on_a_card(self, setting: Setting) -> None:
        """What it makes lies where the batches do. The card is pretended, so the numbers are those of the processor."""
        model, batch = self.build(setting), self.batch(setting)
        self._loss(model, batch).backward()
        with pretended_card():
            there = self.build(setting).to(CARD)
            self._loss(there, batch.to(CARD)).backward()
            if getattr(there, "commits", False):
                there.commit(batch.to(CARD), there(batch.to(CARD)))
            gradients = {name: p.grad.cpu() for name, p in there.named_parameters() if p.grad is not None}
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)

    def test_refuses_rows_it_cannot_read(self) -> None:
        """One sentence for the user, not a matrix that does not fit."""
        setting = sorted(self.settings)[0]
        shape = (2,) * 7
        try:
            model = type(self).backbone(StreamInfo("strange", setting, shape, NUM_OUTPUTS, 1))
        except UserError:
            return
        ids = torch.zeros(2, dtype=torch.int64)
        assert model(Batch(torch.rand(2, *shape), ids, ids, ids)).logits.shape[0] == 2

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        output = model(batch)
        flat = output.logits.flatten(0, -2).float()
        return nn.functional.cross_entropy(flat, batch.targets.flatten())

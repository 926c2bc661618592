"""What is put inside a template of Avalanche: the network as a backbone, our books, our count of right answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from cl.core import Batch, Output
from cl.interop._quiet import quiet

with quiet():
    from avalanche.core import SupervisedPlugin
    from avalanche.models import avalanche_forward
    from avalanche.training.plugins import EvaluationPlugin

if TYPE_CHECKING:
    from cl.interop._host import HostingTrainer


class Learner(nn.Module):
    """What the template trains, as a backbone; replaced parts are followed by `Host.put_in_place`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Output:
        tasks = batch.heads
        return Output(avalanche_forward(self.model, batch.inputs, tasks))


class Bridge(SupervisedPlugin):
    """Tells the trainer of every step of the template, and the template when to stop."""

    def __init__(self, trainer: HostingTrainer) -> None:
        super().__init__()
        self.trainer, self.step, self.num_steps, self.lr, self.rows = trainer, 0, 0, 0.0, 0

    def before_training_iteration(self, template: Any, **kwargs: Any) -> None:
        self.lr = self.trainer.before_step(self.step, self.num_steps)
        # what a strategy adds to the batch is not the stream's
        self.rows = min(len(template.mbatch[0]), template.train_mb_size)

    def before_update(self, template: Any, **kwargs: Any) -> None:
        clip_norm = self.trainer.config.clip_norm
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(template.model.parameters(), clip_norm)

    def after_training_iteration(self, template: Any, **kwargs: Any) -> None:
        self.trainer.state.tokens += self.rows
        step, self.step = self.step, self.step + 1
        self.trainer.after_step(step, self.num_steps, template.loss, self.lr)
        is_counted = self.trainer.config.max_steps is not None or self.trainer.config.max_tokens is not None
        if is_counted and self.step >= self.num_steps:
            template.stop_training()


class Tally(EvaluationPlugin):
    """Counts right answers where Avalanche's metrics would look, after every plugin has had its say."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.rows = 0, 0

    def _update_metrics_and_loggers(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: theirs copies the experience at every event, for metrics and loggers that are not there."""

    def after_eval_iteration(self, template: Any, **kwargs: Any) -> None:
        self.right += int((template.mb_output.argmax(-1) == template.mb_y).sum())
        self.rows += len(template.mb_y)

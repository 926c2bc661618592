"""k-FPF: plain training, interrupted k times to finetune the modules that forget most on stored rows.

    every N / k steps, whatever the stream does:  `steps` times  theta_sel <- SGD step on the finetuning's loss
    loss = CE(buffer batch) + alpha * MSE(logits, stored logits)          (alpha = 0: k-FPF-CE;  alpha > 0: k-FPF-KD)

N is the number of steps of the run. The last of the k finetunings is at the end of training. No row is replayed in
between, so the whole cost is k * repeats * steps * replay_batch_size rows, against N times the batch of experience
replay.

Source: Zhao et al., "Does Continual Learning Equally Forget All Parameters?", ICML 2023; no official code is known.
Differences: as `fpf`. The trigger counts the run's steps and knows no boundaries; where the end of an experience falls
on it, the finetuned model is what is measured. With `period_steps`, for streams without an end that is known, there is
a finetuning at the end of training too.
"""

from __future__ import annotations

from collections.abc import Sequence

from cl.core import Batch, Output, Setting, Stream
from cl.hooks import Contract
from cl.state import Cost, TrainState
from strategies._checks import require, require_count
from strategies._finetune import Finetune


class Kfpf(Finetune):
    """Finetune selected modules on the buffer at regular steps of the run.

    Args:
        k: finetunings of the run, the last one at its end; fewer in a run with fewer steps.
        period_steps: steps from one finetuning to the next, in place of k.
        modules: "auto" takes the modules that react most to a new experience (all of them before there was one), "all"
            is the control; or patterns of module names and classes, such as [head, BatchNorm2d].
        alpha: factor of the squared distance to the logits that the network had when it first saw the row.
        buffer_of: name of another strategy whose buffer is used; None keeps one of its own.
        capacity, policy: of its own buffer: rows stored, and which rows stay (class_balanced for equal classes).
        steps: SGD steps of a finetuning; 0 changes nothing.
        replay_batch_size: rows of each of them.
        lr, momentum: of the finetuning's own SGD; the rate falls to 0 along a cosine.
        repeats: finetunings back to back, each with a cosine and a momentum of its own.
        updates_statistics: finetuning moves the running statistics of batch norm; otherwise batch norm uses them.
        snapshot_steps: "auto" compares the weights every so many steps.
        auto_frac: most of the parameters that "auto" takes.

    Raises:
        UserError: as `fpf`.

    Cost: repeats * steps * replay_batch_size rows forward and backward at the step of a trigger, none at the others.
    """

    settings = frozenset(Setting)
    contract = Contract(
        toy={"capacity": 100, "k": 4, "steps": 30, "snapshot_steps": 6}, zero={"steps": 0}, forgets_less_by=0.25
    )

    def __init__(
        self,
        k: int = 5,
        period_steps: int | None = None,
        modules: str | Sequence[str] = "auto",
        alpha: float = 0.0,
        buffer_of: str | None = None,
        capacity: int = 200,
        policy: str = "reservoir",
        steps: int = 300,
        replay_batch_size: int = 32,
        lr: float = 0.05,
        momentum: float = 0.9,
        repeats: int = 1,
        updates_statistics: bool = True,
        snapshot_steps: int = 100,
        auto_frac: float = 0.05,
    ) -> None:
        require_count("kfpf.k", k)
        require_count("kfpf.period_steps", period_steps, none_means="the steps of the run divided by k")
        require(period_steps != 1, "kfpf.period_steps", period_steps, "at least 2")
        super().__init__(
            modules,
            buffer_of,
            capacity,
            policy,
            steps,
            replay_batch_size,
            lr,
            momentum,
            repeats,
            updates_statistics,
            snapshot_steps,
            auto_frac,
            alpha,
        )
        self.k, self.period_steps, self.policy = k, period_steps, policy

    def check(self, stream: Stream) -> None:
        super().check(stream)
        if stream.info.setting == Setting.CONTINUAL_PRETRAINING:
            allowed = "reservoir or experience_balanced in the continual_pretraining setting, where rows have no class"
            require(self.policy not in ("class_balanced", "ring"), "kfpf.policy", self.policy, allowed)

    def is_due(self, state: TrainState, step: int) -> bool:
        """Whether there is a finetuning once `step` steps have been taken; the one at the end is another matter."""
        # the first step fills the buffers, a trigger needs them filled
        if step < 2 or step >= state.total_steps:
            return False
        if self.period_steps is not None:
            return step % self.period_steps == 0
        # step = round(j N / k) for some j
        j = round(step * self.k / state.total_steps)
        return step == (2 * j * state.total_steps + self.k) // (2 * self.k)

    def on_step_end(self, state: TrainState, batch: Batch, output: Output) -> None:
        super().on_step_end(state, batch, output)
        if self.is_due(state, state.step):
            self.finetune(state)

    def cost(self, state: TrainState, batch_size: int) -> Cost:
        can = self.buffer_of is None or len(self.source(state.strategies)) > 0
        rows = self.rows_per_finetuning if can and self.is_due(state, state.step + 1) else 0
        return super().cost(state, batch_size) + Cost(rows, rows)

"""Forgetting prioritized finetuning: put the few modules that forget most right again, once, on stored rows.

    after training, `steps` times:  theta_sel <- SGD step on the finetuning's loss; every other parameter stays as it is
    loss = CE(buffer batch) + alpha * MSE(logits, stored logits)

Source: Zhao et al., "Does Continual Learning Equally Forget All Parameters?", ICML 2023; no official code is known.
Beside any strategy: `strategy=[replay,fpf] strategy.fpf.buffer_of=replay`, or with a buffer of its own. It belongs
behind the strategy whose buffer it takes.
Differences: "auto" ranks modules by `cl.metrics.sensitivity`, whose normalisation is ours. The paper selects the last
layer and batch norm in convolutional networks; on an MLP without batch norm the first layer or all layers do better
than the head alone, so compare with `modules=all`. The defaults of steps, rows and rate are ours. Only the last row of
R shows the finetuned model, so BWT mixes two models; `kfpf` finetunes along the way. Finetuning runs in the run's
precision; its gradients are not clipped (`trainer.clip_norm`), and hooks of other strategies are not called in it, so
that their penalties and projections do not hold.
"""

from __future__ import annotations

from cl.hooks import Contract
from strategies._finetune import Finetune


class Fpf(Finetune):
    """Finetune selected modules on the buffer at the end of training.

    Args:
        modules: "auto" takes the modules that react most to a new experience, "all" is the control; or patterns of
            module names and classes, such as [head, BatchNorm2d].
        alpha: factor of the squared distance to the logits that the network had when it first saw the row.
        buffer_of: name of another strategy whose buffer is used; None keeps one of its own.
        capacity, policy: of its own buffer: rows stored, and which rows stay (class_balanced for equal classes).
        steps: SGD steps of a finetuning; 0 changes nothing.
        replay_batch_size: rows of each of them.
        lr, momentum: of the finetuning's own SGD; the rate falls to 0 along a cosine.
        repeats: finetunings back to back, each with a cosine and a momentum of its own.
        updates_statistics: finetuning moves the running statistics of batch norm; otherwise batch norm uses them.
        snapshot_steps: "auto" compares the weights every so many steps; without a switch between two experiences that
            are longer than twice that, it takes all modules.
        auto_frac: most of the parameters that "auto" takes.

    Raises:
        UserError: a pattern that matches no module, a buffer that is not there or smaller than a batch.

    Cost: no rows per step; repeats * steps * replay_batch_size rows forward and backward at the end, down to the lowest
    selected module only. Mode "auto" keeps one copy of the parameters.
    """

    contract = Contract(
        toy={"capacity": 100, "steps": 60, "snapshot_steps": 6}, zero={"steps": 0}, forgets_less_by=0.25
    )

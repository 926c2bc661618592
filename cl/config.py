"""How to train, whatever the stream and the strategies; checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cl.core import UserError
from cl.distributed import KINDS
from cl.loader import Budget

CPU = torch.device("cpu")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainerConfig:
    """How to train, whatever the stream and the strategies.

    Args:
        epochs, max_steps, max_tokens: budget of each experience; one epoch when none is given. `max_steps` may list
            the steps of each; the run ends with the list.
        batch_size: rows of the stream per micro-batch; `accumulation` micro-batches make one step.
        eval_batch_size: rows per batch at evaluation; changes speed only.
        clip_norm: largest gradient norm; None does not clip.
        logit_mask: "batch" leaves classes that no row of the micro-batch has out of the label loss; "none" keeps all.
        precision: "fp32", or autocast in "bf16" or "fp16". The latter scales losses; a step whose gradients overflow
            even so updates nothing, lowers the scale and is written down (`Result.traces`, "loss_scale").
        device: "auto" takes a GPU when there is one.
        evaluate: after each experience measure "all" domains, or those "seen" so far.
        eval_every: also measure inside experiences, every so many steps, on the domains seen; 0 never.
        eval_rows: rows per domain in every measurement; None takes all.
        within_eval_rows: the same for measurements inside experiences; None takes `eval_rows`.
        checkpoint_every: steps between checkpoints inside an experience; 0 writes them after experiences only.
        reset_optimizer: build a new optimizer for every experience.
        schedule_span: the learning-rate schedule runs over the whole "run" or anew over each "experience".
        schedule_start: step of the run at which the schedule begins (`cl rewarm`).
        schedule_steps: steps of each experience that the schedule is planned for; None takes those trained. After the
            planned ones it stays where it is until the next experience begins, or for good (`cl extend`).
        parallel: how the processes that torchrun started share the work: "ddp" keeps the whole model in each, "fsdp" a
            shard of it; "none" is for one process.
        compile: let torch compile the network; the first steps then take longer.
    """

    epochs: int | None = None
    max_steps: int | Sequence[int] | None = None
    max_tokens: int | None = None
    batch_size: int = 64
    accumulation: int = 1
    eval_batch_size: int = 500
    clip_norm: float | None = None
    logit_mask: str = "none"
    precision: str = "fp32"
    device: str = "auto"
    evaluate: str = "all"
    eval_every: int = 0
    eval_rows: int | None = None
    within_eval_rows: int | None = None
    checkpoint_every: int = 0
    reset_optimizer: bool = False
    schedule_span: str = "run"
    schedule_start: int = 0
    schedule_steps: Sequence[int] | None = None
    parallel: str = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("logit_mask", ("none", "batch")),
            ("precision", tuple(PRECISIONS)),
            ("evaluate", ("all", "seen")),
            ("schedule_span", ("run", "experience")),
            ("parallel", KINDS),
            ("compile", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"trainer.{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, allowed))}"
                )
        for name, smallest in (
            ("eval_batch_size", 1),
            ("eval_every", 0),
            ("checkpoint_every", 0),
            ("eval_rows", 1),
            ("within_eval_rows", 1),
            ("schedule_start", 0),
        ):
            value = getattr(self, name)
            if value is None and name.endswith("rows"):
                continue
            if type(value) is not int or value < smallest:
                raise UserError(f"trainer.{name} is {value!r}; it must be an integer of at least {smallest}")
        if self.clip_norm is not None and not (type(self.clip_norm) in (int, float) and self.clip_norm > 0):
            raise UserError(f"trainer.clip_norm is {self.clip_norm!r}; it must be positive, or null not to clip")
        self.budget  # noqa: B018  (checks itself)

    @property
    def budget(self) -> Budget:
        return Budget(self.epochs, self.max_steps, self.max_tokens, self.batch_size, self.accumulation)

    def next_pause(self, steps_done: int, num_steps: int) -> int:
        """The step of an experience at which the loop next measures or saves; its last one at the latest."""
        periods = [period for period in (self.eval_every, self.checkpoint_every) if period]
        return min([num_steps, *((steps_done // period + 1) * period for period in periods)])

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            if not torch.cuda.is_available():
                return CPU
            # torchrun gives every process of a machine a number
            number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if number >= count:
                raise UserError(
                    f"this machine has {count} GPUs and process {number}, counted from 0, has none; start at most "
                    f"{count} processes here, or set trainer.device=cpu"
                )
            return torch.device("cuda", number)
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"trainer.device is {self.device!r}, which cannot be used here "
                f"({str(error).splitlines()[0]}); use auto or cpu"
            ) from None
        return device


def is_due(period: int, steps_done: int) -> bool:
    """Whether something done every `period` steps is to be done now; a period of 0 means never."""
    return period > 0 and steps_done % period == 0

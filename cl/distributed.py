"""Several processes, one run: each works on its share of the rows, and all compute what one process would.

    torchrun --nproc_per_node=2 -m cl run trainer.parallel=ddp ...

Every process draws the same batches, lets the strategies prepare them, and keeps its share of every part. So buffers,
generators and data order are the same everywhere (torch's own generators, which dropout draws from, are each process's
own, and checkpoints hold all of them), and the run can be resumed by another number of processes. A part with weight a
and n of whose N rows (or tokens to learn) are here gets the weight a W n / N: the mean over W processes of what they
compute is then the loss of the whole batch, and so is its gradient.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl.core import IGNORED, Batch, UserError

KINDS = ("none", "ddp", "fsdp")
EXPECTED = (
    # blocks return views of their states, which nobody changes in place
    "FSDP2-wrapped module",
    # of several heads a batch may use one, or all
    "find_unused_parameters=True was specified",
)
"""Beginnings of what torch warns of in runs where all is well."""


def start() -> None:
    """Meet the other processes that torchrun started; nothing where there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # more processes than devices may train on the CPU
        if (number := int(os.environ.get("LOCAL_RANK", "0"))) < torch.cuda.device_count():
            torch.cuda.set_device(number)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0; known before the others are met."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def agreed(value: Any) -> Any:
    """What the first process has, everywhere."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def reason(error: Exception) -> str:
    """What an error says; one sentence where gloo tells, in words of its own, that another process is gone."""
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
        return (
            "another process of this run ended or does not answer; what it said itself tells why, and `cl resume` goes "
            "on from the last checkpoint"
        )
    return str(error)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        kind: "none" for a single process; "ddp" keeps the whole model in each, "fsdp" a shard of it.
        rank, size: number of this process and of all.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, parallel: str) -> World:
        """Where this process stands among those that were started.

        Raises:
            UserError: several were started and the run does not say how they work together.
        """
        start()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            if parallel != "none" and "WORLD_SIZE" not in os.environ:
                warnings.warn(
                    f"trainer.parallel is {parallel!r} and this is the only process; start several with torchrun, as "
                    "in `torchrun --nproc_per_node=2 -m cl run ...`",
                    stacklevel=2,
                )
            return cls()
        if parallel == "none":
            raise UserError(
                f"{dist.get_world_size()} processes were started and trainer.parallel is 'none'; set it to ddp or fsdp"
            )
        return cls(parallel, dist.get_rank(), dist.get_world_size())

    @property
    def names(self) -> tuple[int, ...]:
        """What tells the generators of this process from those of a single one; the first has its own."""
        return (self.rank,) if self.rank else ()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Run inside without the warnings that belong to how these processes work together."""
        if self.size == 1:
            yield
            return
        with warnings.catch_warnings():
            for beginning in EXPECTED:
                warnings.filterwarnings("ignore", message=beginning)
            yield

    def every(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks; all must ask."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return self.anywhere([flag])[0]

    def anywhere(self, flags: Sequence[bool]) -> list[bool]:
        """For each of some statements, whether it is so in any process."""
        if self.size == 1:
            return list(flags)
        box = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return [bool(flag) for flag in box.tolist()]

    def mean(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms of the whole batch, from those of every share."""
        if self.size == 1:
            return terms
        values = torch.stack([term.detach().float().mean() for term in terms.values()])
        dist.all_reduce(values)
        return dict(zip(terms, values / self.size, strict=True))

    def pooled(self, total: Tensor, count: Tensor) -> Tensor:
        """A share of sum / number over all processes, 0 where there is nothing: the mean over processes is the whole.

        Args:
            total: sum over what is here, with its gradient.
            count: number of what is here, an integer.
        """
        if self.size == 1:
            return total / count.clamp(min=1)
        every = count.clone()
        dist.all_reduce(every)
        return self.size * total / every.clamp(min=1)

    def firsts(self, value: Tensor) -> Tensor:
        """What the first process has, in place: of what each computed from all rows, with its own draws of dropout."""
        if self.size > 1:
            dist.broadcast(value, src=0)
        return value

    def split(self, batch: Batch) -> Batch:
        """This process's rows of every part, weighted so that the mean over processes is the loss of all rows.

        A part with fewer rows than there are processes shows one of them, with weight 0, where it has none to give.
        """
        if self.size == 1:
            return batch
        is_text = batch.targets.dim() > 1
        learnt = (batch.targets != IGNORED).flatten(1).sum(1).tolist() if is_text else [1] * len(batch)
        parts, rows, stop = [], [], 0
        for part in batch.parts:
            here, share = self.shown(len(part)), self._share(learnt[part.rows])
            rows.append(torch.arange(part.start + here.start, part.start + here.stop))
            kept = replace(part, start=stop, stop=stop + len(rows[-1]), weight=part.weight * share, share=share)
            parts.append(replace(kept, elsewhere=len(part) - len(kept)))
            stop = kept.stop
        own = batch[torch.cat(rows).to(batch.inputs.device)]
        own.parts = tuple(parts)
        return own

    def shown(self, num_rows: int) -> slice:
        """Which rows of a part of so many `split` shows here."""
        low, high = self._bounds(num_rows)
        low = min(low, num_rows - 1)
        return slice(low, max(high, low + 1))

    def joined(self, shown: Tensor, num_rows: int) -> Tensor:
        """What each process knows of its own rows of a part, put together everywhere; no gradient. All must ask.

        Args:
            shown: (n, ...) of the rows that `split` shows here.
            num_rows: N of the part in all processes.

        Returns:
            (N, ...), in the part's order.

        Cost: N rows are sent to every process.
        """
        if self.size == 1:
            return shown.detach()
        counts = [high - low for low, high in (self._bounds(num_rows, rank) for rank in range(self.size))]
        # pieces of one size, as gloo wants them
        padded = shown.new_zeros(max(1, *counts), *shown.shape[1:])
        padded[: counts[self.rank]] = shown.detach()[: counts[self.rank]]
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    def _bounds(self, num_rows: int, rank: int | None = None) -> tuple[int, int]:
        """First row of a contiguous share, as even as can be, and the row behind its last one."""
        rank = self.rank if rank is None else rank
        return num_rows * rank // self.size, num_rows * (rank + 1) // self.size

    def _share(self, learnt: Sequence[int]) -> float:
        """W n / N, of N that all rows of a part have to learn and n that this process's have."""
        low, high = self._bounds(len(learnt))
        return self.size * sum(learnt[low:high]) / max(1, sum(learnt))

    def network(self, model: nn.Module, num_heads: int = 1) -> Callable[[Batch], Any] | None:
        """What training rows are sent through where that is not the model itself."""
        if self.kind != "ddp":
            return None
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        # of several heads a batch may use one, and of a memory nothing
        leaves_out = num_heads > 1 or any(getattr(module, "leaves_out", False) for module in model.modules())
        with warnings.catch_warnings():
            # `broadcast_buffers` has another name from torch 2.14 on
            warnings.simplefilter("ignore", FutureWarning)
            made: nn.Module = nn.parallel.DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=leaves_out
            )
        return made

    def sync(self, network: Any, is_last: bool) -> None:
        """Exchange the gradients of a step once, in its last micro-batch; shards would have to be whole until then."""
        if self.kind == "ddp":
            network.require_backward_grad_sync = is_last

"""Weights that are spread over the processes of a run (FSDP2), and whole states of them.

What a checkpoint holds is whole, whatever the number of processes: `gathered` on the way out, `model_shards` and
`optimizer_shards` on the way in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

BLOCKS = ("blocks", "layers", "h")
"""Names of the lists whose modules are sharded one by one: ours, and those of transformers."""


@runtime_checkable
class Sharded(Protocol):
    """A model that `shard` has spread, known by what it can do: to import FSDP takes a second."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None: ...

    def reshard(self) -> None: ...


def shard(model: nn.Module, num_processes: int) -> None:
    """Spread the weights over the processes: blocks in lists one by one, and the rest together.

    What is sharded by itself must be called as a whole, and by all processes alike: other lists hold heads of tasks,
    levels inside a block, or memories that are read by parts.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (num_processes,))
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] in BLOCKS]
    # from the inside out, as FSDP wants it
    for module in reversed(lists):
        for block in module if isinstance(module, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def own(value: Tensor) -> Tensor:
    """What this process has of a tensor: all of it, unless it is spread over the processes."""
    found: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return found


def gathered(tree: Any) -> Any:
    """Nested dicts and lists with every shard replaced by the whole tensor; all processes must ask."""
    if not dist.is_initialized():
        return tree
    from torch.distributed.tensor import DTensor

    return tree_map_only(DTensor, lambda shard: shard.full_tensor(), tree)


def model_shards(saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state dict as this process's model takes it."""
    like = model.state_dict() if dist.is_initialized() else {}
    return {name: _as(value, like.get(name)) for name, value in saved.items()}


def optimizer_shards(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The same for an optimizer's state, where what is shaped like its parameter is spread like it."""
    if not dist.is_initialized():
        return dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    of = dict(zip(indices, parameters, strict=True))
    state = {
        index: {
            name: _as(value, of[index]) if isinstance(value, Tensor) and value.shape == of[index].shape else value
            for name, value in entry.items()
        }
        for index, entry in saved["state"].items()
    }
    return {**saved, "state": state}


def _as(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    # every process read the same file
    whole = value.detach().to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

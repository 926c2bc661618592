"""Adapters of peft in a model: the one reading of `backbone.lora`, for every backbone that takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cl.core import UserError

LORA_KEYS = ("rank", "alpha", "dropout", "target_modules")
ALL = "all-linear"


def lora_options(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of peft's LoraConfig.

    Args:
        lora: rank (8), alpha (twice the rank), dropout (0), target_modules (all-linear, or names of layers).

    Raises:
        UserError: a key that it does not have, or a rank that is none.
    """
    for key in lora:
        if key not in LORA_KEYS:
            raise UserError(f"backbone.lora has no key {key!r}; its keys are {', '.join(LORA_KEYS)}")
    rank = lora.get("rank", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"backbone.lora.rank is {rank!r}; it must be an integer of at least 1")
    targets: str | Sequence[str] = lora.get("target_modules", ALL)
    return {
        "r": rank,
        "lora_alpha": lora.get("alpha", 2 * rank),
        "lora_dropout": lora.get("dropout", 0.0),
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }


def put_adapters(model: nn.Module, lora: Mapping[str, Any], adapter: str = "default") -> None:
    """Put adapters into the linear layers of a model's blocks, in place, and freeze everything else.

    Raises:
        UserError: peft is not installed, or a layer that the model does not have.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("backbone.lora needs peft; `pip install peft` brings it") from None
    options = lora_options(lora)
    if options["target_modules"] == ALL:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        options["target_modules"] = [name for name in linear if name.startswith("blocks.")]
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        inject_adapter_in_model(LoraConfig(**options), model, adapter)
    except ValueError as error:
        raise UserError(f"backbone.lora cannot be put on this model: {str(error).splitlines()[0][:200]}") from None

"""Adapters of peft in a model: the one reading of `backbone.lora`, for every backbone that takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cl.core import UserError

LORA_KEYS = ("rank", "alpha", "dropout", "target_modules")
ALL = "all-linear"


def lora_options(lora: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Arguments of peft's LoraConfig.

    Args:
        lora: rank (8), alpha (twice the rank), dropout (0), target_modules (all-linear, names of layers, or a regular
            expression of whole paths).
        model: that the layers are looked for in.

    Raises:
        UserError: a key that it does not have, a value outside its range, or a layer that the model does not have.
    """
    if not isinstance(lora, Mapping):
        raise UserError(f"backbone.lora is {lora!r}; it must be a mapping such as {{rank: 8}}")
    for key in lora:
        if key not in LORA_KEYS:
            raise UserError(f"backbone.lora has no key {key!r}; its keys are {', '.join(LORA_KEYS)}")
    rank = lora.get("rank", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"backbone.lora.rank is {rank!r}; it must be an integer of at least 1")
    alpha, dropout = lora.get("alpha", 2 * rank), lora.get("dropout", 0.0)
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise UserError(f"backbone.lora.alpha is {alpha!r}; it must be a finite number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"backbone.lora.dropout is {dropout!r}; it must be a number from 0 to below 1")
    targets = lora.get("target_modules", ALL)
    if not isinstance(targets, str):
        _require_layers(targets, model)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_layers(targets: Any, model: nn.Module) -> None:
    """A list of names, each of some layer: peft is silent about a misspelt one beside another that is there."""
    if not isinstance(targets, Sequence) or not targets or not all(isinstance(name, str) for name in targets):
        raise UserError(
            f"backbone.lora.target_modules is {targets!r}; it must be {ALL}, a list of names of layers, or a regular "
            "expression"
        )
    paths = [f".{path}" for path, _ in model.named_modules()]
    for name in targets:
        if not any(path.endswith(f".{name}") for path in paths):
            known = sorted({last for path in paths if not (last := path.rsplit(".", 1)[1]).isdigit() and last})
            raise UserError(
                f"backbone.lora.target_modules names {name!r}, no layer of this model; it has {', '.join(known)[:300]}"
            )


def put_adapters(model: nn.Module, lora: Mapping[str, Any], adapter: str = "default") -> None:
    """Put adapters into the linear layers of a model's blocks, in place, and freeze everything else.

    Raises:
        UserError: peft is not installed, or a layer that the model does not have.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("backbone.lora needs peft; `pip install peft` brings it") from None
    options = lora_options(lora, model)
    if options["target_modules"] == ALL:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        options["target_modules"] = [name for name in linear if name.startswith("blocks.")]
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        inject_adapter_in_model(LoraConfig(**options), model, adapter)
    except Exception as error:  # what layers it takes is the library's to say
        raise UserError(f"backbone.lora cannot be put on this model: {str(error).splitlines()[0][:200]}") from None


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """The same model without adapters, in place: those in use are added to the weights that they adapt.

    Returns:
        the model inside peft's own, where there is one.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "get_base_layer") and hasattr(layer, "merge"):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model

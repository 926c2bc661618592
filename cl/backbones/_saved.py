"""A backbone on its own, out of the run that trained it: its weights, and the words that make it again.

    FOLDER/model.safetensors    weights, by the names of the module
    FOLDER/backbone.json        class, options, and what it knows of the stream

Nothing of a folder is executed: the class must be a backbone that can be imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl.core import Setting, StreamInfo, UserError

WEIGHTS, WORDS = "model.safetensors", "backbone.json"


def save_backbone(folder: Path, model: nn.Module, info: StreamInfo, options: Mapping[str, Any]) -> None:
    """Write a backbone to a folder.

    Args:
        model: as its class makes it: adapters merged, nothing around it.
        options: that it was made with; numbers, words, lists and mappings.
    """
    from safetensors.torch import save_model

    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    words = {"backbone": kind, "options": dict(options), "info": asdict(info)}
    (folder / WORDS).write_text(json.dumps(words, indent=1) + "\n")
    save_model(model, str(folder / WEIGHTS))


def load_backbone(folder: Path | str) -> nn.Module:
    """The backbone of a folder that `cl export` wrote, on the processor, in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, the class is no backbone of this Python, or its weights are others.

    Example:
        >>> import tempfile
        >>> from cl.backbones.mlp import Mlp
        >>> info = StreamInfo("rows", Setting.CLASS_INCREMENTAL, (4,), num_outputs=2, num_experiences=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_backbone(Path(folder), Mlp(info, [8]), info, {"hidden": [8]})
        ...     load_backbone(folder).head
        Linear(in_features=8, out_features=2, bias=True)
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    words, weights = Path(folder) / WORDS, Path(folder) / WEIGHTS
    for path in (words, weights):
        if not path.is_file():
            raise UserError(f"{folder} holds no backbone of `cl export`: {path.name} is not there")
    try:
        said = json.loads(words.read_text())
        kind, options, known = said["backbone"], dict(said["options"]), dict(said["info"])
        info = StreamInfo(**known | {"setting": Setting(known["setting"]), "input_shape": tuple(known["input_shape"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{words} cannot be read: {type(error).__name__}: {error}") from None
    with torch.random.fork_rng():
        model: nn.Module = _class_of(kind)(info, **options)
    try:
        load_model(model, str(weights))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(f"the weights in {weights} do not fit {kind}: {reason}") from None
    return model.eval()


def _class_of(kind: Any) -> type[nn.Module]:
    module, _, name = str(kind).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"backbone {kind!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"backbone {kind!r} is no torch.nn.Module")
    return found

"""Take the network out of a run: a folder that transformers loads, or its weights with what makes it again.

Usage: cl export RUN_DIR to=FOLDER

  cl export runs/news to=news_model          the newest checkpoint of a run, finished or not

backbone=hf: what `AutoModelForCausalLM.from_pretrained(FOLDER)` and `backbone.pretrained=FOLDER` load, with its
tokenizer beside it. Any other backbone: model.safetensors and backbone.json, which
`cl.backbones.load_backbone(FOLDER)` loads. Adapters are merged into the weights that they adapt.

The folder is loaded again and asked for some rows of the run's data before it appears: it answers as the run does, or
nothing is written. A network that answers with the help of its strategy (hypernetworks, stored class means) is refused.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cl.backbones import load_backbone, save_backbone
from cl.backbones._lora import merge_adapters
from cl.backbones.hf import Hf
from cl.cli import build
from cl.cli.branch import options
from cl.cli.folder import check_writable, saved_config
from cl.cli.resume import trained
from cl.core import Batch, UserError
from cl.evaluation import MAX_LOGITS, evaluating, predict
from cl.hooks import overrides
from cl.loader import tokens_per_row
from cl.state import TrainState

ROWS = 16
"""Of the run's data, that the folder is asked for."""
NEAR = 1e-4
"""How far its answers may be from the run's, relative to the largest: merged adapters are rounded."""


def main(words: list[str]) -> int:
    """Export the run in the folder given."""
    run_dir, found = options(words, "export", ("to",))
    if not found.get("to"):
        raise UserError("`cl export` needs to=FOLDER, which is made")
    folder = Path(found["to"])
    if folder.exists():
        raise UserError(f"to={folder} is there already; name a folder that is not")
    check_writable(folder.parent)
    trainer, experience, _ = trained(Path(run_dir))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        export(trainer, saved_config(Path(run_dir))["backbone"], made)
        made.rename(folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    when = f"{trainer.state.step} steps, {experience} of {len(trainer.state.stream.experiences)} experiences finished"
    said = f"{folder}: the network after {when}; {total / 1e6:,.1f} MB: {names}"
    Console(markup=False).print(said, highlight=False, soft_wrap=True)
    return 0


def export(trainer: Any, node: dict[str, Any], folder: Path) -> None:
    """Write the network of a trainer to an empty folder, and see that what is read from there answers as the run does.

    The trainer is not to be trained afterwards.

    Args:
        node: the backbone's in the run's config.

    Raises:
        UserError: it does not.
    """
    state = trainer.state
    if type(state.model) is not build.target_of("backbone", node):
        wrapping = [strategy for strategy in trainer.strategies if overrides(strategy, "wrap")]
        around = ", ".join(strategy.name for strategy in wrapping or trainer.strategies)
        raise UserError(
            f"{around} puts {type(state.model).__name__} around the network, and only a network is exported"
        )
    for strategy in trainer.strategies:
        strategy.settle(state)
    # what is compared is not rounded, nor are adapters where they are merged
    state.autocast = nullcontext
    state.model.float()
    rows = some_rows(state)
    with evaluating(state.model):
        expected = predict(state, trainer.strategies, rows).logits
        apart = relative(state.model(rows).logits, expected)
    if apart <= NEAR:
        if isinstance(state.model, Hf):
            found = _written_for_transformers(state, node, folder)
        else:
            made_with = {key: value for key, value in build.arguments("backbone", node).items() if key != "lora"}
            save_backbone(folder, merge_adapters(state.model), state.info, made_with)
            found = load_backbone(folder)
        with evaluating(found.to(state.device)):
            apart = relative(found(rows).logits, expected)
    if not apart <= NEAR:
        raise UserError(
            f"without its strategies the network answers otherwise than the run: {apart:.1e} apart, relative to the "
            f"largest answer, where {NEAR:g} may be rounding; it is not exported"
        )


def some_rows(state: TrainState) -> Batch:
    """Rows of the first domain, as few as their answers fit into memory."""
    data = state.stream.eval_sets[0].load()
    most = max(1, MAX_LOGITS // (state.info.num_outputs * tokens_per_row(state.info)))
    return state.prepare(data.rows(torch.arange(min(ROWS, most, len(data)))))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest answer."""
    return float((found - expected).abs().max() / expected.abs().max())


def _written_for_transformers(state: TrainState, node: dict[str, Any], folder: Path) -> nn.Module:
    """The model with its tokenizer, read as the pretrained model of another run."""
    from streams._tokenizer_folder import write_tokenizer
    from streams._tokenizers import read_tokenizer

    state.model.write(folder)
    write_tokenizer(folder, state.stream.codec)
    info = replace(state.info, tokenizer=read_tokenizer(str(folder), download=False).digest)
    return Hf(info, pretrained=str(folder), is_separated=node.get("is_separated", True))

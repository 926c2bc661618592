"""Speed and memory of language training: our loop beside a plain one, transformers' Trainer, tokenising, RSS.

    python benchmarks/language_speed.py --data DIR [--sections training,trainer,tokenising,memory]
    python benchmarks/language_speed.py --sections training,trainer --device cuda --width 768 --layers 14 --heads 12
        --context 1024 --batch 16 --steps 20 --out PAGE

DIR holds `text/`. Each section replaces its own part of the page (`--out`), so that they can be run one by one.

- training: tokens per second of our loop (journal, run folder and schedule included) and of a plain PyTorch loop of the
  same network on windows of the same tokens, which lie in memory as int64. The last but one column lets the plain loop
  leave documents together, as nanoGPT does: what keeping them apart costs in this network, here and there.
- trainer: the same Llama of transformers in our loop (`backbone=hf`) and in transformers' Trainer, which knows no
  documents; ours with them apart and together.
- tokenising: megabytes per second on one core, from text to shards on disk with their hash, and of the encoder alone.
- memory: peak resident memory of a process that trains on so many experiences.

A rate is that of the median step, in processor time of the process (one thread), over all runs of a loop; runs of the
loops alternate, `--repeats` times, and the first round and the first two steps of a run are not counted. With
`--device cuda` all loops run under bfloat16 autocast, and steps are timed by the card. `--width` with the other sizes
trains a network of that size in place of the small ones.

Model FLOP utilisation is the share of a matrix product's rate, measured beforehand (`kernels.bench` has the same
ceiling), that goes into operations which the network cannot do without: 6 for each weight of its linear layers and
6 L T D of attention for each token, forward and backward, half of what is counted where masked scores are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _language_parts import Rows, memory, tokenising
from _peers import Clock, adamw, huggingface, llama, plain_text
from _study import table
from torch import Tensor, nn

from cl.backbones.gpt import Gpt
from cl.backbones.hf import Hf
from cl.config import TrainerConfig
from cl.core import Stream, StreamInfo
from cl.observe import Observer
from cl.result import environment, write_text
from cl.schedules import rewarmed_cosine
from cl.tracking import Journal
from cl.trainer import Trainer
from kernels.bench.measure import ceilings
from strategies.naive import Naive
from streams.builtin_text import builtin_text

Models = Mapping[str, tuple[dict[str, int], int, int, int]]
"""Settings of a decoder, tokens of a row, rows of a step, steps of a run, by title."""
MODELS: Models = {
    "0.02M, 8 rows of 64": ({"width": 32, "num_layers": 2, "num_heads": 4}, 64, 8, 60),
    "0.4M, 16 rows of 96": ({"width": 96, "num_layers": 3, "num_heads": 4}, 96, 16, 12),
    "1.1M, 16 rows of 128": ({"width": 128, "num_layers": 5, "num_heads": 4}, 128, 16, 7),
}
LLAMA: Models = {"0.4M, 16 rows of 96": ({"width": 96, "num_layers": 3, "num_heads": 4}, 96, 16, 15)}
WARM = 2


def documentation(context: int) -> tuple[Stream, Tensor]:
    """A stream of one domain in bytes, and its tokens in memory."""
    stream = builtin_text(order=["docs"], context=context, general=False)
    return stream, torch.from_numpy(stream.experiences[0].load().shards[0].astype("int64"))


class Stopwatch(Observer):
    """Notes when every step ends."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step(self, state: Any, losses: Any, lr: float) -> None:
        self.clock.tick()


def ours(
    backbone: Callable[..., nn.Module], stream: Stream, batch_size: int, steps: int, device: str = "cpu"
) -> list[float]:
    """Stamps of our loop."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            stream,
            backbone,
            [Naive()],
            optimizer=adamw,
            schedule=rewarmed_cosine,
            config=TrainerConfig(
                max_steps=steps,
                batch_size=batch_size,
                clip_norm=1.0,
                evaluate="seen",
                eval_rows=1,
                device=device,
                precision="bf16" if clock.is_card else "fp32",
            ),
            run_dir=Path(folder),
            observers=[Journal(Path(folder)), Stopwatch(clock)],
        )
        trainer.run()
    return clock.stamps()


def in_turn(runs: Mapping[str, Callable[[], list[float]]], step_tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of each at its median step, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            stamps = run()[WARM:]
            if number:
                found[name] += [after - before for before, after in pairwise(stamps)]
    return {name: step_tokens / statistics.median(steps_s) for name, steps_s in found.items()}


def ceiling(device: str) -> float:
    """FLOP/s of a matrix product in the precision of the loops."""
    return ceilings(torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32, False).flops


def flops_of_a_token(made: Callable[[StreamInfo], nn.Module], info: StreamInfo, settings: Mapping[str, int]) -> int:
    """Operations of a training step, forward and backward, that a causal decoder cannot do without."""
    weights = sum(part.weight.numel() for part in made(info).modules() if isinstance(part, nn.Linear))
    return 6 * weights + 6 * settings["num_layers"] * info.input_shape[0] * settings["width"]


# the sections of the page


def training(options: argparse.Namespace) -> Rows:
    """Our loop beside the plain one."""
    limit, device = ceiling(options.device), options.device
    ratios_of = ("ours / plain", "ours / plain, together", f"ours, of {limit / 1e12:.3g} TFLOP/s")
    yield "network, step", "ours", "plain loop", "plain, documents together", *ratios_of
    for title, (settings, context, batch_size, steps) in chosen(options, MODELS).items():
        stream, tokens = documentation(context)
        made = partial(Gpt, **settings)
        plain = partial(plain_text, made, stream, tokens, batch_size, steps, device=device)
        rates = in_turn(
            {
                "ours": partial(ours, made, stream, batch_size, steps, device),
                "plain": plain,
                "together": partial(plain, is_separated=False),
            },
            batch_size * context,
            options.repeats,
        )
        used = rates["ours"] * flops_of_a_token(made, stream.info, settings) / limit
        ratios = (rates["ours"] / rates["plain"], rates["ours"] / rates["together"])
        yield title, *map(thousands, rates.values()), *(f"{ratio:.2f}" for ratio in ratios), f"{used:.1%}"


def trainer(options: argparse.Namespace) -> Rows:
    """Our loop beside transformers' Trainer."""
    limit, device = ceiling(options.device), options.device
    ((settings, context, batch_size, steps),) = chosen(options, LLAMA).values()
    stream, tokens = documentation(context)
    made = partial(Hf, config=llama(**settings))
    rates = in_turn(
        {
            "ours": partial(ours, made, stream, batch_size, steps, device),
            "ours, documents together": partial(
                ours, partial(made, is_separated=False), stream, batch_size, steps, device
            ),
            "transformers' Trainer": partial(huggingface, llama(**settings), stream, tokens, batch_size, steps, device),
        },
        batch_size * context,
        options.repeats,
    )
    flops = flops_of_a_token(made, stream.info, settings)
    yield "loop", "tokens/s", "of transformers' Trainer", f"of {limit / 1e12:.3g} TFLOP/s"
    for name, rate in rates.items():
        yield name, thousands(rate), f"{rate / rates[list(rates)[-1]]:.2f}", f"{rate * flops / limit:.1%}"


def thousands(rate: float) -> str:
    """Tokens per second."""
    return f"{rate / 1000:.1f}k"


def chosen(options: argparse.Namespace, default: Models) -> Models:
    """The network of the size that was asked for, in place of those measured by default."""
    if not options.width:
        return default
    settings = {"width": options.width, "num_layers": options.layers, "num_heads": options.heads}
    title = f"width {options.width}, {options.layers} layers, {options.batch} rows of {options.context}"
    return {title: (settings, options.context, options.batch, options.steps)}


SECTIONS: Mapping[str, Callable[[argparse.Namespace], Rows]] = {
    "training": training,
    "trainer": trainer,
    "tokenising": tokenising,
    "memory": memory,
}


def sections_of(page: Path) -> dict[str, str]:
    """What the page holds, by heading."""
    parts = page.read_text().split("\n## ")[1:] if page.is_file() else []
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def conditions(options: argparse.Namespace) -> str:
    """One sentence on what the numbers were taken with."""
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items())
    when = time.strftime("%Y-%m-%d")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} thread"
    return f"{when}, {where}, {options.repeats} runs each; {versions}."


def main(words: Sequence[str] | None = None) -> None:
    """Run the sections asked for and write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder that holds text/, for tokenising")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=0, help="of one network in place of the small ones")
    for name, value in (("layers", 12), ("heads", 12), ("context", 1024), ("batch", 16), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language_speed.md"))
    options = parser.parse_args(words)
    if "tokenising" in options.sections and options.data is None:
        parser.error("--data is missing: tokenising reads the text below it")
    torch.set_num_threads(options.threads)
    found = sections_of(options.out)
    for name in options.sections.split(","):
        columns, *rows = SECTIONS[name](options)
        print(f"{name}\n{table(columns, rows)}", flush=True)
        found[name] = f"{table(columns, rows)}\n{conditions(options)}"
        parts = [f"## {each}\n\n{found[each]}\n" for each in SECTIONS if each in found]
        head = (
            "# Language: speed and memory\n\nMade by `python benchmarks/language_speed.py --data DATA`, whose "
            "docstring says how.\n"
        )
        write_text(options.out, "\n".join([head, *parts]))


if __name__ == "__main__":
    main()

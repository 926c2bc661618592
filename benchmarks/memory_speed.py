"""What memory costs: training at equal weights beside the transformer, and a step of generation late in a text.

    python benchmarks/memory_speed.py train [--tokens 512 4096] [--rows 8] [--width 128 --layers 4] [--blocks mamba2]
        [--cuda]
    python benchmarks/memory_speed.py generate [--until 100000]
    python benchmarks/memory_speed.py forward
    python benchmarks/memory_speed.py page

Training: decoders of as many weights as the transformer (hidden widths fitted, within 3 %) read as many rows of random
bytes as make 4,096 tokens, or one longer row, or as many as `--rows` says; forward, backward and AdamW. Every backbone
is measured in a process of its own, on one thread, in processor seconds, which neighbours disturb less than a clock;
the transformer is measured again with every call, so that ratios are of one stretch of time. Memory is what the process
takes beyond what it held before. With --cuda the same on a card, under bfloat16 autocast, in seconds of the clock and
bytes that torch allocates.

Generation: one token at a time after N tokens. The N tokens are read in pieces, but for attention, whose cache is
filled with noise: its state, not its content, is what counts.

Forward: a tiny network (width 32, two blocks) on two rows of 64 tokens, without gradients.

Numbers are kept in `--out` and added to by every call; `page` writes the tables and the plot of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _fit import active_weights, fitted, network
from _memory_page import num_rows, page

from cl.cli.build import make  # noqa: F401  (loaded before measurements are forked)
from cl.core import Batch, Setting, StreamInfo
from cl.result import write_text
from cl.state import tensor_bytes

VOCABULARY = 256
BLOCKS: Mapping[str, str] = {
    "attention": "attention",
    "window": "attention(window=64)",
    "linear": "linear_memory(rule=linear)",
    "retnet": "linear_memory(rule=retnet)",
    "gla": "linear_memory(rule=gla)",
    "mamba2": "linear_memory(rule=mamba2)",
    "mlstm": "linear_memory(rule=mlstm)",
    "delta": "linear_memory(rule=delta)",
    "gated_delta": "linear_memory(rule=gated_delta)",
    "kda": "linear_memory(rule=kda)",
    "gateloop": "linear_memory(rule=gateloop)",
    "longhorn": "linear_memory(rule=longhorn)",
    "ridge": "ridge_memory",
    "ridge, 20 steps": "ridge_memory(steps=20)",
    "ttt_linear": "neural_memory(rule=ttt_linear)",
    "titans": "neural_memory(rule=titans)",
    "titans, a matrix": "neural_memory(rule=titans(depth=1))",
    "min_gru": "scan_rnn",
    "lru": "scan_rnn(cell=lru)",
    "gru": "nonlinear_rnn",
    "lstm": "nonlinear_rnn(cell=lstm)",
    "slstm": "nonlinear_rnn(cell=slstm)",
    "hippocampus": "hippocampus",
    "memory_cache": "memory_cache(linear_memory)",
    "mixture_of_memories": "mixture_of_memories(linear_memory)",
    # longer pieces than the defaults, which are those of short texts
    "ttt_linear, chunks of 64": "neural_memory(rule=ttt_linear(chunk=64))",
    "titans, chunks of 256": "neural_memory(rule=titans(chunk=256))",
    "titans, a matrix, chunks of 256": "neural_memory(rule=titans(depth=1, chunk=256))",
    "memory_cache, segments of 512": "memory_cache(linear_memory, segment=512)",
}
SEGMENTED: Mapping[str, Sequence[str]] = {
    name + end: (f"backbone={name}", *words)
    for end, words in (("", ()), (", segments of 512", ("backbone.segment=512",)))
    for name in ("rmt", "armt", "block_recurrent", "memformer")
}
NAMES = (*BLOCKS, *SEGMENTED)


def request(name: str, width: int, layers: int) -> list[str]:
    """The words of a decoder with blocks of one kind."""
    kind = SEGMENTED.get(name) or ("backbone=gpt", f"backbone.blocks='{BLOCKS[name]}'")
    return [*kind, f"backbone.width={width}", f"backbone.num_layers={layers}", "backbone.num_heads=4"]


def text(tokens: int) -> StreamInfo:
    """Rows of bytes."""
    return StreamInfo("text", Setting.CONTINUAL_PRETRAINING, (tokens,), VOCABULARY, 1, measure="loss")


# training


def trained(words: Sequence[str], tokens: int, rows: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of a step, and bytes beyond what was held before."""
    torch.manual_seed(0)
    model = network(words, text(tokens)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shape, is_card = (rows, tokens), device == "cuda"
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    found, before = [], bytes_held(is_card)
    # the first step makes what later ones use again
    for _ in range(repeats + 1):
        read, asked = torch.randint(VOCABULARY, (2, *shape)).to(device)
        begin = seconds(is_card)
        with torch.autocast(device, torch.bfloat16, enabled=is_card):
            output = model(Batch(read, asked, zero, zero))
            loss = F.cross_entropy(output.logits.flatten(0, 1), asked.flatten())
        optimizer.zero_grad()
        (loss + sum(output.auxiliary.values())).backward()
        optimizer.step()
        found.append(seconds(is_card) - begin)
    peak = bytes_held(is_card) - before
    weights = float(active_weights(model))
    return {"seconds": median(found[1:]), "bytes": float(peak), "weights": weights, "rows": rows}


def seconds(is_card: bool) -> float:
    """Of the processor, or of the clock once the card is done."""
    if not is_card:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def bytes_held(is_card: bool) -> int:
    """At most, until now."""
    return torch.cuda.max_memory_allocated() if is_card else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Every chosen block at every length, the transformer first."""
    for tokens in given.tokens:
        info = text(tokens)
        target = active_weights(network(request("attention", given.width, given.layers), info))
        rows = given.rows or num_rows(tokens)
        where, many = " on a card" if given.cuda else "", f"{given.rows} rows of " if given.rows else ""
        group = found.setdefault(f"train{where}, {target / 1e6:.1f}M weights, {many}T = {tokens}", {})
        beside = None
        for name in dict.fromkeys(("attention", *given.blocks)):
            words = fitted(request(name, given.width, given.layers), target, info, multiple=2)
            row = apart(trained, words, tokens, rows, given.repeats, "cuda" if given.cuda else "cpu")
            beside = row["seconds"] if name == "attention" else beside
            group[name] = row | {"ratio": beside / row["seconds"]}
            keep(given, found)
            rate = rows * tokens / row["seconds"]
            print(f"{tokens:5d} {name:32s} {rate:9,.0f} tokens/s {group[name]['ratio']:.2f}x", flush=True)


def keep(given: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Write what there is: a call that is stopped loses nothing."""
    write_text(given.out, json.dumps(found, indent=1) + "\n")


def apart(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What `function` returns, from a process of its own."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(theirs, "w") as channel:
            json.dump(function(*arguments), channel)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as channel:
        said = channel.read()
    if os.waitpid(child, 0)[1] or not said:
        raise RuntimeError(f"measuring {arguments[0]} ended without a number")
    answer: dict[str, float] = json.loads(said)
    return answer


# generation


def generate(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """One token after N, for every chosen block."""
    places = [n for n in (100, 1000, 10_000, 30_000, 100_000) if n <= given.until]
    for name in given.blocks:
        model = network(request(name, 32, 2), text(512)).eval()
        rows, state, at = [], None, 0
        with torch.inference_mode():
            for place in places:
                while at < place:
                    piece = min(place - at, 1000)
                    state = grown(state, piece) if name == "attention" and at else step(model, piece, state)
                    at += piece
                times = []
                for _ in range(given.steps):
                    begin = time.process_time()
                    # the same step again: nothing is carried on, so that N stays what it says
                    step(model, 1, state, "recurrent")
                    times.append(time.process_time() - begin)
                rows.append({"at": place, "seconds": median(times), "bytes": tensor_bytes(state)})
        found.setdefault("generate", {})[name] = rows
        keep(given, found)
        print(name, [(row["at"], round(1e6 * row["seconds"]), row["bytes"]) for row in rows], flush=True)


def step(model: Any, count: int, state: Any, mode: str = "chunk") -> Any:
    """The state after `count` more tokens."""
    tokens, zero = torch.randint(VOCABULARY, (1, count)), torch.zeros(1, dtype=torch.int64)
    return model.step(Batch(tokens, tokens, zero, zero), state, mode).state


def grown(state: Any, count: int) -> Any:
    """Caches of attention with `count` more entries."""

    def longer(cache: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = cache["key"]
        more = torch.randn(*key.shape[:2], count, key.shape[3])
        document = F.pad(cache["document"], (0, count))
        joined = {n: torch.cat((cache[n], more), 2) for n in ("key", "value")}
        return {**joined, "document": document, "position": cache["position"] + count}

    return {number: longer(cache) for number, cache in state.items()}


def forward(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """A forward of a tiny network, for every chosen block."""
    rows = torch.randint(VOCABULARY, (2, 64))
    zero = torch.zeros(2, dtype=torch.int64)
    for name in given.blocks:
        model, times = network(request(name, 32, 2), text(64)).eval(), []
        with torch.inference_mode():
            for _ in range(given.steps):
                begin = time.process_time()
                model(Batch(rows, rows, zero, zero))
                times.append(time.process_time() - begin)
        found.setdefault("forward", {})[name] = median(times)
        keep(given, found)
        print(f"{name:20s} {1e3 * median(times):6.1f} ms", flush=True)


def main() -> None:
    """Measure, and keep; or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "generate", "forward", "page"))
    parser.add_argument("--blocks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--rows", type=int, default=0, help="of a training step; 0 takes as many as make 4,096 tokens")
    for name, value in (("width", 128), ("layers", 4), ("repeats", 3), ("until", 100_000), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cuda", action="store_true", help="train on a card; give it an --out of its own")
    parser.add_argument("--note", default="", help="what a reader must know of the machine at that time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_speed.json"))
    parser.add_argument("--img", type=Path, default=Path("docs/img"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.out.read_text()) if given.out.is_file() else {}
    if given.note:
        found["note"] = f" {given.note}"
        keep(given, found)
    if given.what == "page":
        write_text(given.out.with_suffix(".md"), page(found, given.img))
        return
    {"train": train, "generate": generate, "forward": forward}[given.what](given, found)


if __name__ == "__main__":
    main()

"""What memory costs: training at equal weights beside the transformer, and a step of generation late in a text.

    python benchmarks/memory_speed.py train [--tokens 512 4096] [--rows 8] [--width 128 --layers 4 --heads 4]
        [--blocks mamba2] [--cuda] [--peers]
    python benchmarks/memory_speed.py generate [--until 100016]
    python benchmarks/memory_speed.py forward
    python benchmarks/memory_speed.py page

Training: decoders of as many weights as the transformer (hidden widths fitted, within 3 %) read as many rows of random
bytes as make 4,096 tokens, or one longer row, or as many as `--rows` says; forward, backward and AdamW. Every backbone
is measured in a process of its own, on one thread, in processor seconds, which neighbours disturb less than a clock;
the transformer is measured again with every call, so that ratios are of one stretch of time. Memory is what the process
takes beyond what it held before. With --cuda the same on a card, under bfloat16 autocast, in seconds of the clock and
bytes that torch allocates; with --peers every block is followed by flash-linear-attention's layer of the same name in
the same decoder (`_fla_layers.py` says which), as far as there is one and it is installed. Kernels are compiled by the
first step, which is not counted; `--warm N` runs that step for N decoders at a time beforehand, with one row each.

Generation: one token at a time after N tokens, which end half way through a segment of 32. They are read in pieces, but
for attention, whose cache is filled with noise: its state, not its content, is what counts.

Forward: a tiny network (width 32, two blocks) on two rows of 64 tokens, without gradients.

Numbers are kept in `--out` and added to by every call; `page` writes the tables and the plot of what there is.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _apart import apart, compiled
from _fit import active_weights
from _fla_layers import absence, theirs
from _memory_networks import NAMES, VOCABULARY, counted, decoder, equal, text
from _memory_page import num_rows, page
from torch import nn

from cl.core import Batch
from cl.result import write_text
from cl.state import tensor_bytes

# training


def trained(made: Callable[..., nn.Module], tokens: int, rows: int, repeats: int, device: str) -> dict[str, float]:
    """Seconds of a step, and bytes beyond what was held before."""
    torch.manual_seed(0)
    model = made(text(tokens)).to(device)
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
    return {"seconds": median(found[1:] or found), "bytes": float(peak), "weights": weights, "rows": rows}


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
    """Every chosen block at every length, the transformer first, and layers of others behind ours."""
    device, failed = "cuda" if given.cuda else "cpu", []
    sizes = {"width": given.width, "num_layers": given.layers, "num_heads": given.heads}
    if given.cuda:
        found["card"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    for tokens in given.tokens:
        info, rows, beside = text(tokens), given.rows or num_rows(tokens), None
        target = counted(decoder("attention", **sizes), info)
        where, many = " on a card" if given.cuda else "", f"{given.rows} rows of " if given.rows else ""
        group = found.setdefault(f"train{where}, {target / 1e6:.1f}M weights, {many}T = {tokens}", {})
        networks = {name: equal(name, target, info, **sizes) for name in chosen(given)}
        if given.warm:
            compiled([(trained, made, tokens, 1, 0, device) for made in networks.values()], given.warm)
        for name, made in networks.items():
            row = apart(device, trained, made, tokens, rows, given.repeats, device)
            beside = row.get("seconds") if name == "attention" else beside
            if "failure" in row or beside is None:
                failed.append(f"{name}: {row.get('failure', 'there is no transformer to measure it by')}")
                print(f"{tokens:5d} {failed[-1]}", flush=True)
                continue
            group[name] = row | {"ratio": beside / row["seconds"]}
            if (peer := theirs(name)) in networks:
                group[name]["peer"] = peer
            keep(given, found)
            rate = rows * tokens / row["seconds"]
            print(f"{tokens:5d} {name:32s} {rate:9,.0f} tokens/s {group[name]['ratio']:.2f}x", flush=True)
    if failed:
        raise SystemExit("; ".join(failed))


def chosen(given: argparse.Namespace) -> list[str]:
    """The transformer, then every block, with the layer of others behind it where there is one."""
    names = ["attention"]
    for name in given.blocks:
        row = theirs(name) if given.peers else None
        missing = absence(row) if row else ""
        if missing:
            print(missing, flush=True)
        names += [name, *([row] if row and not missing else [])]
    return list(dict.fromkeys(names))


def keep(given: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Write what there is: a call that is stopped loses nothing."""
    write_text(given.out, json.dumps(found, indent=1) + "\n")


# generation


def generate(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """One token after N, for every chosen block."""
    places = [n for n in (112, 1008, 10_000, 30_000, 100_016) if n <= given.until]
    for name in given.blocks:
        model = small(name, 512)
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


def small(name: str, tokens: int) -> nn.Module:
    """The decoder of generation and forward."""
    return decoder(name, width=32, num_layers=2, num_heads=4)(text(tokens)).eval()


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
        model, times = small(name, 64), []
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
    sizes = {"width": 128, "layers": 4, "heads": 4, "warm": 0, "repeats": 3, "until": 100_016, "steps": 50}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cuda", action="store_true", help="train on a card; give it an --out of its own")
    parser.add_argument("--peers", action="store_true", help="train flash-linear-attention's layers too")
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
        write_text(given.out.with_suffix(".md"), page(found, given.out.parent, given.img))
        return
    {"train": train, "generate": generate, "forward": forward}[given.what](given, found)


if __name__ == "__main__":
    main()

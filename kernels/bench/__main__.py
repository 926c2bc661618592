"""python -m kernels.bench: verify every row against float64, then time it; prints a table, writes JSON and Markdown."""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.bench.ahead import compiled, walk
from kernels.bench.measure import Ceilings, ceilings
from kernels.bench.peers import PEERS
from kernels.bench.problem import Shape
from kernels.bench.rows import labels, measured
from kernels.bench.shapes import PROBLEMS, shapes
from kernels.bench.tables import fill, line, table
from kernels.common.apart import sentence
from kernels.common.dispatch import HAS_TRITON
from kernels.common.options import Options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Options(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--ops", default=",".join(PROBLEMS), help=f"comma list of {', '.join(PROBLEMS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", default=None, help="comma list of fp32, bf16, fp16 (CPU: fp32; GPU: bf16)")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma list, or none")
    parser.add_argument("--repeats", type=int, default=None, help="times per row (CPU 9, GPU 50)")
    parser.add_argument("--loop", action=argparse.BooleanOptionalAction, default=None, help="time the token loop too")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does the command work")
    parser.add_argument("--shapes", type=_shape, nargs="+", help="BxTxHxD in place of the op's own")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=None, help="force the fused walk")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile for a card before it is timed")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--read", type=Path, help="measure nothing: take what another run wrote by --json")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--readme", type=Path, nargs="+", default=[], help="fill the marked tables of these files")
    arguments = parser.parse_args(argv)
    for name, allowed in (("ops", PROBLEMS), ("dtypes", DTYPES), ("peers", {**PEERS, "none": None})):
        for value in (getattr(arguments, name) or "").split(","):
            if value and value not in allowed:
                parser.error(f"unknown {name} {value!r}; use {', '.join(allowed)}")
    for name in ("repeats", "jobs"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"{name} is {number}; it must be at least 1")
    return arguments


def _shape(words: str) -> Shape:
    try:
        batch, length, heads, width = map(int, words.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r} is no BxTxHxD of four integers, such as 4x2048x16x64") from None
    return batch, length, heads, width


def _write(options: argparse.Namespace, environment: dict[str, Any], rows: list[dict[str, Any]], header: str) -> None:
    if options.json:
        found = {"environment": environment, "on": options.device, "header": header, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    if options.markdown:
        options.markdown.write_text("\n".join(["", header, "", table(rows), ""]))


def _environment(device: torch.device, limits: Ceilings) -> dict[str, Any]:
    cuda = device.type == "cuda"
    triton = __import__("importlib.metadata").metadata.version("triton") if HAS_TRITON else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        # how busy others keep the machine while this starts
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "copy GB/s": round(limits.bandwidth / 1e9, 1),
        "matmul TFLOP/s": round(limits.flops / 1e12, 2),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or show what one has kept; exit code 1 if any row was refused for its error, or failed."""
    options = _arguments(argv)
    if options.read:
        kept = json.loads(options.read.read_text())
        return _show(options, kept["on"], kept["rows"], kept["header"])
    device = torch.device(options.device)
    dtypes = [DTYPES[d] for d in (options.dtypes or ("bf16" if device.type == "cuda" else "fp32")).split(",")]
    limits = ceilings(device, dtypes[0], options.smoke)
    environment = _environment(device, limits)
    print(", ".join(f"{k} {v}" for k, v in environment.items()), flush=True)
    asked = ["python -m kernels.bench", *(sys.argv[1:] if argv is None else argv)]
    header = f"`{' '.join(asked)}`: " + ", ".join(f"{k} {v}" for k, v in environment.items())
    tasks = [
        (name, shape, dtype, device, options.fuse)
        for name in options.ops.split(",")
        for dtype in dtypes
        for shape in options.shapes or shapes(PROBLEMS[name], device, options.smoke)
    ]
    if options.jobs > 1 and device.type == "cuda":
        print(f"{compiled(tasks, options.jobs)} kernels compiled beforehand", flush=True)
    rows: list[dict[str, Any]] = []
    for name, shape, dtype, _, fuse in tasks:
        try:
            with walk(fuse):
                found = measured(PROBLEMS[name], shape, dtype, device, limits, options)
        except Exception as failure:  # of a kernel that this card does not take, for instance: the others are measured
            found = [{**labels(name, shape, dtype), "pass": f"FAILED: {sentence(failure)}"}]
        rows += found
        for row in found:
            print(line(row), flush=True)
        # row by row, so that a run that is stopped leaves what it measured
        _write(options, environment, rows, header)
    return _show(options, device.type, rows, header)


def _show(options: argparse.Namespace, device: str, rows: list[dict[str, Any]], header: str) -> int:
    for path in options.readme:
        path.write_text(fill(path.read_text(), device, rows, header))
    print("\n".join(["", header, "", table(rows), ""]))
    return int(any(row["pass"].startswith(("REFUSED", "FAILED")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""python -m kernels.bench: verify every row against float64, then time it; prints a table, writes JSON and Markdown."""

import argparse
import json
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.bench.measure import (
    TOLERANCE,
    Ceilings,
    ceilings,
    graph_s,
    in_turns,
    launches,
    median_s,
    passes,
    peak_bytes,
    worst_error,
)
from kernels.bench.peers import PEERS, SLACK, Peer, peer_error, peers_of, timed
from kernels.bench.shapes import PROBLEMS, Inputs, Problem, Shape, chunk_of, shapes
from kernels.bench.tables import fill, line, table
from kernels.common import explain
from kernels.common.dispatch import HAS_TRITON
from kernels.common.options import Options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOOPS = 3
L2_BYTES = 200 * 2**20


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
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--read", type=Path, help="measure nothing: take what another run wrote by --json")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--readme", type=Path, nargs="+", default=[], help="fill the marked tables of these files")
    arguments = parser.parse_args(argv)
    for name, allowed in (("ops", PROBLEMS), ("dtypes", DTYPES), ("peers", {**PEERS, "none": None})):
        for value in (getattr(arguments, name) or "").split(","):
            if value and value not in allowed:
                parser.error(f"unknown {name} {value!r}; use {', '.join(allowed)}")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"repeats is {arguments.repeats}; it must be at least 1")
    return arguments


def _shape(words: str) -> Shape:
    try:
        batch, length, heads, width = map(int, words.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{words!r} is no BxTxHxD of four integers, such as 4x2048x16x64") from None
    return batch, length, heads, width


def _row(
    problem: Problem,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    limits: Ceilings,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    first = problem.draw(shape, dtype, device)
    how = explain(problem.op, **first)
    label = {"op": problem.name, "B T H D": " ".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}
    worst = worst_error(problem, first)
    if not worst <= TOLERANCE[dtype]:
        return [{**label, "pass": "REFUSED", "backend": how.backend, "max rel err": f"{worst:.1e}"}]
    cuda = device.type == "cuda"
    size = sum(x.numel() * x.element_size() for x in first.values())
    copies = max(2, -(-L2_BYTES // size)) if cuda and not options.smoke else 1
    sets: list[Inputs] = [{n: x.clone().requires_grad_() for n, x in first.items()} for _ in range(copies)]
    out = problem.op(**first)[0]
    repeats = options.repeats or (50 if cuda else 9)
    with_loop = not cuda if options.loop is None else options.loop
    peers = peers_of(problem.name, options.peers.split(","))
    if not cuda:
        peers = {name: peer for name, peer in peers.items() if peer.own is not None}
    rows = []
    for backward in (False, True):
        call = passes(problem.op, sets, torch.randn_like(out), backward)
        loop = passes(lambda **x: problem.op(**x, backend="reference"), sets, torch.randn_like(out), backward)
        if cuda:
            times = []
            seconds, loop_s = median_s(call, device, repeats), median_s(loop, device, LOOPS) if with_loop else 0.0
        else:
            times = in_turns([call, loop][: 1 + with_loop], [repeats, LOOPS][: 1 + with_loop])
            seconds, loop_s = times[0].wall_s, times[-1].wall_s
        nbytes = problem.compulsory_bytes(first, out)[backward]
        batch, length, heads, width = shape
        flops = problem.flops(width, chunk_of(problem, dtype, device))[backward] * batch * length * heads
        row: dict[str, Any] = {**label, "pass": "fwd+bwd" if backward else "fwd", "backend": how.backend}
        row |= {
            "ms": seconds * 1e3,
            "Mtok/s": batch * length / seconds / 1e6,
            "GB/s": nbytes / seconds / 1e9,
            "% roofline": 100 * limits.floor_s(nbytes, flops) / seconds,
            "launches": launches(call, device),
            "max rel err": f"{worst:.1e}",
        }
        graphed = graph_s(call, device, repeats)
        row["graph ms"] = None if graphed is None else graphed * 1e3
        if with_loop:
            row |= {"loop ms": loop_s * 1e3, "x loop": loop_s / seconds}
        if times:
            row["cpu ms"] = times[0].cpu_s * 1e3
        if times and with_loop:
            row |= {"loop cpu ms": times[1].cpu_s * 1e3, "x loop cpu": times[1].cpu_s / times[0].cpu_s}
        if times and backward:
            row["peak memory"] = peak_bytes(call) / problem.allowance(first, shape)
        for name, peer in peers.items():
            rows.append({**row, **_peer_row(name, peer, problem, first, dtype, device, repeats, backward, row["ms"])})
        if not rows or rows[-1]["pass"] != row["pass"]:
            rows.append(row)
    return rows


def _peer_row(
    name: str,
    peer: Peer,
    problem: Problem,
    inputs: Inputs,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    backward: bool,
    ours_ms: float,
) -> dict[str, Any]:
    """The peer's columns: its error first, its time only if it computes the same thing."""
    try:
        worst = peer_error(peer, problem, inputs)
        if not worst <= SLACK * TOLERANCE[dtype]:
            return {"peer": f"{name}: wrong", "peer err": f"{worst:.1e}"}
        run, given = timed(peer, inputs)
        sets = [{n: x.detach().clone().requires_grad_() for n, x in given.items()}]
        if peer.own is not None:
            # the module holds its weights: they cannot be cloned, and their gradients are part of the work
            sets = [{n: x.requires_grad_() for n, x in given.items()}]
        out = run(**sets[0])[0]
        call = passes(run, sets, torch.randn_like(out), backward)
        peer_ms = median_s(call, device, repeats) * 1e3
    except Exception as failure:  # a peer that fails on this card is a fact to report, not our failure
        return {"peer": f"{name}: {type(failure).__name__}"}
    return {"peer": name, "peer err": f"{worst:.1e}", "peer ms": peer_ms, "x peer": peer_ms / ours_ms}


def _walk(fuse: bool | None) -> AbstractContextManager[None]:
    """The fused walk forced on or off, or as the op chooses."""
    if fuse is None:
        return nullcontext()
    from kernels.common.triton_chunks import fusing

    return fusing(fuse)


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
    """Run the benchmark, or show what one has kept; exit code 1 if any row was refused for its error."""
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
    rows: list[dict[str, Any]] = []
    for name in options.ops.split(","):
        for dtype in dtypes:
            for shape in options.shapes or shapes(PROBLEMS[name], device, options.smoke):
                with _walk(options.fuse):
                    found = _row(PROBLEMS[name], shape, dtype, device, limits, options)
                rows += found
                for row in found:
                    print(line(row), flush=True)
        # op by op, so that a run that is stopped leaves what it measured
        _write(options, environment, rows, header)
    return _show(options, device.type, rows, header)


def _show(options: argparse.Namespace, device: str, rows: list[dict[str, Any]], header: str) -> int:
    for path in options.readme:
        path.write_text(fill(path.read_text(), device, rows, header))
    print("\n".join(["", header, "", table(rows), ""]))
    return int(any(row["pass"] == "REFUSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

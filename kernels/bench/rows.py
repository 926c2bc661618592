"""One row of the bench: verified first, then timed, and its peers in the same way."""

import argparse
from typing import Any

import torch

from kernels.bench.measure import (
    TOLERANCE,
    Ceilings,
    graph_s,
    in_turns,
    judge,
    launches,
    median_s,
    passes,
    peak_bytes,
)
from kernels.bench.peers import SLACK, Peer, peer_error, peers_of, timed
from kernels.bench.problem import Inputs, Problem, Shape
from kernels.bench.shapes import chunk_of
from kernels.common import explain

LOOPS = 3
L2_BYTES = 200 * 2**20


def labels(name: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The first columns of a row."""
    return {"op": name, "B T H D": " ".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}


def measured(
    problem: Problem,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    limits: Ceilings,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Forward, and forward with backward, each once for every peer; one row that says REFUSED if it is wrong."""
    torch.manual_seed(0)
    first = problem.draw(shape, dtype, device)
    how = explain(problem.op, **first)
    label = labels(problem.name, shape, dtype)
    cuda = device.type == "cuda"
    size = sum(x.numel() * x.element_size() for x in first.values())
    copies = max(2, -(-L2_BYTES // size)) if cuda and not options.smoke else 1
    sets: list[Inputs] = [{n: x.clone().requires_grad_() for n, x in first.items()} for _ in range(copies)]
    # before the check: a tuner chooses at the first call, and the slice that is checked fills no card
    out = problem.op(**sets[0])[0]
    torch.autograd.grad(out.sum(), list(sets[0].values()))
    worst = judge(problem, first)()
    if not worst <= TOLERANCE[dtype]:
        return [{**label, "pass": "REFUSED", "backend": how.backend, "max rel err": f"{worst:.1e}"}]
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
        graphed = graph_s(call, device, repeats, copies)
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
            rows.append(
                {**row, **_peer_row(name, peer, problem, first, dtype, device, repeats, copies, backward, row["ms"])}
            )
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
    copies: int,
    backward: bool,
    ours_ms: float,
) -> dict[str, Any]:
    """The peer's columns: its error first, its time only if it computes the same thing."""
    try:
        worst = peer_error(peer, problem, inputs)
        if not worst <= SLACK * TOLERANCE[dtype]:
            return {"peer": f"{name}: wrong", "peer err": f"{worst:.1e}"}
        run, given = timed(peer, inputs)
        # a module holds its weights: they cannot be cloned, and their gradients are part of the work
        held = {n: x for n, x in given.items() if isinstance(x, torch.nn.Parameter)}
        drawn = {n: x for n, x in given.items() if n not in held}
        sets = [{n: x.detach().clone().requires_grad_() for n, x in drawn.items()} | held for _ in range(copies)]
        out = run(**sets[0])[0]
        call = passes(run, sets, torch.randn_like(out), backward)
        peer_ms = median_s(call, device, repeats) * 1e3
    except Exception as failure:  # a peer that fails on this card is a fact to report, not our failure
        return {"peer": f"{name}: {type(failure).__name__}"}
    return {"peer": name, "peer err": f"{worst:.1e}", "peer ms": peer_ms, "x peer": peer_ms / ours_ms}

"""Launching Triton kernels: rows of configurations, a tuner that never looks at T or B, recording for the AOT table.

Imported only by the `triton.py` of an op, by `kernels.aot` and by `kernels.check_gpu`.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from kernels.common.varlen import chunk_offsets

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# the default flips in Triton 3.10; said explicitly, numbers do not move with the compiler
FP_FUSION = True
CACHE = Path(os.environ.get("KERNELS_CACHE", Path.home() / ".cache" / "cl_kernels"))


@dataclass(frozen=True)
class Row:
    """One configuration: the kernel's own tile sizes, and what the compiler is told."""

    meta: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": FP_FUSION}

    def __str__(self) -> str:
        return " ".join([*(f"{k}={v}" for k, v in self.meta), f"warps={self.warps}", f"stages={self.stages}"])


def row(warps: int = 4, stages: int = 2, **meta: int) -> Row:
    """Spell a `Row`: `row(BV=32, warps=8)`."""
    return Row(tuple(sorted(meta.items())), warps, stages)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what the AOT compiler and the GPU check need to repeat it."""

    kernel: "Kernel"
    row: Row
    args: dict[str, Any]


@dataclass
class Kernel:
    """A jitted function, its rows (the first is the default) and the argument names that choose among them.

    `rows` maps the launch arguments to the allowed configurations, so that tile sizes can follow K and V. `parts` names
    the outputs with one part per tile, given as zeros: how many of them a launch writes depends on the row.
    """

    fn: Any
    rows: Callable[[dict[str, Any]], list[Row]]
    key: tuple[str, ...]
    parts: tuple[str, ...] = ()
    chosen: dict[str, Row] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.fn.__name__).lstrip("_")

    def launch(self, grid: Callable[[dict[str, int]], tuple[int, ...]], **args: Any) -> None:
        """Run on the device of the arguments, or only note the launch inside `recording()`."""
        if _RECORD is not None:
            _RECORD.extend(Launch(self, r, dict(args)) for r in allowed(self.name, self.rows(args)))
            return
        # Triton launches on the current device, which may be another card
        with torch.cuda.device_of(_first_tensor(args)):  # type: ignore[no-untyped-call]
            picked = _FORCED.get(self.name) or self._pick(allowed(self.name, self.rows(args)), grid, args)
            run = partial(self._run, picked, grid, args)
            run() if _WATCH is None else _WATCH(self.name, picked, run)

    def _run(self, picked: Row, grid: Callable[[dict[str, int]], tuple[int, ...]], args: dict[str, Any]) -> None:
        meta = dict(picked.meta)
        options = {} if INTERPRET else picked.options()
        self.fn[grid(meta)](**args, **meta, **options)

    def compile(self, picked: Row, args: dict[str, Any]) -> None:
        """For later launches of this row with such arguments, without one."""
        self.fn.warmup(grid=(1,), **args, **dict(picked.meta), **picked.options())

    def _pick(self, rows: list[Row], grid: Callable[[dict[str, int]], tuple[int, ...]], args: dict[str, Any]) -> Row:
        if INTERPRET or len(rows) == 1 or os.environ.get("KERNELS_AUTOTUNE", "1") == "0":
            return rows[0]
        tensor = _first_tensor(args)
        dtypes = "".join(str(a.dtype)[6:] for a in args.values() if isinstance(a, Tensor))
        values = ",".join(f"{k}={args[k]}" for k in self.key)
        key = f"{self.name}|{values}|{dtypes}|{torch.cuda.get_device_name(tensor.device)}|{triton.__version__}"
        if key not in self.chosen:
            self.chosen[key] = _cached(key, rows) or self._tune(key, rows, grid, args)
        return self.chosen[key]

    def _tune(
        self, key: str, rows: list[Row], grid: Callable[[dict[str, int]], tuple[int, ...]], args: dict[str, Any]
    ) -> Row:
        # every kernel writes only its outputs and reads none of them, so running it again is harmless
        times = [self._time(r, grid, args) for r in rows]
        if min(times) == float("inf"):
            raise RuntimeError(f"{self.name}: no configuration fits {device_tag()}; use backend='chunked'")
        best = rows[times.index(min(times))]
        # but a row of narrower tiles has left parts there that the best one may not write
        for name in self.parts:
            args[name].zero_()
        stored = _read_json(CACHE / "tuned.json")
        stored[key] = str(best)
        # where nothing can be kept, this process still knows
        with suppress(OSError):
            _write_json(CACHE / "tuned.json", stored)
        return best

    def _time(self, picked: Row, grid: Callable[[dict[str, int]], tuple[int, ...]], args: dict[str, Any]) -> float:
        """Milliseconds; infinite for a row that takes more registers or shared memory than the card has."""
        try:
            return float(triton.testing.do_bench(lambda: self._run(picked, grid, args), warmup=5, rep=20))
        except (OutOfResources, PTXASError):
            return float("inf")


_RECORD: list[Launch] | None = None
_FORCED: dict[str, Row] = {}
Watch = Callable[[str, Row, Callable[[], None]], None]
_WATCH: Watch | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches (all their rows) instead of running them; outputs stay uninitialised."""
    global _RECORD
    found: list[Launch] = []
    _RECORD = found
    try:
        yield found
    finally:
        _RECORD = None


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Leave every launch to `watch`, which is given the kernel's name, its row and what runs it."""
    global _WATCH
    _WATCH = watch
    try:
        yield
    finally:
        _WATCH = None


@contextmanager
def forced(name: str, picked: Row) -> Iterator[None]:
    """Run the named kernel with exactly this row: the per-row check on a card."""
    _FORCED[name] = picked
    try:
        yield
    finally:
        del _FORCED[name]


def allowed(name: str, rows: list[Row]) -> list[Row]:
    """Drop the rows that `kernels.check_gpu` found wrong on this card and this Triton version."""
    if INTERPRET or _RECORD is not None or not torch.cuda.is_available():
        return rows[:1] if INTERPRET else rows
    denied = _read_json(CACHE / "denied.json").get(device_tag(), {}).get(name, [])
    left = [r for r in rows if str(r) not in denied]
    if not left:
        raise RuntimeError(f"{name}: every configuration failed the check on {device_tag()}; use backend='chunked'")
    return left


def device_tag() -> str:
    """Architecture and Triton version, the key of the deny-list."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}|triton {triton.__version__}"


def deny(tag: str, wrong: set[tuple[str, str]], *, whole: bool) -> None:
    """Deny (kernel, row) pairs that gave wrong numbers on one card and Triton version.

    `whole`: all there is was checked, so what was denied before and is not among them is right now.
    """
    denied = _read_json(CACHE / "denied.json")
    if not whole:
        wrong = wrong | {(kernel, r) for kernel, found in denied.get(tag, {}).items() for r in found}
    denied[tag] = {kernel: sorted(r for k, r in wrong if k == kernel) for kernel in sorted({k for k, _ in wrong})}
    _write_json(CACHE / "denied.json", denied)


def precision() -> str:
    """The `input_precision` of every dot: float32 data keeps its digits on tensor cores by three tf32 products."""
    return "ieee" if INTERPRET or torch.version.hip is not None else "tf32x3"


def host(tensor: Tensor) -> Tensor:
    """Contiguous, and float32 instead of bfloat16 in the interpreter, which computes bfloat16 silently wrong."""
    if INTERPRET and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous()


def offsets(batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Kernels know only packed rows: a dense batch is the packed one with equal lengths."""
    if cu_seqlens is not None:
        return cu_seqlens.to(device=device, dtype=torch.int64).contiguous()
    return torch.arange(batch + 1, device=device, dtype=torch.int64) * length


def pow2(n: int, least: int = 16) -> int:
    """Smallest power of two >= n, at least 16, which a dot needs."""
    return max(least, int(triton.next_power_of_2(n)))


def _first_tensor(args: dict[str, Any]) -> Tensor:
    return next(a for a in args.values() if isinstance(a, Tensor))


_JSON: dict[Path, dict[str, Any]] = {}


def _read_json(path: Path) -> dict[str, Any]:
    if path not in _JSON:
        _JSON[path] = json.loads(path.read_text()) if path.exists() else {}
    return _JSON[path]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _JSON[path] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all: other processes on this card read it
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(value, indent=1, sort_keys=True))
    part.replace(path)


def _cached(key: str, rows: list[Row]) -> Row | None:
    stored = _read_json(CACHE / "tuned.json").get(key)
    return next((r for r in rows if str(r) == stored), None)


def chunk_table(cu: Tensor, rows: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Sequence of every chunk row (S for the surplus rows) and the first row of every sequence; waits for nothing."""
    first = chunk_offsets(cu, chunk)
    index = torch.arange(rows, device=cu.device)
    return torch.searchsorted(first[1:].contiguous(), index, right=True).to(torch.int32), first

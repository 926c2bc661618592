"""Compile every recorded launch for cards that are not here, and read what the compiler made of it.

Runs without a GPU, in a process without TRITON_INTERPRET: ptxas, cuobjdump and nvdisasm come with Triton.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.common.triton import INTERPRET, Launch, Row, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory one program may use
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became: registers and stack per thread, shared bytes, tensor-core instructions in the PTX."""

    kernel: str
    case: str
    row: str
    target: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int

    @property
    def key(self) -> str:
        return f"{self.kernel} | {self.case} | {self.row} | {self.target}"

    def numbers(self) -> dict[str, int]:
        """The numbers alone, as they stand in the table."""
        return {k: v for k, v in asdict(self).items() if k in ("registers", "stack", "shared", "wgmma", "mma")}


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches `call` would make, one per kernel (the last: of two alike modes the larger comes last) and row."""
    if INTERPRET:
        raise RuntimeError("the compiler does not run under TRITON_INTERPRET=1; unset it")
    with recording() as found:
        call()
    return found


def _signature(launch: Launch, picked: Row, hip: bool) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    values = {**launch.args, **dict(picked.meta)}
    if hip:
        values["PREC"] = "ieee"
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(launch.kernel.fn.params):
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            # what the JIT sees for a fresh tensor; without it a kernel is compiled that never runs
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, case: str, target: str) -> Compiled:
    """Compile one launch with its row for one target."""
    gpu = TARGETS[target]
    hip = gpu.backend == "hip"
    signature, constants, attributes = _signature(launch, launch.row, hip)
    source = ASTSource(launch.kernel.fn, signature, constants, attributes)
    options = dict(launch.row.options())
    built = triton.compile(source, target=gpu, options=options)
    registers, stack = _amd_usage(built.asm["amdgcn"]) if hip else _nvidia_usage(built.asm["cubin"])
    ptx = "" if hip else built.asm["ptx"]
    return Compiled(
        launch.kernel.name,
        case,
        str(launch.row),
        target,
        registers,
        stack,
        built.metadata.shared,
        ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
        ptx.count("mma.sync"),
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    assert registers, text
    assert stack, text
    return int(registers[1]), int(stack[1])


def _amd_usage(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return int(registers[1]) if registers else -1, int(scratch[1]) if scratch else -1


def compile_cases(cases: dict[str, Callable[[], Any]], targets: list[str], *, all_rows: bool) -> Iterator[Compiled]:
    """Compile each distinct (kernel, modes, row) of the cases for each target."""
    for case, call in cases.items():
        seen: set[str] = set()
        for launch in record(call):
            default = launch.kernel.rows(launch.args)[0]
            modes = "".join(
                f" {name.lower()}" for name in ("REVERSE", "SUMMARY", "DELTA") if launch.args.get(name) is True
            )
            mark = f"{launch.kernel.name}{modes}{launch.row}"
            if mark in seen or not (all_rows or launch.row == default):
                continue
            seen.add(mark)
            for target in targets:
                yield compile_launch(launch, case + modes, target)

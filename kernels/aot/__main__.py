"""python -m kernels.aot: compile the kernels for cards that are not here and hold them to the recorded table."""

import json
import sys
import time
from pathlib import Path

from kernels.aot.cases import cases
from kernels.common.options import Options

TABLE = Path(__file__).with_name("table.json")
# the compiler's small moves from build to build
REGISTER_SLACK = 1.10


def problems(key: str, found: dict[str, int], recorded: dict[str, int] | None, shared_limit: int) -> list[str]:
    """What is worse than recorded, in words."""
    if recorded is None:
        return [f"{key}: not in the table; run python -m kernels.aot --write"]
    said = []
    if found["stack"] > recorded["stack"]:
        said.append(f"{key}: {found['stack']} bytes of stack, recorded {recorded['stack']}")
    if found["registers"] > recorded["registers"] * REGISTER_SLACK:
        said.append(f"{key}: {found['registers']} registers, recorded {recorded['registers']}")
    if found["shared"] > shared_limit:
        said.append(f"{key}: {found['shared']} bytes of shared memory, the card has {shared_limit}")
    if recorded["wgmma"] > 0 and found["wgmma"] == 0:
        said.append(f"{key}: no wgmma any more, recorded {recorded['wgmma']}")
    return said


def _tables() -> dict[str, dict[str, dict[str, int]]]:
    """Triton version to key to numbers."""
    return dict(json.loads(TABLE.read_text())) if TABLE.exists() else {}


def _record(version: str, key: str, numbers: dict[str, int]) -> None:
    # read again and replaced whole, row by row: a run cut short keeps what it has, two runs keep both
    tables = _tables()
    tables.setdefault(version, {})[key] = numbers
    fresh = TABLE.with_suffix(".new")
    fresh.write_text(json.dumps(tables, indent=0, sort_keys=True) + "\n")
    fresh.replace(TABLE)


def main(argv: list[str] | None = None) -> int:
    """Compile and compare (or write); exit code 1 if anything is worse than recorded."""
    parser = Options(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--write", action="store_true", help="record what is found instead of comparing")
    parser.add_argument("--smoke", action="store_true", help="only the cases of the everyday test")
    parser.add_argument("--targets", default="sm_90", help="comma list of sm_80, sm_90, sm_100, gfx942")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--all-rows", action="store_true", help="every configuration, not only the defaults")
    options = parser.parse_args(argv)
    import triton

    from kernels.aot.triton import SHARED_LIMIT, TARGETS, compile_cases

    targets = options.targets.split(",")
    if unknown := [t for t in targets if t not in TARGETS]:
        parser.error(f"unknown target {unknown[0]!r}; use {', '.join(TARGETS)}")
    table = _tables().get(triton.__version__, {})
    chosen = {name: call for name, call in cases(options.smoke).items() if options.only in name}
    said: list[str] = []
    started, count, unspilled = time.monotonic(), 0, 0
    for one in compile_cases(chosen, targets, all_rows=options.all_rows):
        count, unspilled = count + 1, unspilled + (one.stack == 0)
        if options.write:
            _record(triton.__version__, one.key, one.numbers())
        else:
            said += problems(one.key, one.numbers(), table.get(one.key), SHARED_LIMIT[one.target])
    took = f"{time.monotonic() - started:.0f} s"
    print(f"triton {triton.__version__}: {count} kernels compiled, {unspilled} without stack, {took}")
    print("\n".join(said))
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())

"""What a card would be told, seen without one: grids, offsets, devices, the tuner and the deny-list."""

import importlib
import os
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import kernel_properties as props
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import check_gpu
from kernels.bench.shapes import PROBLEMS
from kernels.common import apart, explain, triton, triton_packed
from kernels.linear_scan import linear_scan
from kernels.newton_rnn import newton_rnn
from kernels.ridge_memory import ridge_memory
from kernels.sequential_rnn import m2rnn, sequential_rnn

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="real compiler in this process")
CARD = "sm_90|triton 3.8.0"


@pytest.fixture
def as_on_a_card(monkeypatch, tmp_path):
    """Rows are chosen as on a card, whatever runs them; nothing is kept outside of the test."""
    # who looks at the switch when imported must not find it turned
    importlib.import_module("kernels.ridge_memory.triton")
    monkeypatch.setattr(triton, "INTERPRET", False)
    monkeypatch.setattr(triton, "CACHE", tmp_path)
    monkeypatch.delenv("KERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(triton, "device_tag", lambda: CARD)
    monkeypatch.setattr(triton.torch.cuda, "get_device_name", lambda _: "card")


class Function:
    """In the place of a jitted function: counts the launches of every row."""

    __name__ = "_k"

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        return lambda **args: self.seen.append(args["BK"])


def two_rows(function):
    return triton.Kernel(function, lambda args: [triton.row(BK=64), triton.row(BK=32)], ())


def one_block(meta):
    return (1,)


@pytest.mark.parametrize("fastest", ["first", "last"])
def test_tuning_leaves_no_part_of_another_row(fastest, as_on_a_card, monkeypatch):
    """Rows of 16 keys write three parts of a sum over 40, rows of 32 only two."""
    from kernels.sequential_rnn import triton_m2rnn

    for kernel in (triton_m2rnn.WALK, triton_m2rnn.ADJOINT):
        monkeypatch.setattr(kernel, "chosen", {})
    times = []

    def bench(call, **how):
        call()
        times.append(len(times))
        return times[-1] if fastest == "first" else -times[-1]

    monkeypatch.setattr(triton.triton.testing, "do_bench", bench)
    gen = torch.Generator().manual_seed(0)
    sizes = [(1, 5, 1, 40), (1, 5, 1, 40), (1, 5, 1, 3), (1, 5, 1), (3, 3)]
    leaves = [torch.rand(size, generator=gen).requires_grad_() for size in sizes]
    runs = []
    for backend in ("triton", "chunked"):
        o, state = m2rnn(*leaves, chunk=16, backend=backend)
        runs.append([o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)])
    assert len(times) == 5
    assert max(props.error(a, b) for a, b in zip(*runs, strict=True)) < 1e-5


def test_tuner_passes_over_rows_that_do_not_fit(as_on_a_card, monkeypatch):
    function, out = Function(), torch.zeros(1)

    def bench(call, **how):
        if len(function.seen) == 0:
            function.seen.append("too much")
            raise triton.triton.runtime.errors.OutOfResources(200_000, 101_376, "shared memory")
        call()
        return 1.0

    monkeypatch.setattr(triton.triton.testing, "do_bench", bench)
    two_rows(function).launch(one_block, out_ptr=out)
    assert function.seen == ["too much", 32, 32]


def test_nothing_fits_is_one_sentence(as_on_a_card, monkeypatch):
    def bench(call, **how):
        raise triton.triton.runtime.errors.OutOfResources(200_000, 101_376, "shared memory")

    monkeypatch.setattr(triton.triton.testing, "do_bench", bench)
    with pytest.raises(RuntimeError, match=r"k: no configuration fits sm_90.*; use backend='chunked'"):
        two_rows(Function()).launch(one_block, out_ptr=torch.zeros(1))


def test_tuner_needs_no_place_to_write(as_on_a_card, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton, "CACHE", tmp_path / "file" / "below")
    monkeypatch.setattr(triton.triton.testing, "do_bench", lambda call, **how: call() or 1.0)
    function = Function()
    two_rows(function).launch(one_block, out_ptr=torch.zeros(1))
    assert function.seen == [64, 32, 64]


def test_launches_on_the_card_of_its_arguments(monkeypatch):
    inside, current = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    out, function = torch.zeros(1), Function()
    function.__class__ = type("F", (Function,), {"__getitem__": lambda _, grid: lambda **args: inside.extend(current)})
    two_rows(function).launch(one_block, scale=1.0, out_ptr=out)
    assert len(inside) == 1 and inside[0] is out


def sequential(x):
    return sequential_rnn(x, torch.zeros(3, 1, 1, 1), backend="triton")


LONG = {
    "channels": (lambda x: linear_scan(x, x, backend="triton"), lambda n: (1, 1, n), 2_097_120),
    "units": (lambda x: newton_rnn(x, x[0, 0], backend="triton"), lambda n: (1, 1, 3, n), 1_048_560),
    "sequences": (sequential, lambda n: (n, 1, 3, 1, 1), 1_048_560),
}


@pytest.mark.parametrize("what", LONG)
def test_no_grid_is_longer_than_a_card_takes(what, monkeypatch):
    """Its second and third axis end at 65535; what would be longer is refused in one sentence."""
    grids, (op, shape, most) = [], LONG[what]
    monkeypatch.setattr(triton.Kernel, "_run", lambda self, picked, grid, args: grids.append(grid(dict(picked.meta))))
    x = torch.zeros(shape(most), requires_grad=True)
    op(x)[0].sum().backward()
    assert [max(grid[1:]) for grid in grids] == [65_535] * 2
    said = f"'triton' takes at most {most} {what}, got {most + 1}; use backend='chunked'"
    with pytest.raises(ValueError, match=said):
        op(torch.zeros(shape(most + 1)))


@pytest.fixture
def addresses(monkeypatch):
    """Every address that a kernel in the interpreter reads and writes; only borders are really read."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    found, read = {"read": set(), "written": set()}, InterpreterBuilder.create_masked_load

    def load(self, ptrs, mask, other, *how):
        kind = ptrs.get_element_ty()
        if kind.is_int():
            return read(self, ptrs, mask, other, *how)
        found["read"] |= set(ptrs.data[mask.data].ravel().tolist())
        return TensorHandle(torch.zeros(ptrs.data.shape).numpy().astype(_get_np_dtype(kind)), kind)

    def store(self, ptrs, value, mask, *how):
        found["written"] |= set(ptrs.data[mask.data].ravel().tolist())

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    return found


def test_offsets_beyond_31_bits_of_sequential(addresses):
    """One token of 2^28 in eight heads of one unit: the parts of the sLSTM's state lie 2^31 numbers apart."""
    from kernels.sequential_rnn import triton as module

    tokens, heads = 2**28, 8
    names = ("x", "r", "s0", "reset", "cu", "bias", "states", "final", "recurrent", "dh", "dfinal", "g", "dn", "ds0")
    floats = {f"{name}_ptr": torch.zeros(64) for name in names}
    flags = {"GRU": False, "LSTM": False, "EXPONENTIAL": False, "HAS_START": False, "HAS_RESET": False}
    sizes = {"TOKENS": tokens, "S": 1, "H": heads, "D": 1, "PREC": "ieee", "KEEP": 1, "BB": 16, "BD": 16}
    given = floats | flags | sizes
    given["cu_ptr"] = torch.tensor([0, 1])
    for kernel in (module.WALK.fn, module.ADJOINT.fn):
        kernel[(heads, 1)](**{name: x for name, x in given.items() if name in kernel.arg_names})
    states, g = (given[name].data_ptr() for name in ("states_ptr", "g_ptr"))
    # c, n, m, h are written by the walk; c and n of the token are read by the adjoint
    parts = [{states + 4 * (part * tokens * heads + head) for head in range(heads)} for part in range(4)]
    assert set.union(*parts) <= addresses["written"]
    assert parts[0] | parts[1] <= addresses["read"]
    # gradients of the recurrent products [H, T, G, D]
    assert {g + 4 * (head * tokens * 4 + gate) for head in range(heads) for gate in range(4)} <= addresses["written"]


def test_a_check_of_some_ops_keeps_what_was_denied(as_on_a_card):
    triton.deny(CARD, {("a", "row 1")}, whole=True)
    triton.deny(CARD, {("b", "row 2")}, whole=False)
    assert triton._read_json(triton.CACHE / "denied.json") == {CARD: {"a": ["row 1"], "b": ["row 2"]}}
    triton.deny(CARD, {("b", "row 2")}, whole=True)
    assert triton._read_json(triton.CACHE / "denied.json") == {CARD: {"b": ["row 2"]}}


def test_a_forced_row_runs_even_where_all_are_denied(as_on_a_card, monkeypatch):
    """Or no later check could find it right again."""
    monkeypatch.setattr(triton.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    function = Function()
    kernel = two_rows(function)
    triton.deny(CARD, {("k", str(r)) for r in kernel.rows({})}, whole=True)
    with triton.forced("k", kernel.rows({})[1]):
        kernel.launch(one_block, out_ptr=torch.zeros(1))
    assert function.seen == [32]


@pytest.mark.slow
def test_the_check_reaches_every_kernel(as_on_a_card):
    """In every mode: the scan's summaries and their carry need more time than the others."""
    found, reached = {}, set()
    for path in sorted(Path(check_gpu.__file__).parent.glob("*/triton*.py")):
        module = importlib.import_module(f"kernels.{path.parent.name}.{path.stem}")
        found |= {x.name: x for x in vars(module).values() if isinstance(x, triton.Kernel)}
    for name, problem in PROBLEMS.items():
        for shape in [*check_gpu.SHAPES, *check_gpu.MORE.get(name, [])]:
            inputs = problem.draw(shape, torch.float32, torch.device("cpu"))
            # what a kernel refuses is not for it
            with suppress(ValueError):
                reached |= {launch.kernel.name for launch, _ in check_gpu._configurations(problem, inputs)}
    assert len(found) > 20
    assert reached == set(found)


def test_one_wrong_row_denies_no_other(as_on_a_card, monkeypatch):
    """The default of one kernel is wrong, so every call is, but for those that force another row of that kernel."""

    def worst(**options):
        row = triton._FORCED.get("walk_states")
        return 1.0 if row is None or row.warps == 4 else 0.0

    monkeypatch.setattr(check_gpu, "judge", lambda problem, inputs: worst)
    problem = PROBLEMS["gla_scalar"]
    monkeypatch.setattr(check_gpu, "explain", lambda *args, **how: None)
    found = list(check_gpu.check(problem, (1, 40, 1, 16), torch.float32, torch.device("cpu"), {}))
    wrong = {(r["kernel"], r["row"]) for r in found if not r["ok"]}
    assert wrong == {("walk_states", str(triton.row(BK=16, BV=16, warps=4)))}
    assert len({r["kernel"] for r in found}) == 6


@pytest.mark.parametrize("death", ["error", "exit"])
@pytest.mark.parametrize("most", [1, 2])
def test_a_row_that_takes_its_process_along_denies_no_other(most, death, as_on_a_card, monkeypatch):
    """As an illegal access does: all that the process is asked afterwards fails. With `most` 1 it is the default, which
    every call launches but for those that force the other row; with 2 no row is left for what is launched beside."""
    problem, shape, cpu = PROBLEMS["gla_scalar"], (1, 40, 1, 16), torch.device("cpu")
    launches = check_gpu._configurations(problem, problem.draw(shape, torch.float32, cpu))
    rows = {(fused, x.kernel.name): [] for x, fused in launches}
    for x, fused in launches:
        rows[fused, x.kernel.name].append(x.row)
    every = {(name, str(row)) for (_, name), own in rows.items() for row in own}
    broken, lost = set(rows[False, "chunk_outputs"][:most]), []

    def run(kernel, row):
        if kernel == "chunk_outputs" and row in broken:
            lost.append(row)
            if death == "exit":
                os._exit(1)
        alive()

    def alive(device=None):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def measure(**options):
        for (fused, kernel), own in rows.items():
            row = triton._FORCED.get(kernel, own[0])
            if fused == triton_packed._FUSING:
                triton._WATCH(kernel, row, lambda kernel=kernel, row=row: run(kernel, row))
        return 0.0

    monkeypatch.setattr(check_gpu, "judge", lambda problem, inputs: measure)
    monkeypatch.setattr(check_gpu, "explain", lambda *args, **how: None)
    monkeypatch.setattr(check_gpu, "_wait", alive)
    monkeypatch.setattr(apart, "CONTEXT", get_context("fork"))
    task = (problem.name, shape, torch.float32, cpu)
    (found,) = apart.shared(check_gpu._survived, [task], [apart.Apart(check_gpu._checked, 60)])
    right, wrong = ({(r["kernel"], r["row"]) for r in found if r["ok"] is ok} for ok in (True, False))
    assert wrong == {("chunk_outputs", str(row)) for row in broken}
    # what needs a kernel of which nothing is left cannot be judged: only the fused walk does without
    fused = {(name, str(row)) for (fused, name), own in rows.items() for row in own if fused}
    assert right == (every - wrong if most == 1 else fused)
    assert all("illegal" in r["note"] or "exit code 1" in r["note"] for r in found if not r["ok"])


@pytest.mark.parametrize("fuse", [True, False])
def test_what_is_timed_is_compiled_beforehand(fuse, as_on_a_card, monkeypatch):
    """Every row of what the bench launches, of the forward alone too, which keeps no states in the fused walk."""
    from triton.runtime.interpreter import InterpretedFunction

    from kernels.bench import ahead

    seen, noted = [], []
    monkeypatch.setattr(InterpretedFunction, "warmup", lambda fn, grid, **args: seen.append((fn, args)), raising=False)
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    task = ("gla_scalar", (1, 40, 1, 64), torch.bfloat16, torch.device("cpu"), fuse)
    assert ahead.compile_one(noted.append, *task) == len(seen) > 0
    kept = {args["SAVE"] for fn, args in seen if fn.__name__ == "_walk_outputs"}
    assert kept == ({True, False} if fuse else set())
    walks = {(args["BK"], args["BV"], args["num_warps"]) for fn, args in seen if fn.__name__ == "_walk_state_gradients"}
    assert walks == {(64, 64, 4), (64, 64, 8), (64, 32, 4)}


def test_what_cannot_be_compiled_beforehand_is_left_to_the_run(monkeypatch, capsys):
    from kernels.bench import ahead

    def one(note, name):
        if name == "kda":
            os._exit(9)
        return 3

    monkeypatch.setattr(apart, "CONTEXT", get_context("fork"))
    monkeypatch.setattr(ahead, "compile_one", one)
    assert ahead.compiled([("kda",), ("deltanet",), ("deltanet",)], 2) == 6
    assert "not compiled beforehand: kda: its process ended with exit code 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "width", "shared", "backend"),
    [
        (torch.bfloat16, 128, 101_376, "chunked"),
        (torch.bfloat16, 128, 166_912, "triton"),
        (torch.bfloat16, 64, 101_376, "triton"),
        (torch.float32, 128, 166_912, "chunked"),
        (torch.float32, 128, 232_448, "triton"),
    ],
)
def test_ridge_memory_knows_the_room_on_the_card(dtype, width, shared, backend, monkeypatch):
    """Shared memory of consumer cards, of the A100 and of the H100; K = 128 takes 114688 bytes, 180224 in float32."""
    card = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with FakeTensorMode():
        x = torch.empty(1, 8, 1, width, dtype=dtype, device="cuda")
        assert explain(ridge_memory, x, x, x).backend == backend

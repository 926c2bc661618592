"""Bad input: one clear sentence, the value and what would be allowed; and what an op says about how it would run."""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from kernels.common import Decision, cu_seqlens_from_reset, explain
from kernels.common.checks import require_cu_seqlens
from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention, mlstm
from kernels.gated_linear_attention.mlstm import MLSTMState
from kernels.linear_scan import linear_scan
from kernels.memory_cache import MemoryCacheState, memory_cache, routed_memory
from kernels.neural_memory import NeuralMemoryState, TNTState, neural_memory, tnt_memory
from kernels.newton_rnn import newton_rnn
from kernels.recurrent_attention import RecurrentAttentionState, recurrent_attention
from kernels.ridge_memory import ridge_memory
from kernels.sequential_rnn import m2rnn, sequential_rnn

X = torch.ones(1, 4, 2, 3)
B = torch.ones(1, 4, 2)
BAD = [
    (linear_scan, (X, X[:, :3]), {}, "a must be the shape of u"),
    (linear_scan, (X, X), {"backend": "cuda"}, "unknown backend 'cuda'; use one of auto"),
    (linear_scan, (X, X), {"chunk": 0}, "chunk must be at least 1, got 0"),
    (gated_linear_attention, (X, X, X), {"chunk": 24}, "power of two, got 24"),
    (linear_scan, (X, X.to(torch.complex64)), {}, "both be real or both complex"),
    (linear_scan, (X.int(), X.int()), {}, "must be floating point, got torch.int32"),
    (linear_scan, (X[:, :0], X[:, :0]), {}, "T >= 1"),
    (linear_scan, (X, X), {"reset": torch.zeros(1, 3)}, "reset must be"),
    (gated_linear_attention, (X, X[..., :2], X), {}, "k must be the shape of q"),
    (gated_linear_attention, (X, X, X[:, :2]), {}, "v must be"),
    (gated_linear_attention, (X, X, X, B[:, :2]), {}, "g must be"),
    (gated_linear_attention, (X, X, X.double()), {}, "share one dtype"),
    (gated_linear_attention, (X, X, X), {"initial_state": torch.ones(1, 2, 3, 4)}, "initial_state must be"),
    (gated_linear_attention, (X.double(), X.double(), X.double()), {"backend": "triton"}, "refuses float64"),
    (delta_rule, (X, X, X, X), {}, "beta must be"),
    (
        delta_rule,
        (X.repeat(2, 1, 1, 1),) * 3 + (B.repeat(2, 1, 1),),
        {"cu_seqlens": torch.tensor([0, 4])},
        "must be 1, got 2",
    ),
    (delta_rule, (X, X, X, B), {"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64"),
    (delta_rule, (X, X, X, B), {"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens must start at 0, got 1"),
    (linear_scan, (X, X), {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must end at T = 4, got 3"),
    (gated_linear_attention, (X, X, X), {"cu_seqlens": torch.tensor([0, 5])}, "must end at T = 4, got 5"),
    (
        gated_linear_attention,
        (X, X, X),
        {"cu_seqlens": torch.tensor([0, 3, 2, 4])},
        "must never decrease, got 3 then 2 at sequence 1",
    ),
    (mlstm, (X, X, X, B, B), {"cu_seqlens": torch.tensor([0, 1, 3])}, "mlstm: cu_seqlens must end at T = 4"),
    (delta_rule, (X, X, X, B), {"backend": "triton", "chunk": 128}, "has chunks 16, 32, 64, got 128"),
    (delta_rule, (torch.ones(1, 4, 1, 300),) * 3 + (B[..., :1],), {"backend": "triton"}, "K <= 256, got 300"),
    (mlstm, (X, X, X, B, B), {"variant": "tanh"}, "unknown variant 'tanh'"),
    (mlstm, (X, X, X, X, B), {}, "i_gate must be"),
    (mlstm, (X, X, X[:, :3], B, B), {}, "mlstm: v must be [B, T, H, V] with B, T, H of q [1, 4, 2], got [1, 3, 2, 3]"),
    (mlstm, (B, B, B, B, B), {}, "mlstm: q must be [B, T, H, K]"),
    (mlstm, (X, X, X, B.int(), B), {}, "i_gate must be floating point, got torch.int32"),
    (mlstm, (X, X, X, B, B.to("meta")), {}, "f_gate is on meta but q is on cpu"),
    (mlstm, (X, X, X, B, B), {"initial_state": torch.ones(1, 2, 3, 3)}, "must be an MLSTMState, got Tensor"),
    (
        mlstm,
        (X, X, X, B, B),
        {"initial_state": MLSTMState(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4), torch.ones(1, 2))},
        "initial_state.normaliser must be [sequences, H, K] = [1, 2, 3], got [1, 2, 4]",
    ),
    (gated_linear_attention, (X, X, X, -0.5), {}, "g must be a tensor, got float"),
    (gated_linear_attention, (X, X, X), {"cu_seqlens": [0, 4]}, "cu_seqlens must be a tensor, got list"),
    (gated_linear_attention, (X, X, X), {"chunk": 16.0}, "chunk must be a whole number, got 16.0"),
    (linear_scan, (X, X), {"reset": torch.zeros(1, 4)}, "reset must be bool, got torch.float32"),
    (
        linear_scan,
        (X, X),
        {"reset": torch.zeros(1, 4, dtype=torch.bool, device="meta")},
        "reset is on meta but the inputs are on cpu",
    ),
    (cu_seqlens_from_reset, (torch.zeros(4, dtype=torch.bool),), {}, "reset must be [B, T] with T >= 1, got [4]"),
]
# an imaginary part, or what a factor learns, must not be lost without a word
IMAGINARY = torch.complex(B, B)
BAD += [
    (gated_linear_attention, (X, X, X, IMAGINARY), {}, "complex inputs are for linear_scan, got g torch.complex64"),
    (delta_rule, (X, X, X, IMAGINARY), {}, "for linear_scan, got beta torch.complex64"),
    (
        gated_linear_attention,
        (X, X, X),
        {"initial_state": 1j * torch.ones(1, 2, 3, 3)},
        "for linear_scan, got initial_state torch.complex64",
    ),
    (
        linear_scan,
        (X, X),
        {"initial_state": 1j * torch.ones(1, 2, 3)},
        "initial_state must be real like u, got torch.complex64 and torch.float32",
    ),
    (mlstm, (X, X, X, IMAGINARY, B), {}, "for linear_scan, got i_gate torch.complex64"),
    (m2rnn, (X, X, X, IMAGINARY, torch.ones(3, 3)), {}, "for linear_scan, got f torch.complex64"),
    (gated_linear_attention, (X, X, X), {"scale": torch.tensor(2.0)}, "scale must be a number, got a tensor"),
    (delta_rule, (X, X, X, B), {"scale": torch.tensor(2.0)}, "scale must be a number, got a tensor"),
    (delta_rule, (X, X, X, B), {"scale": True}, "scale must be a number, got True"),
]
# the memories
ROUTER = torch.ones(1, 4, 5)
PAIR = (torch.ones(2, 3), torch.ones(2, 3))
# three tokens into a chunk, segment or shard
W = torch.ones(1, 2, 3, 3)
WITHIN = NeuralMemoryState((W,), (), (W,), (3,))
CACHED = MemoryCacheState(W, W[:, None], torch.ones(1, 1, 2, 0), torch.ones(1, 2, 0), 3)
HIERARCHY = TNTState(WITHIN, (WITHIN,), (W,), ((3,),))
RESIDUAL = {"segment": 4, "variant": "residual"}
HALVES = {"cu_seqlens": torch.tensor([0, 2, 4])}
BAD += [
    (ridge_memory, (X, X, X, X), {}, "beta must be"),
    (ridge_memory, (X, X, X, B, X), {}, "H stays symmetric"),
    (ridge_memory, (X, X, X, B, B, X), {}, "mix must be"),
    (ridge_memory, (X, X, X), {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    (ridge_memory, (X, X, X), {"ratio": 0.0}, "ratio must be above 0, got 0.0"),
    (ridge_memory, (X, X, X), {"ratio": "a"}, "ratio must be a number, got 'a'"),
    (ridge_memory, (X, X, X), {"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
    (ridge_memory, (X, X, X), {"initial_state": torch.ones(1, 2, 3, 3)}, "initial_state must be"),
    (ridge_memory, (torch.ones(1, 4, 1, 200),) * 3, {"backend": "triton"}, "K <= 128, got 200"),
    (neural_memory, (X, X, X, X), {"chunk": 2}, "beta must be"),
    (neural_memory, (X, X, X, B), {"chunk": 0}, "chunk must be a whole number of at least 1, got 0"),
    (neural_memory, (X, X, X, B), {"chunk": 2.0}, "chunk must be a whole number of at least 1, got 2.0"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "threshold": -1.0}, "threshold must be above 0, got -1.0"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "loss": "l1"}, "unknown loss 'l1'; use one of l2, huber, lp"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "activation": "relu"}, "unknown activation 'relu'"),
    (neural_memory, (X, X, X[..., :2], B), {"chunk": 2, "norm": PAIR}, "K must be V, got 3 and 2"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "weights": []}, "one matrix per layer, got none"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "weights": [torch.ones(2, 3, 4)]}, "must end in V = 3, got 4"),
    (neural_memory, (X, X, X, B), {"chunk": 2, "initial_state": WITHIN}, "within a chunk of 2, got positions (3,)"),
    (tnt_memory, (X, X, X, B), {"chunk": 2, "local_chunks": [1], "shards": []}, "of one length"),
    (
        tnt_memory,
        (X, X, X, B),
        {"chunk": 4, "local_chunks": [4], "shards": [2], "initial_state": HIERARCHY},
        "within a shard of 2, got positions (3,)",
    ),
    (
        tnt_memory,
        (X, X, X, B),
        {"chunk": 4, "local_chunks": [], "shards": [], "initial_state": HIERARCHY},
        "must hold 0 local memories, got 1",
    ),
    (tnt_memory, (X, X, X, B), {"chunk": 2, "local_chunks": [1], "shards": [0]}, "at least 1, got [1] and [0]"),
    (tnt_memory, (X, X, X, B), {"chunk": 2, "local_chunks": [1], "shards": [2.5]}, "whole numbers of at least 1"),
    (memory_cache, (X, X, X), {"segment": 2}, "needs both route_q and route_k"),
    (memory_cache, (X, X, X), {"segment": 2, "variant": "residual", "route_q": X, "route_k": X}, "takes neither"),
    (memory_cache, (X, X, X), {"segment": 2, "variant": "best"}, "unknown variant 'best'"),
    (memory_cache, (X, X, X), {"segment": 2, "write": "both"}, "unknown write 'both'; use one of carry, restart"),
    (memory_cache, (X, X, X), {"segment": 0, "variant": "residual"}, "segment must be at least 1, got 0"),
    (memory_cache, (X, X, X), {"segment": [3], "variant": "residual"}, "sum to T = 4, got [3]"),
    (memory_cache, (X, X, X), {"segment": 2.5, "variant": "residual"}, "a whole number or a list of them, got 2.5"),
    (memory_cache, (X, X, X, X), {"segment": 2, "variant": "residual"}, "memory_cache: beta must be"),
    (memory_cache, (X, X, X), {"segment": 2, "variant": "residual", "initial_state": X}, "one MemoryCacheState"),
    (
        memory_cache,
        (X, X, X),
        {**RESIDUAL, "segment": 2, "initial_state": CACHED},
        "within a segment of 2, got position 3",
    ),
    (memory_cache, (X, X, X), {**RESIDUAL, **HALVES, "initial_state": [CACHED]}, "one state for each of them"),
    (memory_cache, (X, X, X), {**RESIDUAL, **HALVES, "initial_state": [CACHED, X]}, "one MemoryCacheState, got Tensor"),
    (
        memory_cache,
        (X, X, X),
        {**RESIDUAL, **HALVES, "initial_state": [CACHED, CACHED._replace(current=X)]},
        "initial_state.current must be",
    ),
    (routed_memory, (X, X, X, X), {}, "router must be"),
    (routed_memory, (X, X, X, ROUTER.int()), {}, "router must be floating point, got torch.int32"),
    (routed_memory, (X, X, X, ROUTER), {"top_k": 6}, "top_k must be between 1 and E = 5, got 6"),
    (routed_memory, (X, X[:, :, None], X, ROUTER), {}, "k must have a memory axis"),
    (routed_memory, (X, X, X, ROUTER), {"initial_state": X}, "initial_state must be"),
]
# the nonlinear recurrences
GATES, R = torch.ones(1, 4, 3, 2, 3), torch.ones(3, 2, 3)
BLOCK = torch.ones(3, 2, 3, 3)
BAD += [
    (newton_rnn, (GATES, R), {"cell": "rnn"}, "unknown cell 'rnn'; use one of gru, lstm"),
    (newton_rnn, (GATES[:, :, :2], R), {}, "x must be [B, T, 3, ...]"),
    (newton_rnn, (GATES, R[:, :1]), {}, "r must be"),
    (newton_rnn, (GATES[..., 0], torch.ones(3, 2, 2)), {}, "a matrix per head needs x"),
    (newton_rnn, (GATES, R), {"peephole": R[:2]}, "peephole is for cell 'lstm', got cell 'gru'"),
    (newton_rnn, (GATES, R), {"initial_state": R}, "initial_state must be"),
    (newton_rnn, (GATES, R), {"max_iterations": -1}, "at least 0, got -1"),
    (newton_rnn, (GATES, R), {"tolerance": 0.0}, "tolerance must be above 0, got 0.0"),
    (newton_rnn, (torch.ones(1, 4, 3, 1, 17), torch.ones(3, 1, 17, 17)), {}, "D <= 16, got 17"),
    (newton_rnn, (torch.ones(1, 4, 3, 1, 17), torch.ones(3, 1, 17, 17)), {"backend": "triton"}, "use sequential_rnn"),
    (newton_rnn, (GATES, R), {"reset": torch.zeros(1, 3)}, "reset must be"),
    (newton_rnn, (GATES, R), {"reset": torch.zeros(1, 4, dtype=torch.int)}, "reset must be bool, got torch.int32"),
    (newton_rnn, (GATES, R), {"max_iterations": 2.5}, "max_iterations must be a whole number, got 2.5"),
    (newton_rnn, (GATES, 1j * R), {}, "for linear_scan, got r torch.complex64"),
    (sequential_rnn, (GATES, 1j * BLOCK), {}, "for linear_scan, got r torch.complex64"),
    (sequential_rnn, (GATES, BLOCK), {"cell": "lstm"}, "x must be [B, T, 4, H, D] for lstm"),
    (sequential_rnn, (GATES, BLOCK), {"cell": "rnn"}, "unknown cell 'rnn'"),
    (sequential_rnn, (GATES, R), {}, "r must be"),
    (sequential_rnn, (GATES, BLOCK, R[:2]), {}, "bias must be"),
    (sequential_rnn, (GATES, BLOCK), {"backend": "cuda"}, "unknown backend 'cuda'"),
    (
        sequential_rnn,
        (torch.ones(1, 2, 3, 1, 130), torch.ones(3, 1, 130, 130)),
        {"backend": "triton"},
        "D <= 64 in float32, got 130",
    ),
    (m2rnn, (X, X, X, B, torch.ones(2, 2)), {}, "w must be [V, V]"),
    (m2rnn, (X, X, X, X, torch.ones(3, 3)), {}, "f must be"),
    (m2rnn, (X, X, X, B, torch.ones(3, 3)), {"clip": 0.0}, "clip must be above 0, got 0.0"),
    (m2rnn, (X, X, X, B, torch.ones(3, 3)), {"clip": "a"}, "clip must be a number, got 'a'"),
    (m2rnn, (X, X, X, B, torch.ones(3, 3)), {"clip": 1.0, "backend": "reference"}, "use another backend"),
    (m2rnn, (X, X, torch.ones(1, 4, 2, 70), B, torch.ones(70, 70)), {"backend": "triton"}, "V <= 64, got 70"),
]
# recurrent attention: x, q, k, v, w_out, w_k, w_v
OUT, IN = torch.ones(2, 3, 5), torch.ones(5, 2, 3)
BLOCK_INPUTS = (torch.ones(1, 4, 5), X, X, X, OUT, IN, IN)
UP, KEPT = torch.ones(5, 7), torch.ones(1, 6, 2, 3)
BAD += [
    (recurrent_attention, (X, *BLOCK_INPUTS[1:]), {}, "x must be [B, T, D]"),
    (recurrent_attention, (*BLOCK_INPUTS[:2], X[:, :2], *BLOCK_INPUTS[3:]), {}, "k must be the shape of q"),
    (recurrent_attention, (*BLOCK_INPUTS[:4], IN, IN, IN), {}, "w_out must be [H, V, D]"),
    (recurrent_attention, (*BLOCK_INPUTS[:5], OUT, IN), {}, "w_k must be [D, H, K]"),
    (recurrent_attention, (*BLOCK_INPUTS, UP), {}, "go together, got only w_up"),
    (recurrent_attention, (*BLOCK_INPUTS, UP, UP), {}, "w_down must be [M, D]"),
    (recurrent_attention, BLOCK_INPUTS, {"slopes": torch.ones(3)}, "slopes must be [H]"),
    (recurrent_attention, BLOCK_INPUTS, {"slopes": torch.ones(2, requires_grad=True)}, "constants without a gradient"),
    (recurrent_attention, BLOCK_INPUTS, {"initial_state": X}, "must be a RecurrentAttentionState, got Tensor"),
    (
        recurrent_attention,
        BLOCK_INPUTS,
        {"initial_state": RecurrentAttentionState(KEPT, KEPT[:, :5], torch.zeros(1))},
        "initial_state.values must be",
    ),
    (recurrent_attention, BLOCK_INPUTS, {"reset": torch.zeros(1, 3)}, "reset must be"),
    (recurrent_attention, (*BLOCK_INPUTS[:4], 1j * OUT, IN, IN), {}, "for linear_scan, got w_out torch.complex64"),
    (recurrent_attention, BLOCK_INPUTS, {"scale": torch.tensor(2.0)}, "scale must be a number, got a tensor"),
    (recurrent_attention, BLOCK_INPUTS, {"backend": "triton"}, "has no kernel for it"),
]


@pytest.mark.parametrize(("op", "args", "options", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_one_clear_sentence(op, args, options, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        op(*args, **options)
    assert "\n" not in str(caught.value)


def test_triton_is_refused_on_cpu_and_never_imported():
    code = """
import sys, torch
from kernels.delta_rule import delta_rule
x = torch.ones(1, 40, 1, 4); b = torch.ones(1, 40, 1)
delta_rule(x, x, x, b)
# torch itself looks for triton at the first call of any custom op; ours stay out
assert not [m for m in sys.modules if m.endswith(".triton") and m.startswith("kernels")], "triton imported"
try:
    delta_rule(x, x, x, b, backend="triton")
except ValueError as e:
    print(e)
"""
    env = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "delta_rule: backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1 for its slow interpreter), got cpu; "
        "use backend='chunked'"
    )


def test_values_of_offsets_are_read_on_a_card_only_when_asked(monkeypatch):
    """`meta` stands for the card: reading a value there raises."""
    cu = torch.tensor([1, 9], device="meta")
    monkeypatch.delenv("KERNELS_CHECK", raising=False)
    require_cu_seqlens("op", cu, torch.empty(1, 4, device="meta"))
    monkeypatch.setenv("KERNELS_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError)):
        require_cu_seqlens("op", cu, torch.empty(1, 4, device="meta"))


def test_explain_tells_what_runs_and_why(monkeypatch):
    x = torch.ones(1, 40, 2, 4)
    found = explain(gated_linear_attention, x, x, x)
    assert (found.backend, found.chunk) == ("chunked", 32)
    assert "CUDA" in found.reason
    assert found.as_tags()["kernel.gated_linear_attention.backend"] == "chunked"
    assert explain(gated_linear_attention, x[:, :1], x[:, :1], x[:, :1]).chunk == 1
    assert explain(gated_linear_attention, x, x, x, backend="reference").backend == "reference"
    found = explain(mlstm, x, x, x, x[..., 0], x[..., 0], variant="sigmoid", chunk=16)
    assert (found.op, found.backend, found.chunk) == ("mlstm", "chunked", 16)
    assert "gated_linear_attention" in found.reason
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert explain(linear_scan, x, x).backend == "reference"
    assert explain(linear_scan, x, x, backend="chunked").backend == "chunked"
    assert isinstance(found, Decision)
    with pytest.raises(ValueError, match="not one of our ops"):
        explain(print, x)


def test_explain_memories():
    x, b = torch.ones(1, 40, 2, 4), torch.ones(1, 40, 2)
    found = explain(ridge_memory, x, x, x, b)
    assert (found.backend, found.chunk) == ("chunked", 32)
    assert explain(partial(ridge_memory, ratio=0.1), x, x, x, backend="reference").backend == "reference"
    found = explain(neural_memory, x, x, x, b, chunk=5)
    assert (found.backend, found.chunk) == ("chunked", 5)
    found = explain(neural_memory, x, x, x, b, None, b * 0, chunk=5)
    assert "CUDA" in found.reason
    found = explain(memory_cache, x, x, x, b, segment=8, variant="residual")
    assert (found.op, found.backend) == ("memory_cache", "chunked")
    assert "delta_rule" in found.reason
    found = explain(routed_memory, x, x, x, torch.ones(1, 40, 3))
    assert (found.op, found.backend) == ("routed_memory", "chunked")
    assert "gated_linear_attention" in found.reason


def test_explain_nonlinear_recurrences(monkeypatch):
    x, r = torch.ones(1, 40, 3, 2, 4), torch.ones(3, 2, 4)
    found = explain(newton_rnn, x, r)
    assert (found.op, found.backend, found.chunk) == ("newton_rnn", "chunked", 64)
    assert "CUDA" in found.reason
    monkeypatch.setattr("kernels.common.dispatch.HAS_NUMBA", False)
    assert explain(sequential_rnn, x, torch.ones(3, 2, 4, 4)).as_tags()["kernel.sequential_rnn.backend"] == "chunked"
    q = torch.ones(1, 40, 2, 4)
    assert explain(m2rnn, q, q, q, q[..., 0], torch.ones(4, 4)).chunk == 32
    monkeypatch.setenv("KERNELS_BACKEND", "reference")
    assert explain(newton_rnn, x, r).backend == "reference"

"""Neural memory: a memory that trains itself on the stream it reads (TTT, Titans), and TNT's hierarchy of such."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.common.checks import require_alike, require_cu_seqlens, require_numbers, require_shape, state_dtype
from kernels.common.dispatch import Decision, choose, explained_by, without_autocast
from kernels.neural_memory import chunked, schedule, walk
from kernels.neural_memory.model import ACTIVATIONS, LOSSES, Model
from kernels.neural_memory.reference import neural_memory_reference
from kernels.neural_memory.schedule import NeuralMemoryState, Row

__all__ = ["NeuralMemoryState", "TNTState", "neural_memory", "tnt_memory"]

OP = "neural_memory"
# multiplications of a call, forward, from which its loops are worth compiling: a minute, once on a machine
WORTH_COMPILING = 2**24


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    momentum: Tensor | None = None,
    *,
    chunk: int,
    weights: Sequence[Tensor] | None = None,
    activation: str = "gelu",
    loss: str = "l2",
    threshold: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    initial_state: NeuralMemoryState | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint: bool = False,
    backend: str = "auto",
) -> Decision:
    if q.dim() != 4 or min(q.shape) < 1:
        raise ValueError(f"{OP}: q must be [B, T, H, K] with no empty size, got {list(q.shape)}")
    require_shape(OP, "k", k, tuple(q.shape), "the shape of q")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] < 1:
        raise ValueError(f"{OP}: v must be [B, T, H, V] with B, T, H of q {list(q.shape[:3])}, got {list(v.shape)}")
    for name, gate in (("beta", beta), ("g", g), ("momentum", momentum)):
        if gate is not None:
            require_shape(OP, name, gate, tuple(q.shape[:3]), "[B, T, H]")
    require_alike(OP, {"q": q, "k": k, "v": v, "beta": beta, "g": g, "momentum": momentum})
    require_cu_seqlens(OP, cu_seqlens, q)
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"{OP}: chunk must be a whole number of at least 1, got {chunk!r}")
    for name, value, allowed in (("activation", activation, ACTIVATIONS), ("loss", loss, LOSSES)):
        if value not in allowed:
            raise ValueError(f"{OP}: unknown {name} {value!r}; use one of {', '.join(allowed)}")
    require_numbers(OP, above_zero=True, threshold=threshold)
    if norm is not None and q.shape[3] != v.shape[3]:
        raise ValueError(f"{OP}: norm adds the query to the answer, so K must be V, got {q.shape[3]} and {v.shape[3]}")
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _require_state(initial_state, q, v, momentum, sequences, chunk)
    elif weights is not None:
        _require_layers(weights, q, v, (q.shape[2],), "[H, in, out]")
    # torch would take what has a backward by hand for a constant, without a word
    is_forward_mode = getattr(forward_ad, "_current_level", -1) >= 0
    is_small = is_forward_mode or q.shape[:3].numel() * _numbers(q, v, weights, initial_state) < WORTH_COMPILING
    decision = choose(OP, backend, v, refusal=None, is_traced=True, has_numba=True, is_small=is_small)
    if decision.backend == "numba" and is_forward_mode:
        raise ValueError(f"{OP}: backend 'numba' has no forward-mode derivatives; use backend='chunked'")
    return replace(decision, chunk=chunk)


def _numbers(q: Tensor, v: Tensor, weights: Sequence[Tensor] | None, state: NeuralMemoryState | None) -> int:
    """Of a memory, in one head of one sequence."""
    if state is not None:
        weights = state.weights
    return q.shape[3] * v.shape[3] if weights is None else sum(w.shape[-2:].numel() for w in weights)


def _require_layers(weights: Sequence[Tensor], q: Tensor, v: Tensor, lead: tuple[int, ...], legend: str) -> None:
    """Raise unless the layers lead from K to V."""
    if not weights:
        raise ValueError(f"{OP}: weights must be one matrix per layer, got none")
    sizes = [q.shape[3], *(w.shape[-1] for w in weights)]
    for layer, w in enumerate(weights):
        require_shape(OP, f"weights of layer {layer}", w, (*lead, sizes[layer], sizes[layer + 1]), legend)
    if sizes[-1] != v.shape[3]:
        raise ValueError(f"{OP}: weights of the last layer must end in V = {v.shape[3]}, got {sizes[-1]}")


def _require_state(
    state: NeuralMemoryState, q: Tensor, v: Tensor, momentum: Tensor | None, sequences: int, chunk: int
) -> None:
    """Raise unless the state is one of this memory's."""
    lead = (sequences, q.shape[2])
    for group in (state.weights, state.start):
        _require_layers(group, q, v, lead, "[sequences, H, in, out]")
    if bool(state.momentum) != (momentum is not None):
        raise ValueError(f"{OP}: initial_state and call must both have momentum or neither")
    if len(state.position) != sequences:
        raise ValueError(f"{OP}: initial_state must hold {sequences} positions, got {len(state.position)}")
    if not all(0 <= p < chunk for p in state.position):
        raise ValueError(f"{OP}: initial_state must stand within a chunk of {chunk}, got positions {state.position}")


@explained_by(_plan)
def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    momentum: Tensor | None = None,
    *,
    chunk: int,
    weights: Sequence[Tensor] | None = None,
    activation: str = "gelu",
    loss: str = "l2",
    threshold: float | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    initial_state: NeuralMemoryState | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, NeuralMemoryState]:
    """Test-time memorisation: W_t = exp(g_t) W_{t-1} + P_t, P_t = exp(m_t) P_{t-1} - beta_t grad loss_t.

    The output is o_t = M(q_t; W_t). The gradient of loss_t = loss(M(k_t; W), v_t) is taken at the weights W of the
    chunk's start. So `chunk` is part of the model: another chunk is another function, no backend or tuner chooses it.

    Args:
        q: queries [B, T, H, K]; k: keys, same shape.
        v: values [B, T, H, V], what the memory should answer to the keys.
        beta: step size [B, T, H], at least 0.
        g: log retention log(1 - alpha) [B, T, H], finite and at most 0, or None for none lost.
        momentum: log decay of the momentum P (log eta) [B, T, H], finite and at most 0, or None: P_t is the step alone.
        chunk: tokens whose gradients are taken at the same weights, any number from 1.
        weights: the memory before the first token, one matrix per layer [H, in, out], from K to V; learned. None is one
            layer of zeros. Not read when `initial_state` is given.
        activation: between layers, "gelu" or "silu".
        loss: "l2" (|e|^2 / 2), "huber" (linear beyond `threshold`) or "lp" (sum |e|^p / p with p = `threshold`).
        threshold: of the loss; None takes 1 for "huber" and 3 for "lp".
        norm: (gamma, bias), each [H, V]: M(x) = x + LayerNorm(f(x)), as in TTT; needs K == V. Not trained inside.
        initial_state: as returned. The unfinished chunk is part of it, so cutting a sequence anywhere changes nothing.
        cu_seqlens: offsets [S + 1] of sequences packed into one row (B == 1); empty sequences are allowed. Read on the
            host.
        checkpoint: keep one state per piece (64 tokens or a chunk) for the backward and compute the rest again; "numba"
            always keeps states and products of pieces, of at most 32 tokens.
        backend: "auto", "reference", "chunked", "numba" (compiled once for all sizes, in a minute; the automatic one on
            a CPU from 2^24 multiplications a call) or "triton" (one layer with l2, without momentum and norm, is
            composed of the chunk kernels of gated linear attention).

    Returns:
        o: outputs [B, T, H, V] in the dtype of `v`.
        final_state: weights, momentum and chunk start per sequence [S, H, in, out], float32 (float64 for float64
            inputs), and the position in the chunk.

    Raises:
        ValueError: shapes, kinds or devices disagree, or the backend asked for cannot run.

    Cost: per token about three passes through the memory and 4C more products of its width; T / chunk steps in a row,
        on a card of 48 launches (96 in the backward) for two layers with momentum on Triton. Chunked, only the keys
        take steps in a row, from chunk to chunk. Compiled, all pieces do, and nothing else is paid for but products.
    Source: TTT, Titans; losses of Miras. Differences: no biases inside (append a constant to k and q); retention is the
        decay only. Chunked, autograd goes through the inner gradient, second derivatives exist, and
        torch.compile traces the loop over chunks, one copy per piece, so compile time grows with T / chunk; with packed
        sequences it stops at the offsets (no fullgraph). Backends "numba" and "triton" have first derivatives only, by
        hand in their loops and kernels.

    Example:
        >>> q = k = v = torch.ones(1, 4, 1, 1)
        >>> o, state = neural_memory(q, k, v, torch.full((1, 4, 1), 0.5), chunk=2)
        >>> o.flatten().tolist(), state.position
        ([0.5, 1.0, 1.0, 1.0], (0,))
    """
    decision = _plan(
        q,
        k,
        v,
        beta,
        g,
        momentum,
        chunk=chunk,
        weights=weights,
        activation=activation,
        loss=loss,
        threshold=threshold,
        norm=norm,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        checkpoint=checkpoint,
        backend=backend,
    )
    dtype = state_dtype(v.dtype)
    tokens = flat_tokens(q, k, v, beta, g, momentum)
    spans = spans_of(q, cu_seqlens)
    if initial_state is None:
        initial_state = fresh_state(weights, q, v, momentum is not None, len(spans))
    rows = [Row(begin, end - begin, p) for (begin, end), p in zip(spans, initial_state.position, strict=True)]
    model = model_of(activation, loss, threshold, norm, dtype)
    out, final = dispatch(decision.backend, tokens, rows, _cast(initial_state, dtype), chunk, model, checkpoint)
    return out.view(v.shape).to(v.dtype), final


def flat_tokens(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> list[Tensor | None]:
    """[B, T, H, X] to [N, H, X] in the arithmetic dtype."""
    dtype = state_dtype(v.dtype)
    wide = [q, k, v, *(None if x is None else x[..., None] for x in gates)]
    return [None if x is None else x.to(dtype).flatten(0, 1) for x in wide]


def spans_of(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """First and last flat token of every sequence."""
    if cu_seqlens is not None:
        return list(pairwise(cu_seqlens.tolist()))
    return [(b * q.shape[1], (b + 1) * q.shape[1]) for b in range(q.shape[0])]


def fresh_state(
    weights: Sequence[Tensor] | None, q: Tensor, v: Tensor, with_momentum: bool, sequences: int
) -> NeuralMemoryState:
    """Every sequence at the learned start."""
    dtype = state_dtype(v.dtype)
    if weights is None:
        weights = [v.new_zeros(q.shape[2], q.shape[3], v.shape[3], dtype=dtype)]
    start = tuple(w.to(dtype).expand(sequences, *w.shape) for w in weights)
    return NeuralMemoryState(
        start, tuple(torch.zeros_like(w) for w in start) if with_momentum else (), start, (0,) * sequences
    )


def model_of(
    activation: str, loss: str, threshold: float | None, norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Model:
    """The memory's fixed part, its defaults filled in."""
    if threshold is None:
        threshold = 3.0 if loss == "lp" else 1.0
    return Model(activation, loss, threshold, None if norm is None else (norm[0].to(dtype), norm[1].to(dtype)))


def _cast(state: NeuralMemoryState, dtype: torch.dtype) -> NeuralMemoryState:
    groups = [tuple(x.to(dtype) for x in group) for group in state[:3]]
    return NeuralMemoryState(groups[0], groups[1], groups[2], tuple(state.position))


@without_autocast
def dispatch(
    backend: str,
    tokens: Sequence[Tensor | None],
    rows: Sequence[Row],
    state: NeuralMemoryState,
    chunk: int,
    model: Model,
    checkpoint: bool,
) -> tuple[Tensor, NeuralMemoryState]:
    """Run flat tokens on a decided backend."""
    if backend == "reference":
        return neural_memory_reference(tokens, rows, state, chunk, model)
    if backend == "chunked":
        advance, whole = partial(chunked.advance, model=model), partial(walk.walk, model=model)
        return schedule.run(advance, tokens, rows, state, chunk, chunked.PIECE, checkpoint, whole)
    if backend == "numba":
        from kernels.neural_memory import numba

        return numba.run(tokens, rows, state, chunk, model)
    from kernels.neural_memory import triton

    is_plain = len(state.weights) == 1 and not state.momentum and model.norm is None and model.loss == "l2"
    kernels, most = triton.engine(model, is_plain)
    return schedule.run(kernels, tokens, rows, state, chunk, most, checkpoint)


# on top of the op, and importing it
from kernels.neural_memory.tnt import TNTState, tnt_memory  # noqa: E402

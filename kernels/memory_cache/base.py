"""The memory below: gated linear attention, or the delta rule where there is a step size."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kernels.common.checks import matrix_state_plan
from kernels.common.dispatch import Decision, explain
from kernels.delta_rule import delta_rule
from kernels.gated_linear_attention import gated_linear_attention


def base_plan(
    op: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    chunk: int | None,
    backend: str,
) -> Decision:
    """Check the tokens under the name of the op on top, and decide as the op below would."""
    assert k is not None
    assert v is not None
    matrix_state_plan(op, q, k, v, beta, g, None, None)
    rest: dict[str, Any] = {"g": g, "chunk": chunk, "backend": backend}
    if beta is None:
        found = explain(gated_linear_attention, q, k, v, **rest)
    else:
        found = explain(delta_rule, q, k, v, beta, **rest)
    return replace(found, op=op, reason=f"{found.reason} (runs {found.op})")


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    how: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    how = {**how, "initial_state": state, "cu_seqlens": cu_seqlens}
    found: tuple[Tensor, Tensor]
    if beta is None:
        found = gated_linear_attention(q, k, v, g, **how)
    else:
        found = delta_rule(q, k, v, beta, g, **how)
    return found


def base_call(decision: Decision, scale: float) -> Any:
    """The op below as (q, k, v, beta, g, state, cu_seqlens=None) -> output, state, on the decided backend."""
    chunk = decision.chunk or None
    return partial(_run, how={"scale": scale, "chunk": chunk, "backend": decision.backend})

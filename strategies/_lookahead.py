"""What an optimizer would make of parameters with the gradients they have now, without doing it.

    stepped(theta) = theta after optimizer.step()

Derived again for each kind of optimizer, so that its state stays as it is: nothing is copied but the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cl.core import UserError

Rule = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]
"""(parameter, its gradient, state of the parameter, options of its group) -> the parameter after the step."""


def require_planned(optimizer: Optimizer, asker: str) -> None:
    """Raise `UserError` unless the updates of the optimizer can be foreseen.

    Args:
        asker: who needs them, such as "hypernet.lookahead".
    """
    if type(optimizer) not in RULES:
        names = ", ".join(kind.__name__ for kind in RULES)
        raise UserError(
            f"{asker} foresees the updates of {names}, and the optimizer is {type(optimizer).__name__}; choose one of "
            f"these, or {asker}=false"
        )


@torch.no_grad()
def stepped(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What `optimizer.step()` would make of each parameter; as it is where one has no gradient.

    Cost: one element-wise pass over parameters and their state; the memory of one more gradient.
    Source: the update rules of torch.optim, which von Oswald et al., 2020 re-derive for the same purpose.
    Differences: their code drops weight decay from the planned step of Adam; here it counts.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rule = RULES[type(optimizer)]
    found = []
    for p in parameters:
        group = groups.get(id(p))
        if p.grad is None or group is None:
            found.append(p.detach().clone())
            continue
        gradient = -p.grad if group.get("maximize") else p.grad
        found.append(rule(p.detach(), gradient, optimizer.state.get(p, {}), group))
    return found


def _sgd(p: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    direction = gradient.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else gradient
    if group["momentum"]:
        old = state.get("momentum_buffer")
        velocity = direction if old is None else group["momentum"] * old + (1 - group["dampening"]) * direction
        direction = direction + group["momentum"] * velocity if group["nesterov"] else velocity
    return p.sub(direction, alpha=group["lr"])


def _adam(p: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Decoupled weight decay shrinks the parameter; the other kind is part of the gradient."""
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    is_decoupled = group.get("decoupled_weight_decay", False)
    if decay and not is_decoupled:
        gradient = gradient.add(p, alpha=decay)
    step = float(state["step"]) + 1 if state else 1.0
    if state:
        mean = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        square = (beta2 * state["exp_avg_sq"]).addcmul_(gradient, gradient, value=1 - beta2)
        if group["amsgrad"]:
            square = torch.maximum(square, state["max_exp_avg_sq"])
    else:
        mean, square = (1 - beta1) * gradient, gradient.square().mul_(1 - beta2)
    # the correction of the square is moved to the rate and to eps: a pass over memory less
    root = math.sqrt(1 - beta2**step)
    spread = square.sqrt_().add_(group["eps"] * root)
    start = p.mul(1 - lr * decay) if decay and is_decoupled else p
    # into memory that is at hand
    return torch.addcdiv(start, mean, spread, value=-lr * root / (1 - beta1**step), out=spread)


def _rmsprop(p: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    alpha = group["alpha"]
    if group["weight_decay"]:
        gradient = gradient.add(p, alpha=group["weight_decay"])
    square = (1 - alpha) * gradient.square()
    mean = (1 - alpha) * gradient
    if state:
        square = square.add(state["square_avg"], alpha=alpha)
        mean = mean.add(state["grad_avg"], alpha=alpha) if group["centered"] else mean
    spread = square - mean.square() if group["centered"] else square
    direction = gradient / (spread.sqrt() + group["eps"])
    if group["momentum"] and state:
        direction = direction + group["momentum"] * state["momentum_buffer"]
    return p.sub(direction, alpha=group["lr"])


RULES: dict[type[Optimizer], Rule] = {SGD: _sgd, Adam: _adam, AdamW: _adam, RMSprop: _rmsprop}

"""A backbone whose weights are generated: where they lie, what they start like, and who answers which row.

    theta_c = offset + scale * h(e_c; theta)        one vector of n numbers for each condition c
    output  = backbone(x; theta_c)                  through torch.func.functional_call, so for any backbone

A condition is a task where rows have a task label, and a domain elsewhere. Training rows are answered by the weights of
their own condition. At evaluation rows without a task label are answered by the condition whose prediction has the
least entropy, of those seen in training.

Batch norm: weights and biases are generated, running statistics are kept apart for each condition. Those of a condition
that the stream does not show now stand still and serve its replayed rows, as at evaluation: there are too few of these
in a batch to be normalised over, or a single one. Other buffers are shared, among them memory that a backbone commits
after a step, which it does with the weights of the batch's condition. Parameters that the backbone had frozen are not
generated. Generated weights are there for one call only, so a backbone does not compute anything again in the backward
pass (`is_checkpointed` and `is_replayed` are switched off).

Shape legend: B rows, C outputs of one head, E width of an embedding, F width of the last hidden layer, N numbers of a
generated network, T conditions asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from cl.backbones import MultiHead
from cl.core import Batch, Output, StreamInfo, UserError
from strategies._hypernet_layout import Layout
from strategies._modules import compute_once

MakeGenerator = Callable[[int], nn.Module]
"""Number of numbers -> module: embeddings (T, E) and the conditions they belong to -> (T, N)."""


class Hypernetwork(nn.Module):
    """A backbone without parameters of its own, and the generator of its weights.

    Args:
        conditions: condition of each experience.
        num_conditions: embeddings to keep.
        embedding: width of an embedding.
        make: builds the generator.
        one_head: generate one head, which stands for all heads of the backbone: every condition has its own anyway.
        keeps_scale: start at the scale of the backbone's own initial weights; else generated numbers are the weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        info: StreamInfo,
        conditions: Sequence[int],
        num_conditions: int,
        embedding: int,
        make: MakeGenerator,
        one_head: bool,
        keeps_scale: bool,
    ) -> None:
        super().__init__()
        drawn = {name: p for name, p in backbone.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.layout = Layout.of(backbone, drawn, heads_of(backbone) if one_head else {}, keeps_scale)
        dtype = next(iter(drawn.values())).dtype
        self.generator = make(len(self.layout)).to(dtype)
        self.embeddings = nn.ParameterList(torch.randn(embedding, dtype=dtype) for _ in range(num_conditions))
        if keeps_scale:
            calibrate(self.generator, self.points([0]).detach())
        self.backbone = emptied(backbone, drawn)
        compute_once(backbone)
        if getattr(backbone, "commits", False):
            backbone.commit = self._commit
        self._keep_statistics(num_conditions)
        self.register_buffer("seen", torch.zeros(num_conditions, dtype=torch.bool))
        self.register_buffer("table", torch.tensor(conditions), persistent=False)
        self.shown: list[int] = []
        """Conditions of the stream's own rows in the running batch."""
        self.seen: Tensor
        self.table: Tensor

    def _keep_statistics(self, num_conditions: int) -> None:
        """One copy of batch norm's running statistics for each condition, beside those of the backbone."""
        self.statistics: dict[str, str] = {}
        for path, module in self.backbone.named_modules():
            for key, buffer in module.named_buffers(recurse=False) if isinstance(module, _NormBase) else ():
                name = f"statistics_{len(self.statistics)}"
                self.statistics[f"{path}.{key}" if path else key] = name
                self.register_buffer(name, torch.stack([buffer] * num_conditions))

    # weights

    def generated(self, conditions: Sequence[int]) -> Tensor:
        """(T, N) what the generator says of some conditions; in full precision, as parameters are."""
        points_TE = self.points(conditions)
        with torch.autocast(points_TE.device.type, enabled=False):
            numbers_TN: Tensor = self.generator(points_TE, conditions)
        return numbers_TN

    def points(self, conditions: Sequence[int]) -> Tensor:
        """(T, E) what the generator is given for some conditions."""
        return torch.stack([self.embeddings[c] for c in conditions])

    def call(self, numbers_N: Tensor, batch: Batch, condition: int | None) -> Output:
        """The backbone with the weights of a vector and the running statistics of a condition.

        Args:
            condition: None takes the mean statistics of all seen conditions.
        """
        values = self.layout.weights(numbers_N) | self.statistics_of(condition)
        is_left = condition is not None and bool(self.shown) and condition not in self.shown
        with _fresh_recurrent(self.backbone), _standing(self.statistics_modules() if is_left else ()):
            output: Output = functional_call(self.backbone, values, (batch,))
        return output

    def statistics_modules(self) -> list[nn.Module]:
        """Layers with running statistics."""
        return [module for module in self.backbone.modules() if isinstance(module, _NormBase)]

    @torch.no_grad()
    def _commit(self, batch: Batch, output: Output) -> None:
        """The backbone's own `commit`, with the weights that are generated for the batch."""
        conditions = self.conditions_of(batch).unique().tolist()
        if len(conditions) > 1:
            raise UserError(
                f"backbone {type(self.backbone).__name__} keeps memory that outlives a batch, which a hypernetwork can "
                "write for rows of one experience only; leave out strategies that add rows of others"
            )
        values = self.layout.weights(self.generated(conditions)[0]) | self.statistics_of(conditions[0])
        named = {f"backbone.{name}": value for name, value in values.items()}
        functional_call(_Committing(self.backbone), named, (batch, output))

    def statistics_of(self, condition: int | None) -> dict[str, Tensor]:
        """Name -> running statistics of batch norm."""
        every = {name: getattr(self, kept) for name, kept in self.statistics.items()}
        if condition is not None:
            return {name: kept[condition] for name, kept in every.items()}
        seen = self.seen_conditions() or [0]
        return {name: kept[seen].double().mean(0).to(kept.dtype) for name, kept in every.items()}

    def materialised(self, condition: int | None, numbers_N: Tensor | None = None) -> nn.Module:
        """A plain copy of the backbone with the weights of a condition (or those given) as its own parameters."""
        if numbers_N is None:
            assert condition is not None
            numbers_N = self.generated([condition])[0]
        plain = deepcopy(self.backbone)
        made: dict[int, nn.Parameter] = {}
        for name, value in self.layout.weights(numbers_N.detach()).items():
            path, _, key = name.rpartition(".")
            made.setdefault(id(value), nn.Parameter(value.clone()))
            plain.get_submodule(path)._parameters[key] = made[id(value)]
        buffers = dict(plain.named_buffers())
        for name, value in self.statistics_of(condition).items():
            buffers[name].copy_(value)
        for module in plain.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        return plain

    # answers

    def conditions_of(self, batch: Batch) -> Tensor:
        """(B,) condition that each training row belongs to.

        Raises:
            UserError: made rows, which belong to no experience, without a task label.
        """
        if batch.task_id is not None:
            return batch.task_id
        if (batch.experience_id < 0).any():
            raise UserError("a hypernetwork has no weights for rows of no experience; leave out who makes them")
        return self.table[batch.experience_id]

    def mark(self, batch: Batch) -> None:
        """The conditions of these rows are trained now."""
        self.seen[self.conditions_of(batch)] = True
        self.shown = self.conditions_of(batch.current()).unique().tolist()

    def seen_conditions(self) -> list[int]:
        found: list[int] = self.seen.nonzero().squeeze(1).tolist()
        return found

    def forward(self, batch: Batch) -> Output:
        """Answer training rows, and rows with a task label, by their own condition; infer it for others."""
        if batch.task_id is None and not self.training:
            return self.inferred(batch)
        return self.by_condition(batch, self.conditions_of(batch))

    def by_condition(self, batch: Batch, condition_B: Tensor) -> Output:
        conditions = condition_B.unique().tolist()
        numbers_TN = self.generated(conditions)
        if len(conditions) == 1:
            return self.call(numbers_TN[0], batch, conditions[0])
        rows = [(condition_B == c).nonzero().squeeze(1) for c in conditions]
        outputs = [self.call(n, batch[r], c) for n, r, c in zip(numbers_TN, rows, conditions, strict=True)]
        back = torch.cat(rows).argsort()
        hidden = [output.hidden for output in outputs if output.hidden is not None]
        states = [output.state for output in outputs if output.state is not None]
        joined = Output(
            torch.cat([output.logits for output in outputs])[back],
            torch.cat(hidden)[back] if len(hidden) == len(outputs) else None,
            # in pieces, which `_commit` refuses in words
            states or None,
        )
        for name in outputs[0].auxiliary:
            shares = [len(r) / len(batch) * output.auxiliary[name] for r, output in zip(rows, outputs, strict=True)]
            joined.auxiliary[name] = torch.stack(shares).sum()
        return joined

    def inferred(self, batch: Batch) -> Output:
        """For each row the answer of the seen condition whose prediction has the least entropy."""
        conditions = self.seen_conditions() or [0]
        best: Output | None = None
        least_B = torch.empty(0)
        for numbers_N, c in zip(self.generated(conditions), conditions, strict=True):
            output = self.call(numbers_N, batch, c)
            entropy_B = entropy(output.logits)
            if best is None:
                best, least_B = output, entropy_B
                continue
            is_less_B = entropy_B < least_B
            least_B = torch.where(is_less_B, entropy_B, least_B)
            pairs = ((output.logits, best.logits), (output.hidden, best.hidden))
            best = Output(*(None if new is None else torch.where(is_less_B[:, None], new, old) for new, old in pairs))
        assert best is not None
        return best

    # size

    @property
    def num_generator(self) -> int:
        """Numbers that are learnt: the generator's in use, and the embeddings."""
        active = getattr(self.generator, "num_active", None)
        own = sum(p.numel() for p in self.generator.parameters()) if active is None else active
        return own + sum(e.numel() for name, e in self.named_parameters() if not name.startswith("generator."))

    @property
    def compression(self) -> float:
        """Learnt numbers over those of one generated network; below 1 the generator is the smaller one."""
        return self.num_generator / len(self.layout)


class _Committing(nn.Module):
    """A module whose call is the `commit` of a backbone's class."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch, output: Output) -> None:
        type(self.backbone).commit(self.backbone, batch, output)


def entropy(logits_BC: Tensor) -> Tensor:
    """(B,) entropy of each prediction in nats.

    Example:
        >>> [round(h, 3) for h in entropy(torch.tensor([[0.0, 0.0], [50.0, 0.0]])).tolist()]
        [0.693, 0.0]
    """
    log_p_BC = logits_BC.float().log_softmax(-1)
    return -(log_p_BC.exp() * log_p_BC).sum(-1)


def heads_of(backbone: nn.Module) -> dict[str, list[str]]:
    """Prefix of the first head of every `MultiHead` -> prefixes of its other heads."""
    found = {}
    for path, module in backbone.named_modules():
        if isinstance(module, MultiHead) and len(module.heads) > 1:
            prefix = f"{path}." if path else ""
            found[f"{prefix}heads.0."] = [f"{prefix}heads.{k}." for k in range(1, len(module.heads))]
    return found


@torch.no_grad()
def calibrate(generator: nn.Module, points_TE: Tensor) -> None:
    """Scale the last layer so that the numbers generated from some embeddings have variance 1."""
    generator.last.weight.div_(generator(points_TE).std())


def emptied(backbone: nn.Module, names: Iterable[str]) -> nn.Module:
    """The backbone, with None in the place of some parameters."""
    for name in names:
        path, _, key = name.rpartition(".")
        backbone.get_submodule(path)._parameters[key] = None
    for module in backbone.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [None] * len(module._flat_weights_names)
    return backbone


@contextmanager
def _fresh_recurrent(backbone: nn.Module) -> Iterator[None]:
    """Torch's recurrent layers keep lists of their weights beside the parameters: take new ones, and drop them after.

    cuDNN wants them in one block, into which it would move generated weights behind autograd's back; it is left out.
    """
    layers = [m for m in backbone.modules() if isinstance(m, nn.RNNBase)]
    if not layers:
        yield
        return
    for layer in layers:
        # a reference to nothing reads as a weight that has changed
        layer._flat_weight_refs = [_nothing] * len(layer._flat_weights_names)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        for layer in layers:
            layer._flat_weights = [None] * len(layer._flat_weights_names)


@contextmanager
def _standing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norm goes by its running statistics, and leaves them."""
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def _nothing() -> None:
    """A dead reference."""

"""A graphics card that is not there: what a machine without one can find out about code that shall run on one.

    with pretended_card():
        model.to(CARD), inputs.to(CARD)

Tensors on `CARD` say `cuda:0`, keep their numbers in the processor's memory, and refuse to meet a tensor that lies on
the processor, with the words of a real card. So a mask, a counter or a random generator that was made on the wrong side
is found without a card, and all numbers are those of the processor: two runs can be compared bit for bit.

Not found: what a card computes otherwise (Triton's kernels, its rounding, its random numbers, autocast, which is off
here), and how fast. Tensors of a class of one's own cannot be on the card (`as_subclass` raises).

Source: the wrapper subclasses of torch (torch/_subclasses/fake_tensor.py is one, without numbers).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CARD = torch.device("cuda", 0)
MOVES = {aten.copy_.default, aten._to_copy.default}
"""Operations that bring numbers from one side to the other."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""A card's tensor may be indexed by one of the processor."""
NOT_LAZY = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
    aten._efficientzerotensor.default: aten.zeros.default,
}
"""Torch resolves these marks before it asks a subclass, so that inside one they would be overlooked."""


class CardTensor(Tensor):
    """Says it is on `CARD`; its numbers are in `on_cpu`. To C++ it is a tensor without numbers (device meta)."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> CardTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device="meta",
        )
        made.on_cpu = on_cpu
        return made  # type: ignore[no-any-return]

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))

    # what C++ would do by itself, with numbers it does not have

    def __getitem__(self, index: Any) -> Tensor:  # type: ignore[override]
        return Tensor.__getitem__(self, _without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _without_lists(index), value)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": CARD, **options})

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.on_cpu.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CardTensor({self.on_cpu!r})"


class _Factories(TorchDispatchMode):
    """Sends `torch.zeros(..., device=CARD)` and its like, which have no tensor among their arguments, to the card."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


@contextmanager
def pretended_card() -> Iterator[None]:
    """Inside, `CARD` can be used; what was put there is of no use outside."""
    as_if_there: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *args: True,
        "synchronize": lambda *args: None,
        "max_memory_allocated": lambda *args: 0,
        "reset_peak_memory_stats": lambda *args: None,
        # random numbers come from the processor's generator
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda *args: None,
        "get_rng_state_all": list,
        "set_rng_state_all": lambda *args: None,
    }
    with ExitStack() as stack:
        for name, value in as_if_there.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.backends.cudnn, "is_acceptable", lambda tensor: False))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device_type="cuda": False))
        # tensors of inference mode cannot have a Python class
        no_inference = lambda mode=True: torch.no_grad() if mode else nullcontext()  # noqa: E731
        stack.enter_context(patch.object(torch, "inference_mode", no_inference))
        check = "_accelerator_graph_capture_health_check"
        stack.enter_context(patch.object(torch.optim.Optimizer, check, lambda self: None, create=True))
        # `torch.tensor(numbers, device=CARD)` fills a tensor of the processor first, then asks for the card's
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(patch.dict(os.environ, {"KERNELS_BACKEND": "chunked"}))
        stack.enter_context(_Factories())
        yield


def _run(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operation on the processor, its results where a card would have them."""
    tensors = list(_tensors((*args, *kwargs.values())))
    target = kwargs.get("device")
    to_card = any(isinstance(x, CardTensor) for x in tensors) if target is None else torch.device(target).type != "cpu"
    body = _body(func, to_card)
    if body is not None:
        with _Factories():
            return body(*args, **kwargs)
    _refuse_mixtures(func, args, kwargs, tensors, to_card)
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    on_cpu = {name: _mapped(_on_cpu, x) for name, x in kwargs.items()}
    result = NOT_LAZY.get(func, func)(*_mapped(_on_cpu, args), **on_cpu)
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], CardTensor):
        # the shape that C++ sees follows
        with no_dispatch():
            func(*args, **kwargs)
        return args[0]
    written = {id(_on_cpu(x)): x for x in tensors}

    def placed(x: Any) -> Any:
        if id(x) in written:
            return written[id(x)]
        return CardTensor(x) if to_card and isinstance(x, Tensor) else x

    return _mapped(placed, result)


@cache
def _body(func: OpOverload, to_card: bool) -> Callable[..., Any] | None:
    """What an operation is made of where that is others, of torch or in Python, so that it is looked into."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    # some have a kernel of their own besides, which rounds otherwise, such as the gradient of silu
    if has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU"):
        return func.decompose
    return OPDEFS[func.name()]._init_fn if to_card and func.name() in OPDEFS else None


def _refuse_mixtures(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor], to_card: bool
) -> None:
    drawn_from = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
    if to_card and any(generator.device.type == "cpu" for generator in drawn_from):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if func in MOVES or not any(isinstance(x, CardTensor) for x in tensors):
        return
    if func in INDEXING and isinstance(args[0], CardTensor):
        tensors = [x for x in args if isinstance(x, Tensor)]
    writes_to_cpu = func._schema.is_mutable and not isinstance(tensors[0], CardTensor)
    # a single number of the processor may meet a card's tensor, never the other way round
    if writes_to_cpu or any(x.dim() > 0 and not isinstance(x, CardTensor) for x in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


# what operations are given and give lies in lists and tuples; the trees of torch, which may hold anything, take as long
# as all the rest


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from _tensors(each)


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)([_mapped(function, each) for each in x])
    return function(x)


def _on_cpu(x: Any) -> Any:
    return x.on_cpu if isinstance(x, CardTensor) else x


def _without_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index

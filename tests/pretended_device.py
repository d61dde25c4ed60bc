"""A device that is only pretended: where no GPU is, what forgets to move a tensor fails all the same.

Tensors on it are tensors of the processor behind a wrapper that says `lazy`. As on a GPU, one of them and one of the
processor do not meet in an operation, save as a number or as an index, and none becomes a NumPy array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy")
aten = torch.ops.aten
MOVING = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class Elsewhere(Tensor):
    """A tensor on the device; `own` is on the processor."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> Elsewhere:
        shape = {"strides": own.stride(), "storage_offset": own.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, own.size(), dtype=own.dtype, device=DEVICE, **shape)
        made.own = own
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Tensors that are made for the device are made for the processor and wrapped."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Moved(TorchFunctionMode):
    """What no dispatch sees: `torch.tensor` for the device, lists as indices, numbers that are assigned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return func(*args, **kwargs).to(device)
        if func is Tensor.tolist:
            return func(behind(args[0]))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            where = tuple(Elsewhere(torch.tensor(i)) if isinstance(i, list) else i for i in where)
            numbers = [Elsewhere(torch.tensor(v, dtype=args[0].dtype)) for v in args[2:] if not isinstance(v, Tensor)]
            args = (args[0], where, *(numbers or args[2:]))
        return func(*args, **kwargs)


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what is behind the wrappers, its results wrapped where they are on the device."""
    given = list(tensors((args, kwargs)))
    there = [tensor for tensor in given if isinstance(tensor, Elsewhere)]
    if func in INDEXED and isinstance(args[0], Elsewhere):  # by indices from anywhere
        given = list(tensors(args[2:]))
    here = [tensor for tensor in given if not isinstance(tensor, Elsewhere) and tensor.dim()]
    if there and here and func not in MOVING:
        raise RuntimeError(f"{func}: tensors on two devices")
    device = kwargs.get("device")
    if device is not None:
        kwargs = kwargs | {"device": "cpu"}
    result = func(*behind(args), **behind(kwargs))
    first = func._schema.arguments[0] if func._schema.arguments else None
    if first is not None and first.alias_info is not None and first.alias_info.is_write:
        return args[0]
    on_device = bool(there) if device is None else torch.device(device).type == DEVICE.type
    return wrapped(result) if on_device else result


def tensors(within: Any) -> Iterator[Tensor]:
    """All tensors within arguments."""
    if isinstance(within, Tensor):
        yield within
    elif isinstance(within, list | tuple | dict):
        for part in within.values() if isinstance(within, dict) else within:
            yield from tensors(part)


def changed(within: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same arguments with every tensor of a kind changed."""
    if isinstance(within, list | tuple):
        return type(within)([changed(part, kind, change) for part in within])
    if isinstance(within, dict):
        return {name: changed(part, kind, change) for name, part in within.items()}
    return change(within) if isinstance(within, kind) else within


def behind(within: Any) -> Any:
    """What is behind all wrappers within arguments."""
    return changed(within, Elsewhere, lambda tensor: tensor.own)


def wrapped(within: Any) -> Any:
    """Results as tensors on the device."""
    return changed(within, Tensor, Elsewhere)


def derivative_along(function: Callable[..., Any], at: tuple[Tensor, ...], way: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """`torch.func.jvp` by reverse mode twice: forward mode does not know wrappers."""
    with torch.enable_grad():
        at = tuple(tensor.detach().requires_grad_() for tensor in at)
        result = function(*at)
        along = [_along(field, at, way) for field in (result if isinstance(result, tuple) else (result,))]
    return result, tuple(along) if isinstance(result, tuple) else along[0]


def _along(field: Tensor, at: tuple[Tensor, ...], way: tuple[Tensor, ...]) -> Tensor:
    if not field.requires_grad:
        return torch.zeros_like(field)
    weight = torch.zeros_like(field).requires_grad_()
    slopes = torch.autograd.grad(field, at, weight, create_graph=True, materialize_grads=True)
    moved = torch.stack([(slope * step).sum() for slope, step in zip(slopes, way, strict=True)]).sum()
    return torch.autograd.grad(moved, weight)[0] if moved.requires_grad else torch.zeros_like(field)


def one_by_one(function: Callable[..., Any], in_dims: int = 0, out_dims: int = 0) -> Callable[..., Any]:
    """`torch.func.vmap` of a function of one tensor."""

    def mapped(tensor: Tensor) -> Any:
        results = [function(one) for one in tensor.unbind(in_dims)]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(fields, out_dims) for fields in zip(*results, strict=True))
        return torch.stack(results, out_dims)

    return mapped


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Within, a device to move tensors to."""
    with Moved(), Pretended():
        yield DEVICE

"""What a function reaches and may change while it runs, so that it can be put back."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, unwrap_if_dead
from torch._subclasses.fake_tensor import FakeTensor

from counterlens.export.errors import ExportError

CLONES = 1 << 30  # bytes of tensors that are copied; what is larger is only watched
LIBRARIES = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "onnx", "onnxruntime", "triton", "sympy"}
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)  # their own methods, whatever a subclass overrides
LEAVES = (str, bytes, int, float, complex, bool, type(None), range, slice, torch.dtype, torch.device, torch.Size)
ABSENT = object()


def _library(module: Any) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in LIBRARIES


class State:
    """Everything that is found from a function: attributes, containers, globals, closures, classes and tensors.

    Random generators belong to it, those of these CUDA devices too; libraries are left alone. Taking it runs no code of
    the user.
    """

    def __init__(self, *roots: Any, devices: Sequence[int] = ()) -> None:
        self._generators = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._cuda = {i: torch.cuda.get_rng_state(i) for i in devices}
        self._containers: list[tuple[Any, list[Any]]] = []
        self._bindings: list[tuple[Any, str, Any]] = []  # of module dictionaries, classes and closures
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None, int, bool, Tensor | None]] = []
        self._seen: set[int] = set()
        found: list[Tensor] = []
        pending = list(roots)
        while pending:
            item = pending.pop()
            if isinstance(item, LEAVES) or id(item) in self._seen:
                continue
            self._seen.add(id(item))
            if isinstance(item, Tensor):
                item = unwrap_if_dead(item)
                found += [] if is_functorch_wrapped_tensor(item) or item.layout != torch.strided else [item]
                pending += [item.grad] if item.is_leaf and item.grad is not None else []
            pending += self._enter(item)
        left = CLONES
        for tensor in sorted(found, key=_bytes):
            left -= _bytes(tensor)
            clone = tensor.detach().clone() if left >= 0 and tensor.device.type != "meta" else None
            grad = tensor.grad if tensor.is_leaf else None
            row = (tensor, tensor.detach(), clone, _version(tensor), tensor.requires_grad, grad)
            self._tensors.append(row)

    def _enter(self, item: Any) -> list[Any]:
        """Note what may change of one object, and return what it leads to."""
        if isinstance(item, FunctionType):
            return [] if _library(item.__module__) else self._function(item)
        if isinstance(item, MethodType):
            return [item.__self__, item.__func__]
        if isinstance(item, functools.partial):
            return [item.func, *item.args, *item.keywords.values()]
        if isinstance(item, (staticmethod, classmethod, functools._lru_cache_wrapper)):
            return [item.__wrapped__]
        if isinstance(item, property):
            return [item.fget]
        if isinstance(item, type):
            return [] if _library(item.__module__) else self._class(item)
        if isinstance(item, (ModuleType, BuiltinFunctionType)):
            return []
        return self._instance(item)

    def _function(self, function: FunctionType) -> list[Any]:
        more: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            more.append(self._bind(cell, "cell_contents"))
        names = set(_names(function.__code__))
        for name in names:
            value = self._bind(function.__globals__, name)
            more.append(value)
            if isinstance(value, ModuleType) and not _library(value.__name__):
                more += [self._bind(vars(value), other) for other in names if other in vars(value)]
        return [*more, *self._instance(function)]

    def _class(self, cls: type) -> list[Any]:
        return [self._bind(cls, name) for name in list(vars(cls)) if not name.startswith("__") or name == "__call__"]

    def _bind(self, place: Any, name: str) -> Any:
        value = _read(place, name)
        self._bindings.append((place, name, value))
        return value

    def _instance(self, item: Any) -> list[Any]:
        more: list[Any] = []
        if isinstance(item, CONTAINERS):
            content = _content(item)
            self._containers.append((item, content))
            more += (v for _, v in content) if isinstance(item, dict) else content
        elif isinstance(item, (tuple, frozenset)):
            more += item
        # functions, modules and objects of the user's; what a library keeps in its own objects is the library's affair
        own = isinstance(item, (nn.Module, Tensor, FunctionType)) or not _library(type(item).__module__)
        if own and type(item).__dictoffset__:
            attributes: dict[str, Any] = object.__getattribute__(item, "__dict__")
            self._containers.append((attributes, _content(attributes)))
            more += attributes.values()
            more += type(item).__mro__
        return more

    def changed(self) -> set[int]:
        """The tensors that hold other values now, by `id`."""
        return {id(t) for t, alias, clone, *_ in self._tensors if clone is not None and not _equal(alias, clone)}

    def restore(self) -> None:
        """Put everything back.

        Raises:
            ExportError: a tensor was changed that is too large to have been copied.
        """
        for place, name, value in self._bindings:
            if _read(place, name) is not value:
                _write(place, name, value)
        for container, before in self._containers:
            if not _same(container, before):
                _refill(container, before)
        for i, (tensor, alias, clone, version, requires_grad, grad) in enumerate(self._tensors):
            if _moved(tensor, alias):
                tensor.data = alias
            if clone is not None:
                if not _equal(alias, clone):
                    alias.copy_(clone)
            elif _version(tensor) != version:
                raise ExportError(f"the function changes a tensor {list(tensor.shape)} of its own in place")
            if tensor.is_leaf and tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
            self._tensors[i] = (tensor, alias, clone, _version(tensor), requires_grad, grad)

    def restore_generators(self) -> None:
        """Put the random generators back. Not between two runs: what they draw has to show itself as another value."""
        torch.set_rng_state(self._generators[0])
        random.setstate(self._generators[1])
        np.random.set_state(self._generators[2])
        for device, generator in self._cuda.items():
            torch.cuda.set_rng_state(generator, device)


def _names(code: CodeType) -> Iterator[str]:
    """Global and attribute names in a function and in those that are written inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _read(place: Any, name: str) -> Any:
    if isinstance(place, dict):
        return place.get(name, ABSENT)
    if isinstance(place, CellType):
        try:
            return place.cell_contents
        except ValueError:  # the cell is empty
            return ABSENT
    return vars(place).get(name, ABSENT)


def _write(place: Any, name: str, value: Any) -> None:
    if isinstance(place, dict):
        if value is ABSENT:
            del place[name]
        else:
            place[name] = value
    elif value is ABSENT:
        delattr(place, name)
    else:
        setattr(place, name, value)


def _base(container: Any) -> Any:
    return next(t for t in CONTAINERS if isinstance(container, t))


def _content(container: Any) -> list[Any]:
    base = _base(container)
    return list(base.items(container) if issubclass(base, dict) else base.__iter__(container))


def _same(container: Any, before: list[Any]) -> bool:
    now = _content(container)
    if len(now) != len(before):
        return False
    if isinstance(container, dict):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, before, strict=True))
    return all(a is b for a, b in zip(now, before, strict=True))


def _refill(container: Any, before: list[Any]) -> None:
    base = _base(container)
    base.clear(container)
    if issubclass(base, dict):
        for key, value in before:
            base.__setitem__(container, key, value)
    elif base is set:
        base.update(container, before)
    else:
        base.extend(container, before)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _moved(tensor: Tensor, alias: Tensor) -> bool:
    if tensor.device.type == "meta":
        return False
    return tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.stride() != alias.stride()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


@contextmanager
def preserved(function: Any, devices: list[int], *, traced: bool = True) -> Iterator[State]:
    """The state that a function reaches, put back at the end whatever happens.

    Args:
        function: and what it leads to.
        devices: CUDA devices whose generators are put back too.
        traced: also forget the tensors without values that tracing makes.
    """
    state = State(function, devices=devices)
    try:
        yield state
    finally:
        state.restore_generators()
        state.restore()
        if traced:
            forget_fakes()


def forget_fakes() -> None:
    """Empty every `functools.lru_cache` that holds a tensor without values, which tracing leaves there."""
    for item in gc.get_objects():
        if type(item) is functools._lru_cache_wrapper and _holds_fake(item, depth=4):
            item.cache_clear()


def _holds_fake(item: Any, depth: int) -> bool:
    if isinstance(item, Tensor):
        inner = unwrap_if_dead(item)
        while is_functorch_wrapped_tensor(inner) and not torch._is_functional_tensor(inner):
            inner = get_unwrapped(inner)
        return isinstance(inner, FakeTensor) or torch._is_functional_tensor(inner)
    nested = depth > 0 and type(item) in (functools._lru_cache_wrapper, dict, tuple, list)
    return nested and any(_holds_fake(v, depth - 1) for v in gc.get_referents(item))

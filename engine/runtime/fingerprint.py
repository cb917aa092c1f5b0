"""One hash of everything beside the weights that decides what a model computes: settings, constants, hooks, code.

It is the same in every process (no ids, addresses or paths), and another as soon as something differs that could change
a number; where that cannot be told, it differs, and an artefact is built once more.

Code of torch, diffusers, transformers and the like, and of counterlens (see `spec.code_version`), is said by name and
version; all other code by its bytecode, defaults and closures, with the functions, classes and constants of its own
modules that it names, and so on. Attributes count whatever their type; weights that `weights_digest` has hashed already
are left out, and so is what a library's module keeps for itself (names with an underscore, tensors and containers that
its forward may fill).
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterlens.export.store import tensors_digest

from ..models.backbone import Backbone

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "timm", "numpy", "tokenizers", "safetensors")
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
NAMED = (torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size, np.generic, np.dtype, range, slice)
# What every module has: state that forward does not read while a model is frozen, and what is described by itself.
OF_ALL = {*nn.Module().__dict__, "training", "_is_full_backward_hook"}
# Where a model came from and who saved it, which decide nothing.
ORIGIN = ("name_or_path", "_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version")
IGNORED = (
    "__module__", "__dict__", "__weakref__", "__doc__", "__qualname__", "__firstlineno__", "__annotations__",
    "__slotnames__",  # which the first copy or pickle of an instance leaves with its class
)  # fmt: skip


def fingerprint(*values: Any, hashed: Iterable[nn.Module] = ()) -> str:
    """SHA-256 of what these values are and do.

    Args:
        values: modules, functions, tensors, containers, any object; what they refer to as well.
        hashed: modules whose parameters and buffers are hashed elsewhere and left out here.
    """
    tensors = {id(t) for module in hashed for t in (*module.parameters(), *module.buffers())}
    walk = _Walk(tensors)
    for value in values:
        walk.add(value)
    return walk.digest.hexdigest()


@cache
def _library(name: str) -> str | None:
    """The version of the library that a module of this name is of; None for code that is hashed itself."""
    top = name.partition(".")[0]
    if name.startswith("counterlens.engine.packs."):  # classifiers' code, which `code_version` leaves out
        return None
    if top == "counterlens" or top in sys.stdlib_module_names:
        return ""
    if top not in LIBRARIES:
        return None
    try:
        return version(top)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))


class _Walk:
    """Goes through what a value refers to, in an order that only depends on the value."""

    def __init__(self, tensors: set[int]) -> None:
        self.digest = hashlib.sha256()
        self.tensors = tensors
        self.seen: dict[int, tuple[int, Any]] = {}  # the object is held, so that its id stays its own

    def say(self, *words: object) -> None:
        self.digest.update(("\x1f".join(map(str, words)) + "\x1e").encode(errors="surrogatepass"))

    def add(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.say("enum", type(value).__qualname__, value.name)
        elif isinstance(value, PLAIN):
            self.say(type(value).__name__, repr(value))
        elif isinstance(value, NAMED):
            self.say(type(value).__name__, value)
        elif isinstance(value, PurePath):
            self.say("path")
        elif isinstance(value, type):
            self._kind(value)
        elif isinstance(value, ModuleType):
            self.say("import", value.__name__, _library(value.__name__))
        elif isinstance(value, tuple):  # equal ones may be one object or several
            self._sequence(value)
        elif isinstance(value, Set):
            self.say("set", *sorted(fingerprint(v) for v in value))
        elif id(value) in self.seen:
            self.say("again", self.seen[id(value)][0])
        else:
            self.seen[id(value)] = (len(self.seen), value)
            self._identity(value)

    def _identity(self, value: Any) -> None:
        """A value that others may share, or that leads back to itself."""
        if isinstance(value, Tensor):
            self.say("tensor", "weight" if id(value) in self.tensors else tensors_digest(value.detach()))
        elif isinstance(value, np.ndarray):
            self.say("array", value.dtype, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Mapping):
            self._kind(type(value))
            self._items(value)
        elif isinstance(value, list | deque):
            self._sequence(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, functools.partial):
            self.say("partial")
            for part in (value.func, value.args, value.keywords):
                self.add(part)
        elif isinstance(value, staticmethod | classmethod):
            self.add(value.__func__)
        elif isinstance(value, functools.cached_property):
            self.add(value.func)
        elif isinstance(value, property):
            self.add((value.fget, value.fset))
        else:
            self._object(value)

    def _sequence(self, values: Sequence[Any]) -> None:
        self._kind(type(values))
        self.say(len(values))
        for value in values:
            self.add(value)

    def _items(self, items: Mapping[Any, Any]) -> None:
        kept = [(k, v) for k, v in items.items() if k not in ORIGIN]
        self.say(len(kept))
        for key, item in kept:
            self.add(key)
            self.add(item)

    def _object(self, value: Any) -> None:
        kind = type(value)
        self._kind(kind)
        self.say(*(n for n in (getattr(value, k, None) for k in ("__name__", "__qualname__")) if isinstance(n, str)))
        self.add(inspect.getattr_static(value, "__wrapped__", None))
        if kind.__module__.partition(".")[0] in sys.stdlib_module_names and kind is not SimpleNamespace:
            return  # locks, loggers, random generators: nothing that a model computes with
        if isinstance(value, Backbone):
            return self._attributes(kind, value.fingerprint())
        slots = {name: getattr(value, name) for base in kind.__mro__ for name in _slots(base) if hasattr(value, name)}
        self._attributes(kind, slots | getattr(value, "__dict__", {}))

    def _attributes(self, kind: type, state: Mapping[str, Any]) -> None:
        own = kind.__module__.startswith("counterlens.") or _library(kind.__module__) is None
        for name in sorted(state):
            value = state[name]
            private = name.startswith("_") and name != "_internal_dict"  # where diffusers keeps a config
            filled = issubclass(kind, nn.Module) and isinstance(value, Tensor | list | dict | set)
            if name in ORIGIN or (not own and (private or (filled and name != "_internal_dict"))):
                continue
            self.say(name)
            self.add(value)

    def _module(self, module: nn.Module) -> None:
        kind = type(module)
        self._kind(kind)
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            self.say("source", getattr(module, "code", ""))
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                self.say(name)
                self.add(tensor)
        self._attributes(kind, {k: v for k, v in vars(module).items() if k not in OF_ALL})
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
            for hook in hooks.values():
                if not getattr(hook, "__module__", "").startswith("counterlens."):  # ours come and go
                    self.say("hook")
                    self.add(hook)
        for name, part in module._modules.items():
            self.say("part", name)
            self.add(part)

    def _kind(self, kind: type) -> None:
        known = _library(kind.__module__)
        self.say("class", kind.__module__ if known is not None else "", kind.__qualname__, known)
        if id(kind) in self.seen:
            return self.say("again", self.seen[id(kind)][0])
        self.seen[id(kind)] = (len(self.seen), kind)
        for base in kind.__bases__:  # a parametrized module's class is torch's, its base may be the user's
            self._kind(base)
        if known is None:
            for name in sorted(k for k in vars(kind) if k not in IGNORED and k not in _slots(kind)):
                self.say(name)
                self.add(vars(kind)[name])

    def _function(self, function: FunctionType) -> None:
        known = _library(function.__globals__.get("__name__", ""))  # a decorated one says another's __module__
        if known is not None:
            self.say("function", function.__module__, function.__qualname__, known)
        else:
            self._code(function.__code__)
            self._names(function.__code__, function.__globals__)
        for part in (function.__defaults__, function.__kwdefaults__, _cells(function)):
            self.add(part)
        self.add(function.__dict__.get("__wrapped__"))

    def _code(self, code: CodeType) -> None:
        self.say("code", code.co_code.hex(), code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_flags)
        self.say(code.co_varnames, code.co_freevars, code.co_cellvars)
        for constant in code.co_consts:
            self._code(constant) if isinstance(constant, CodeType) else self.add(constant)

    def _names(self, code: CodeType, known: Mapping[str, Any]) -> None:
        """What the code finds by name in its module."""
        for name in code.co_names:
            if name in known:
                self.say("name", name)
                self.add(known[name])
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._names(constant, known)


def _cells(function: FunctionType) -> list[Any]:
    filled = []
    for cell in function.__closure__ or ():
        try:
            filled.append(cell.cell_contents)
        except ValueError:  # empty: the name is not bound yet
            filled.append(None)
    return filled


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)

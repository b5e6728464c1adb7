# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps torch.compile from tracing what it cannot trace: this library reads addresses.

Dynamo, its front end, steps into every Python function that a compiled function calls, and takes
our addresses, NumPy views and CuPy kernels for computations on tensors. It has a list of folders
that it leaves alone: there a compiled function is interrupted (a "graph break"), and the call runs
as it does outside. `keep_out` puts this library on it, as soon as Dynamo is imported; that may be
never, and is not to be brought about here. Nothing is added to the call itself.
"""

import importlib.abc
import importlib.util
import sys
import types
import warnings

_RULES = "torch._dynamo.trace_rules"  # where the list is
# What it calls has Python functions around compiled code, which cannot be traced either.
_SKIPPED = ("cupy_cache", "cupy", "cupyx", "cupy_backends", "ml_dtypes")


def keep_out(public):
    """Have Dynamo leave this library alone, with `hint` for what is in ``public``."""
    hint(public)
    rules = sys.modules.get(_RULES)
    if rules is None:
        sys.meta_path.insert(0, _Finder())
    else:
        skip(rules)


def hint(public):
    """Under ``fullgraph=True`` Dynamo's error says what to call instead of the functions, those of
    modules, and methods of classes, in ``public``, {name: object}."""
    for function in _functions(public):
        function._torchdynamo_disable = True
        function._torchdynamo_disable_msg = _HINT


_HINT = "it is not traced; for fullgraph=True see cupy_cache.integrations.torch_ops"


def _functions(named):
    """All functions of ``named``, of what its modules offer, and of classes in it."""
    for value in named.values():
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, types.ModuleType):
            yield from _functions({name: getattr(value, name) for name in value.__all__})
        elif isinstance(value, type) and not issubclass(value, BaseException):
            yield from _functions(vars(value))


def skip(rules):
    """Put this library on the list that the module ``rules`` keeps."""
    add = getattr(rules, "add", None)
    if add is None:  # it is not documented
        warnings.warn(_NO_LIST, RuntimeWarning, stacklevel=2)
        return
    for package in _SKIPPED:
        add(package)


_NO_LIST = (
    "torch.compile of this version of torch cannot be told to leave cupy_cache alone: do not call "
    "its functions in what is compiled, but cupy_cache.integrations.torch_ops"
)


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for Dynamo's rules to be imported."""

    def find_spec(self, name, path=None, target=None):
        """Leave all imports to others, but one: that one too, and then add to what it made."""
        del path, target
        if name != _RULES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that calls `skip` on the module that another one loaded."""

    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        skip(module)

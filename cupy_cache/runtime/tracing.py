# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps torch.compile out of this library: it cannot trace code that reads addresses.

Dynamo, its front end, steps into every Python function that a compiled function calls, and would
take our addresses, NumPy views and CuPy kernels for computations on tensors. It keeps a list of
folders that it does not trace: a call into them interrupts the compiled function (a "graph break")
and runs as outside. `keep_out` puts this library on that list when the program imports Dynamo; this
module does not import it. A call itself gets no slower.

Tracers that only note what torch does with tensors, `torch.jit.trace` and `make_fx`, would not see
what is done here, and leave it out: while one is at work, calls on tensors are refused, but under
`make_fx` those that a fast path serves.
"""

import importlib.abc
import importlib.util
import sys
import types
import warnings

from .. import errors

_RULES = "torch._dynamo.trace_rules"  # where the list is
# And the packages that it calls: Python functions around compiled code.
_SKIPPED = ("cupy_cache", "cupy", "cupyx", "cupy_backends", "ml_dtypes")


def keep_out(public):
    """Keep Dynamo out of this library, with a `hint` for the functions in ``public``."""
    hint(public)
    rules = sys.modules.get(_RULES)
    if rules is None:
        sys.meta_path.insert(0, _Finder())
    else:
        skip(rules)


def hint(public):
    """Have Dynamo's error under ``fullgraph=True`` say what to call instead of the functions, those
    of modules, and methods of classes, in ``public``, {name: object}."""
    for function in _functions(public):
        function._torchdynamo_disable = True
        function._torchdynamo_disable_msg = _HINT


_HINT = "it is not traced; for fullgraph=True see cupy_cache.integrations.torch_ops"


def _functions(named):
    """All functions in ``named``, in its modules' ``__all__``, and in its classes."""
    for value in named.values():
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, types.ModuleType):
            yield from _functions({name: getattr(value, name) for name in value.__all__})
        elif isinstance(value, type) and not issubclass(value, BaseException):
            yield from _functions(vars(value))


def tracer():
    """The name of the tracer of torch that notes at this moment what is done with tensors, and so
    sees nothing of what this library does; None where there is none."""
    torch, proxies = sys.modules.get("torch"), sys.modules.get(_PROXIES)
    if getattr(getattr(torch, "jit", None), "is_tracing", bool)():
        return "torch.jit.trace"
    mode = getattr(proxies, "get_proxy_mode", None) or getattr(proxies, _OLDER, None)
    return None if mode is None or mode() is None else "make_fx or torch.export"


def refuse(name):
    """Refuse ``name``, "operation: argument", a tensor of torch, while a tracer is at work."""
    found = tracer()
    if found is not None:
        expected, got = "a tensor that is not traced", f"one that {found} traces"
        raise errors.wrong("memory", name, expected, got, _OUTSIDE)


_OUTSIDE = "call it outside of what is traced, or see cupy_cache.integrations.torch_ops"
_PROXIES, _OLDER = "torch.fx.experimental.proxy_tensor", "get_innermost_proxy_mode"


def skip(rules):
    """Put this library on the list of the module ``rules``."""
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
        """None for all modules but Dynamo's rules. For these, wrap the loader that others find."""
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

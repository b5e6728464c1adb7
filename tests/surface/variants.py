# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Calls that are nearly the same, and what each comes to: so that what is remembered of one could
be taken for another.

A call is what a maker draws from a random generator. Another one is the same draws but for a few
(`Repeated`). Their arrays lie in one arena, one behind the other, with gaps, or over one another.
"""

import inspect

import numpy as np
import worlds

try:
    import torch
except ImportError:
    torch = None

import cupy_cache as cc
from cupy_cache.runtime import arrays, formats

from . import attention, calls
from .arrays import (
    as_list,
    fits_torch,
    mapped,
    numpy_array,
    opaque,
    opaque_numpy,
    pick,
    tensor,
)

ARENA = 1 << 15
WAYS = "aligned", "aligned", "aligned", "close", "close", "element", "byte", "over"
OPTIONAL = (
    "out", "lse", "output_lse", "seq_starts", "idx_mapping", "query_start_loc", "alibi_slopes",
    "sinks", "k_scale", "v_scale", "scale", "kv_scale", "sliding_window", "soft_cap", "key",
    "num_tokens", "enabled", "kv_scales", "block_size",
)  # fmt: skip


class Repeated:
    """A generator that draws what was drawn ``before``, but now and then something else, and from
    there on goes along as far as the same is asked."""

    def __init__(self, rng, before=(), change=0.0):
        self.rng, self._before, self._change, self.draws = rng, before, change, []

    def __getattr__(self, name):
        draw = getattr(self.rng, name)

        def drawn(*args, **options):
            asked, at = (name, str(args), str(options)), len(self.draws)
            value = None
            if at < len(self._before) and self._before[at][0] == asked:
                value = self._before[at][1]
            if value is None or self.rng.random() < self._change:
                value = draw(*args, **options)
            self.draws.append((asked, value))
            return value.copy() if isinstance(value, np.ndarray) else value

        return drawn


class Arena:
    """Memory that the arrays of many calls share."""

    def __init__(self, rng):
        self.buffer = worlds.Buffer(ARENA, rng)

    def place(self, rng, made):
        """Have the arrays of a call lie here, as far as there is room."""
        at, moved = int(pick(rng, 0, 0, 16, 64)), {}
        ways = pick(rng, ("aligned",), ("aligned",), ("close",), WAYS)
        content = []
        specs = {id(spec): spec for name, spec in made.specs() if not name.endswith("_ptrs")}
        specs = {key: spec for key, spec in specs.items() if made.name != "swap_blocks_batch"}
        order = [list(specs.values())[int(at)] for at in rng.permutation(len(specs))]
        if rng.random() < 0.7:  # what is written, side by side
            written = {id(spec) for name, spec in made.specs() if name in made.written}
            order.sort(key=lambda spec: id(spec) not in written)
        for spec in order:
            size = formats.DTYPES[spec.dtype].bytes
            ends = [s * (n - 1) for s, n in zip(spec.strides, spec.shape)] if spec.shape else []
            low = sum(min(end, 0) for end in ends)
            span = sum(abs(end) for end in ends) + size
            if 0 in spec.shape:
                low, span = 0, size
            kind = pick(rng, *ways)
            if kind in ("aligned", "element"):
                at = -(-at // 16) * 16 + (size if kind == "element" else 0)
            elif kind == "close":
                at = -(-at // size) * size
            elif kind == "over":
                at = max(at - int(pick(rng, size, 4 * size, 16, 64)), 0)
            else:
                at += 1
            if at + span > ARENA:
                break
            new = worlds.Spec(self.buffer, at - low, spec.shape, spec.strides, spec.dtype)
            content.append((new, numpy_array(spec).copy()))
            moved[id(spec)] = new
            at += span
        for new, values in content:
            numpy_array(new)[...] = values
        for spec in specs.values():
            if id(spec) in moved:
                made.replace(spec, moved[id(spec)])


def dress(rng, made, forms, wild):
    """Leave out what may be absent, give one array twice, other strides; choose what is given."""
    for name in list(made.args):
        if name in OPTIONAL and rng.random() < 0.08 * wild:
            if inspect.signature(getattr(cc, made.name)).parameters[name].default is None:
                made.args[name] = None
    found = list(made.specs())
    addresses = made.name == "swap_blocks_batch"  # these are believed
    if len(found) > 1 and not addresses and rng.random() < 0.15 * wild:
        (_, one), (_, other) = (found[int(rng.integers(len(found)))] for _ in range(2))
        if one is not other:
            made.replace(one, other)
    if rng.random() < 0.1 * wild:
        _, spec = found[int(rng.integers(len(found)))] if found else (None, None)
        if spec is not None and spec.shape and 0 not in spec.shape:
            at = int(rng.integers(len(spec.shape)))
            if spec.shape[at] == 1:
                strides = list(spec.strides)
                strides[at] = int(pick(rng, 0, 8, 24, 4096, 6))
                new = worlds.Spec(spec.buffer, spec.offset, spec.shape, strides, spec.dtype)
                made.replace(spec, new)
    if found and not addresses and rng.random() < 0.15 * wild:
        _, spec = found[int(rng.integers(len(found)))]
        if len(spec.shape) > 1 and 0 not in spec.shape:
            made.replace(spec, _wider(rng, spec))
    takes_stream = "stream" in inspect.signature(getattr(cc, made.name)).parameters
    if takes_stream and rng.random() < 0.15:
        made.args["stream"] = int(pick(rng, 0, 5, 77))
    lists = {}
    for name, spec in list(made.specs()):
        form = pick(rng, *forms)
        if isinstance(made.args[name], (list, tuple)):
            form = lists.setdefault(name, form)
        if form in (tensor, opaque) and not fits_torch(spec):
            form = numpy_array
        if name in made.choice and rng.random() < 0.3:
            form = as_list
        if form is opaque_numpy and spec.numpy_dtype.kind == "V":
            form = numpy_array
        made.forms[id(spec)] = form


def _wider(rng, spec):
    """The same numbers, a few bytes more from row to row."""
    at = int(rng.integers(len(spec.shape) - 1))
    strides = list(spec.strides)
    strides[at] += int(pick(rng, 1, 2, 4, 8, 16))
    size = sum(abs(s) * n for s, n in zip(strides, spec.shape)) + 16
    new = worlds.Buffer(size, rng).view(spec.shape, spec.dtype, 0, strides)
    numpy_array(new)[...] = numpy_array(spec)
    return new


FAMILIES = {
    "numpy": (numpy_array,), "torch": (tensor,), "dlpack": (opaque,),
    "dlpack of numpy": (opaque_numpy,), "mixed": (numpy_array, tensor, opaque),
}  # fmt: skip


def regular(made):
    """Have single rows lie as more would without gaps. Elsewhere they may lie anyhow, and kernels
    get strides that differ and mean nothing."""
    for _, spec in list(made.specs()):
        if spec.shape[:1] == (1,):
            steps = arrays.regular(spec.shape, spec.strides, formats.DTYPES[spec.dtype].bytes)
            strides = steps[0], *spec.strides[1:]
            new = worlds.Spec(spec.buffer, spec.offset, spec.shape, strides, spec.dtype)
            made.forms[id(new)] = made.forms[id(spec)]
            made.replace(spec, new)


class Trial:
    """One call that can be made again and again, on the same memory with the same content.

    draws : what it was made from.
    """

    def __init__(self, rng, maker, arena, family, before=(), change=0.0, bound=False,
                 for_gpu=False):  # fmt: skip
        rng = Repeated(rng, before, change)
        made = maker(rng)
        dress(rng, made, FAMILIES[family], bool(before))
        if for_gpu:
            regular(made)
        placed = {}
        forms = {id(s): made.forms[id(s)] for _, s in made.specs()}
        old = list(made.specs())
        if rng.random() < 0.7:
            arena.place(rng, made)
        for (_, before_it), (_, spec) in zip(old, made.specs()):
            placed[id(spec)] = forms[id(before_it)]
            if placed[id(spec)] in (tensor, opaque) and not fits_torch(spec):
                placed[id(spec)] = numpy_array
        made.forms, self.made, self.draws, self.bound = placed, made, rng.draws, bound
        self.seed = int(rng.integers(2**32))
        self.name = made.name
        buffers = {id(spec.buffer): spec.buffer for _, spec in made.specs()}
        buffers |= {id(spec.buffer): spec.buffer for spec in getattr(made, "hidden", ())}
        self.content = [(buffer, buffer.bytes.copy()) for buffer in buffers.values()]
        self._kept = None

    def __repr__(self):
        return repr(self.made)

    def all_torch(self):
        """Whether all arrays are torch's, or exports."""
        return all(form in (tensor, opaque, as_list) for form in self.made.forms.values())

    def objects(self, again):
        """The arguments: new objects, or those of the last time."""
        if again and self._kept is not None:
            return dict(self._kept)
        known = {}

        def given(spec):
            if id(spec) not in known:
                known[id(spec)] = self.made.forms.get(id(spec), numpy_array)(spec)
            return known[id(spec)]

        made = {name: mapped(value, given) for name, value in self.made.args.items()}
        self._kept = made
        return dict(made)

    def restore(self):
        """Have all memory be as it was."""
        for buffer, content in self.content:
            buffer.bytes[:] = content

    def run(self, again=False, caches=None):
        """Make the call; what it comes to, to be compared. ``caches``: the `PagedKVCache`\\ s of
        earlier calls, where it goes through one."""
        self.restore()
        objects = self.objects(again)
        try:
            if self.bound:
                result = _through_a_cache(self, objects, caches)
            else:
                result = _called(self, objects)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        try:
            cc.raise_faults()
            faults = ()
        except cc.FaultError as error:
            faults = tuple(map(str, error.faults))
        # Rows that nobody has are as they were made.
        told = _shown(result, whole=not faults and "gather" not in self.name)
        return told, faults, [buffer.bytes.tobytes() for buffer, _ in self.content]


def _shown(result, whole):
    if isinstance(result, str):
        return result
    if result is None or isinstance(result, int):
        return repr(result)
    if isinstance(result, (tuple, list)):
        return str([_shown(one, whole) for one in result])
    if isinstance(result, worlds.Opaque):
        return "an export"
    shape, dtype = tuple(result.shape), str(result.dtype)
    kind = type(result).__name__
    if not whole or kind not in ("ndarray", "Tensor"):
        return f"{kind} {shape} {dtype}"
    if kind == "Tensor":
        flat = torch.empty(result.numel(), dtype=result.dtype).copy_(result.reshape(-1))
        result = flat.view(torch.uint8).numpy()
    return f"{kind} {shape} {dtype} {result.tobytes()!r}"


def _called(trial, objects):
    function, rng = getattr(cc, trial.name), np.random.default_rng(trial.seed)
    names = list(inspect.signature(function).parameters)
    if trial.name == "swap_blocks":
        names = ["src", "dst"]
    args = []
    for name in names[: int(rng.integers(len(names) + 1))]:
        kind = inspect.signature(function).parameters[name].kind
        if name not in objects or kind is inspect.Parameter.KEYWORD_ONLY:
            break
        args.append(objects.pop(name))
    return function(*args, **objects)


# --- through a PagedKVCache -----------------------------------------------------------------------

SCALES = {"k_scale": "k_scales", "v_scale": "v_scales", "scale": "k_scales", "kv_scale": "k_scales"}
METHODS = {
    "reshape_and_cache_flash": "write", "reshape_and_cache": "write",
    "concat_and_cache_mla": "write", "rotary_and_cache": "rotary_write",
    "concat_and_cache_mla_rope_fused": "rotary_write", "paged_attention": "attend",
    "paged_attention_mla": "attend_mla", "copy_blocks": "copy_blocks",
    "copy_blocks_mla": "copy_blocks", "zero_blocks": "zero_blocks", "pack_blocks": "pack_blocks",
    "unpack_blocks": "unpack_blocks", "gather_and_maybe_dequant_cache": "gather",
    "swap_blocks": "swap_blocks",
}  # fmt: skip
RENAMED = {"q_pe": "query", "k_pe": "key", "kv_c": "value"}


def _through_a_cache(trial, given, caches):
    """The call, by a cache that is known, or a new one where ``caches`` is None."""
    name, specs, forms = trial.name, trial.made.args, trial.made.forms
    fixed, told = {}, [name in ("pack_blocks",)]
    if "caches" in given:
        layers = given.pop("caches")
        told.append(_place(specs["caches"], forms))
        if layers and isinstance(layers[0], tuple):
            fixed = dict(zip(("key_caches", "value_caches"), map(list, zip(*layers))))
        else:
            fixed = {"key_caches": layers}
    else:
        names = {
            "key_caches": ("key_cache", "kv_cache", "src_cache", "key_caches", "kv_caches", "src"),
            "value_caches": ("value_cache", "value_caches"),
        }
        for to, of in names.items():
            for one in of:
                if one in given:
                    value = given.pop(one)
                    fixed[to] = value if isinstance(value, (list, tuple)) else [value]
                    told.append((to, _place(specs[one], forms)))
    for of in (*SCALES, "kv_cache_dtype"):
        if of in given:
            fixed[SCALES.get(of, of)] = given.pop(of)
            told.append((of, _place(specs[of], forms)))
    other = None
    if name == "swap_blocks":
        other = given.pop("dst")
        told.append(_place(specs["dst"], forms))
        given.pop("block_size_in_bytes", None)
        if not isinstance(other, (list, tuple)):
            other = [other]
    for unwanted in ("interleaved_v", "skip_scale", "scale_rule", "batch_size", "token_to_seq"):
        given.pop(unwanted, None)
    key = repr(told)
    found = None if caches is None else caches.get(key)
    if found is None:
        found = cc.PagedKVCache(**fixed), other and cc.PagedKVCache(other)
        if caches is not None:
            caches[key] = found
    cache, theirs = found
    method = getattr(cache, METHODS[name])
    stream = {"stream": given.pop("stream")} if "stream" in given else {}
    if name == "swap_blocks":
        return method(theirs, given.pop("block_mapping"), **stream)
    if name in ("copy_blocks", "copy_blocks_mla", "zero_blocks"):
        return method(*given.values(), **stream)
    if name in ("pack_blocks", "unpack_blocks"):
        layout = given.pop("layout")
        return method(*given.values(), layout=layout, **stream)
    if method.__name__ == "write":
        return method(0, *given.values(), **stream)
    if method.__name__ == "gather":
        given["out"] = given.pop("dst")
        return method(0, **given, **stream)
    named = {RENAMED.get(name, name): value for name, value in given.items()}
    return method(0, **named, **stream)


def _place(value, forms):
    """What tells an argument from another."""
    if isinstance(value, worlds.Spec):
        form = forms.get(id(value), numpy_array).__name__
        return id(value.buffer), value.offset, value.shape, value.strides, value.dtype, form
    if isinstance(value, (list, tuple)):
        return [_place(one, forms) for one in value]
    return type(value).__name__, repr(value)


def _rows(rng):
    """A gather of rows, from caches that have no values."""
    return calls.gather(rng, "gather_and_maybe_dequant_cache")


MAKERS = tuple(dict.fromkeys((*calls.ORDINARY, *attention.MAKERS)))
BOUND = (
    calls.flash, calls.flash, calls.x_packed, calls.mla, attention.rotated_and_written,
    attention.rotated_entries, attention.attention, attention.latent, calls.copy, calls.copy_mla,
    calls.zero, _rows, calls.swap,
    *(maker for maker in calls.ORDINARY
      if getattr(maker, "keywords", {}).get("name") in ("pack_blocks", "unpack_blocks")),
)  # fmt: skip


def history(rng, family, maker=None, bound=False, for_gpu=False, size=6):
    """Some calls that are alike, of one operation."""
    makers = BOUND if bound else MAKERS
    maker = makers[int(rng.integers(len(makers)))] if maker is None else maker
    arena, trials = Arena(rng), []
    for _ in range(size):
        before, change = (), 0.0
        if trials:
            before = pick(rng, *trials).draws
            change = pick(rng, 0.01, 0.03, 0.1, 0.3)
        trials.append(Trial(rng, maker, arena, family, before, change, bound, for_gpu))
    return trials

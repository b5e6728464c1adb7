# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The arrays of a model's calls, without memory, as its engine would give them."""

from typing import NamedTuple

from .. import errors
from ..runtime import contract, formats
from ..runtime.descriptions import described

# The element types of indices in engines, by their role. Slots and positions are computed in torch,
# whose integers have 64 bits; tables and numbers of sequences are made on the host.
ENGINES = {
    "slots": ("int64",),
    "positions": ("int64",),
    "tables": ("int32",),
    "bounds": ("int32",),  # of the sequences among the rows
    "starts": ("int32",),  # of the sequences in their tables
    "requests": ("int32",),
    "blocks": ("int64",),  # chosen on the GPU: pairs too
}
# Extents on which no kernel depends: blocks of caches, rows of all other arrays.
BLOCKS, ROWS = 1024, 64
QUANT_BLOCK = 128  # elements of an indexer's key that share a scale, where it divides them


class Rotation(NamedTuple):
    """The items of `warmup`'s ``rotary``, and their defaults; None: every kind, or none."""

    rotary_dim: int | None = None
    rope_dim_offset: int = 0
    cos_sin_dtype: formats.DType | None = None
    is_neox: bool | None = None
    mrope_section: tuple | None = None
    mrope_interleaved: bool = False
    norm_eps: float | None = None
    norm_dtype: formats.DType | None = None
    rounding: str = "once"
    out: bool = False
    out_dtype: str = "auto"


def rotation_of(given):
    """The `Rotation` from `warmup`'s ``rotary``."""
    unknown = [name for name in given if name not in Rotation._fields]
    if unknown:
        expected = f"some of {', '.join(Rotation._fields)}"
        raise errors.wrong("value", "warmup: rotary", expected, errors.shown(unknown[0]))
    given = dict(given)
    for name in ("cos_sin_dtype", "norm_dtype"):
        if given.get(name) is not None:
            given[name] = formats.dtype_named(given[name], f"warmup: rotary[{name}]")
    if given.get("rotary_dim") is not None:
        given["rotary_dim"] = contract.integer(
            "warmup", "rotary[rotary_dim]", given["rotary_dim"], least=1
        )
    return Rotation(**given)


class Model(NamedTuple):
    """The shapes and dtypes of a model's calls. Caches have the element type ``stored``; indices
    have each type that ``index_dtypes`` lists for their role."""

    heads: int
    key_size: int
    value_size: int
    block_size: int
    dtype: formats.DType
    kv_cache_dtype: str
    stored: formats.DType
    layouts: tuple
    index_dtypes: dict
    query_heads: int
    rotation: Rotation
    alibi: bool  # whether attention has slopes
    soft_cap: bool  # and whether its logits are capped

    @property
    def by_token(self):
        """Whether each token and head has a scale in the caches."""
        return self.kv_cache_dtype not in (*formats.CACHE_FORMATS, formats.FP8_DS_MLA)

    def indices(self, role, *shape):
        """Indices of this role, see `ENGINES`, one array of each type."""
        return [described(shape, dtype) for dtype in self.index_dtypes[role]]

    def tokens(self):
        """A step's keys and values."""
        sizes = self.key_size, self.value_size
        return [described((ROWS, self.heads, size), self.dtype) for size in sizes]

    def entries(self, *layers):
        """A step's latent and rope parts of entries."""
        sizes = self.value_size, max(self.key_size - self.value_size, 0)
        return [described((*layers, ROWS, size), self.dtype) for size in sizes]

    def scales(self):
        """Scales of keys and of values: one for all heads, and one for each head."""
        if formats.is_scaled(self.kv_cache_dtype):
            return (1.0, 1.0), [described((self.heads,), formats.FLOAT32) for _ in "kv"]
        return ((None, None),)

    def token_scales(self):
        """Scales of keys and of values for each token and head."""
        return [described((BLOCKS, self.block_size, self.heads), formats.FLOAT32) for _ in "kv"]

    def cache(self, *block):
        """A contiguous cache with blocks of this shape."""
        return described((BLOCKS, *block), self.stored)

    def pairs(self):
        """Key and value cache [NB, BS, H, D] in each of the layouts with these dimensions."""
        sizes = self.key_size, self.value_size
        if "NHD" in self.layouts:
            yield [self.cache(self.block_size, self.heads, size) for size in sizes]
        if "HND" in self.layouts:
            by_head = [self.cache(self.heads, self.block_size, size) for size in sizes]
            yield [cache.permuted(0, 2, 1, 3) for cache in by_head]
        if "packed" in self.layouts:
            yield self.cache(self.block_size, self.heads, sum(sizes)).split(self.key_size)
            by_head = self.cache(self.heads, self.block_size, sum(sizes))
            yield by_head.permuted(0, 2, 1, 3).split(self.key_size)

    def x_packed(self):
        """Key cache [NB, H, D/x, BS, x], and value cache [NB, H, D, BS] or [NB, H, BS/x, D, x],
        and whether it is the latter."""
        x = 16 // self.stored.bytes
        if "x-packed" in self.layouts and self.key_size % x == 0:
            keys = self.cache(self.heads, self.key_size // x, self.block_size, x)
            yield keys, self.cache(self.heads, self.value_size, self.block_size), False
            if self.block_size % x == 0:
                yield keys, self.cache(self.heads, self.block_size // x, self.value_size, x), True

    def rows(self):
        """A cache [NB, BS, E] that keeps one entry for each token."""
        if "rows" in self.layouts:
            size = (
                formats.DS_ENTRY_BYTES
                if self.kv_cache_dtype == formats.FP8_DS_MLA
                else self.key_size
            )
            yield self.cache(self.block_size, size)

    def indexer(self):
        """A cache of quantised keys and their scales, and how many elements share a scale."""
        if "indexer" in self.layouts:
            quant = QUANT_BLOCK if self.key_size % QUANT_BLOCK == 0 else self.key_size
            size = self.key_size + 4 * self.key_size // quant
            yield described((BLOCKS, self.block_size, size), formats.UINT8), quant

    def pages(self):
        """A cache whose blocks hold K|V, as one array."""
        if "packed" in self.layouts:
            yield self.cache(self.block_size, self.heads * (self.key_size + self.value_size))

    def single(self):
        """Caches for layouts with one cache in each layer."""
        yield from (*self.rows(), *self.pages(), *(cache for cache, _ in self.indexer()))

    def layers(self, by_slot=False):
        """A layer's caches in every layout; with ``by_slot``, in those that scatter no slot."""
        yield from self.pairs()
        yield from ([cache] for cache in (*self.rows(), *self.pages()))
        if not by_slot:
            yield from (caches for *caches, _ in self.x_packed())
            yield from ([cache] for cache, _ in self.indexer())

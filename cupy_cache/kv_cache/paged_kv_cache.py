# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The caches of a model's layers as one object, which decides once what depends on them alone."""

from ..errors import ArgumentError, ShapeError
from ..ops import concat_and_cache_mla, reshape_and_cache, reshape_and_cache_flash, swap_blocks
from ..ops.copy_blocks import copier
from ..runtime import contract, dispatch, formats


class PagedKVCache:
    """Paged caches of all layers of a model, for callers to whom a microsecond a call matters.

    The functions of this library read their arguments at every call: of `copy_blocks` for 32 layers
    these are 64 arrays. This object reads the caches once. Its methods mean what the functions of
    the same arguments mean, with the same checks and errors.

    Parameters
    ----------
    key_caches : list of arrays
        One for each layer, all of the same shape, strides, dtype and device:
        [num_blocks, block_size, num_kv_heads, head_size], written by `reshape_and_cache_flash`;
        [num_blocks, num_kv_heads, head_size / x, block_size, x], by `reshape_and_cache`; or, with
        no ``value_caches``, [num_blocks, block_size, entry_size], by `concat_and_cache_mla`.
    value_caches : list of arrays, optional
        Likewise, as many.
    kv_cache_dtype : str
        See the function that writes.
    k_scales, v_scales : float, array, or list of these with one for each layer, optional
        The scales of `reshape_and_cache_flash`, or of `reshape_and_cache`; of
        `concat_and_cache_mla` only ``k_scales``; there ``v_scales`` is refused. A number or an
        array is for all layers.

    Raises
    ------
    ArgumentError
        Or one of its kinds, where the lists or the scales do not fit each other; the writing
        functions' errors come at the first write.

    Notes
    -----
    The arrays are kept alive. Their memory must stay where it is for as long as this object is
    used: the addresses that they had at first are what is written to.
    """

    def __init__(
        self, key_caches, value_caches=None, kv_cache_dtype="auto", k_scales=None, v_scales=None
    ):
        if value_caches is None:
            if v_scales is not None:
                raise ArgumentError(
                    "PagedKVCache: Invalid value of v_scales: expected None, since there are no "
                    f"value caches, got {v_scales!r:.80}"
                )
            self._copier = copier("copy_blocks_mla", {"kv_caches": key_caches})
        else:
            lists = {"key_caches": key_caches, "value_caches": value_caches}
            self._copier = copier("copy_blocks", lists)
        self._copier.check()
        self.key_caches = list(key_caches)
        self.value_caches = None if value_caches is None else list(value_caches)
        k_scales = _for_each_layer("k_scales", k_scales, len(self))
        v_scales = _for_each_layer("v_scales", v_scales, len(self))
        self._writers = [
            self._writer(layer, kv_cache_dtype, k_scales[layer], v_scales[layer])
            for layer in range(len(self))
        ]

    def __len__(self):
        """How many layers there are."""
        return len(self.key_caches)

    def _writer(self, layer, kv_cache_dtype, k_scale, v_scale):
        if self.value_caches is None:
            op, fixed = concat_and_cache_mla.OP, {"kv_cache": self.key_caches[layer]}
            array, number = None, None
            if formats.is_scaled(kv_cache_dtype):
                array, number = contract.split_scale(op.name, "k_scales", k_scale)
            scales = {"scale": array}
            options = kv_cache_dtype, number, concat_and_cache_mla.SCALE_RULES[0]
        else:
            packed = self._copier.dimensions == 5
            op = reshape_and_cache.OP if packed else reshape_and_cache_flash.OP
            fixed = {
                "key_cache": self.key_caches[layer], "value_cache": self.value_caches[layer]
            }  # fmt: skip
            arrays, numbers = contract.split_scales(op.name, kv_cache_dtype, k_scale, v_scale)
            scales = dict(zip(("k_scale", "v_scale"), arrays))
            options = (kv_cache_dtype, *numbers, *((False,) if packed else ()))
        fixed |= {name: array for name, array in scales.items() if array is not None}
        return dispatch.Bound(op, fixed, options)

    def writer(self, layer):
        """`write` for one layer, as a function of the other arguments: the cheapest call."""
        return self._writers[layer]

    def write(self, layer, key, value, slot_mapping, *, stream=None):
        """Write one step's keys and values into a layer's caches.

        Parameters
        ----------
        layer : int
        key, value, slot_mapping, stream
            As for `reshape_and_cache_flash` or `reshape_and_cache`; without value caches ``kv_c``,
            ``k_pe`` and ``slot_mapping`` of `concat_and_cache_mla`.
        """
        self._writers[layer](key, value, slot_mapping, stream=stream)

    def copy_blocks(self, block_mapping, *, stream=None):
        """Copy blocks within every layer: see `copy_blocks`. The host's time does not depend on the
        number of layers, as long as their pointers fit one launch."""
        self._copier.copy(block_mapping, stream)

    def swap_blocks(self, other, block_mapping, *, stream=None):
        """Copy blocks of every layer to those of ``other``, a `PagedKVCache` with as many layers of
        like blocks, on the same GPU or in host memory: see `swap_blocks`.

        Parameters
        ----------
        other : PagedKVCache
        block_mapping : sequence of (block here, block there), or array [num_pairs, 2]
            In host memory.
        stream : optional
            See `swap_blocks`.
        """
        if (self.value_caches is None) != (other.value_caches is None):
            raise ShapeError(
                "swap_blocks: Invalid kind of other: expected value caches on both sides or on none"
            )
        lists = [(self.key_caches, other.key_caches)]
        if self.value_caches is not None:
            lists.append((self.value_caches, other.value_caches))
        # All are checked before the first is copied: an error comes before anything is written.
        for copy in [swap_blocks.checked(*sides, block_mapping, stream=stream) for sides in lists]:
            copy()


def _for_each_layer(name, scales, layers):
    if not isinstance(scales, (list, tuple)):
        return [scales] * layers
    if len(scales) != layers:
        raise ArgumentError(
            f"PagedKVCache: Invalid length of {name}: expected one scale for each of {layers} "
            f"layers, got {len(scales)}"
        )
    return list(scales)

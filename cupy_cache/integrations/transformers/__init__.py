# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Paged attention for the models of Hugging Face's transformers.

``import cupy_cache.integrations.transformers`` registers two attention implementations; either is
chosen by ``attn_implementation=`` or ``model.set_attn_implementation``:

"cupy_cache"
    Attention by `cupy_cache.paged_attention`, with any cache of transformers. With `PagedCache`,
    given to ``generate`` as ``past_key_values`` (``cache`` in newer versions of transformers), keys
    and values stay in their pages.
"cupy_cache_flash2"
    The same, and for continuous batching (``generate_batch``, ``init_continuous_batching``).
    transformers gives block tables and CUDA graphs only to implementations in whose names "flash"
    is followed by a 2 or a 3: hence the name. There is nothing of FlashAttention behind it.

docs/transformers.md has examples, and what is refused. Needs torch 2.5 and transformers 5.17, or
newer; tested with transformers 5.17 and 5.24.
"""

from ...errors import MissingDependencyError

_NEEDED = (
    "cupy_cache.integrations.transformers needs torch 2.5 and transformers 5.17, or newer "
    "(pip install 'torch>=2.5' 'transformers>=5.17')"
)
try:
    import torch  # noqa: F401
    import transformers
except ImportError as error:
    raise MissingDependencyError(f"{_NEEDED}: {error}") from error
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise MissingDependencyError(f"{_NEEDED}, got {transformers.__version__}")

from .attention import ATTENTION, BATCHING, attention, register  # noqa: E402
from .cache import PagedCache  # noqa: E402

__all__ = ["ATTENTION", "BATCHING", "PagedCache", "attention"]

register()

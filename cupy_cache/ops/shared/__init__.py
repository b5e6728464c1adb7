# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What several operations have in common. The modules, each above those that it imports:

rotary.py : the plan and the kernels of all that rotates.
rotary_arguments.py : the checks of its arguments.
packing.py : packing, unpacking and zeroing chosen blocks or tokens of all layers.
gathering.py : reading the pages of sequences into rows.
copying.py : the plan of copies within caches.
layered.py : checks of the caches of all layers, and of blocks or slots chosen in them.
mappings.py : pairs of blocks in host memory: their checks, and their runs.
blocks.py : what a block looks like, tables of pointers, the copy kernel.
mla.py : entries of latent attention.
slots.py : block tables that turn positions into slots, with context parallelism.
indexer.py : the cache of a sparse-attention indexer.
transposed.py : how x-packed values are dealt to thread blocks.
"""

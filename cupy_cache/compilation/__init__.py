# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Compiling ahead of time: which kernels a model needs, and loading them."""

from .warming import warmup

__all__ = ["warmup"]

# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over pages, and the slopes and biases of ALiBi. One file per operation."""

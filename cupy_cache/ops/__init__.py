# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One module for each operation, or for a few that are one and its reverse: docstring, contract and
plan.

The kernel of ``ops/X.py`` is in ``kernels_cu/X.cu``, or in the file of the operations with which it
shares one (``ops/shared``); its tests are ``tests/test_X.py``. ``benchmarks/bench_operations.py``
measures the ordinary call of each, a ``bench_X.py`` what is to be fast.
"""

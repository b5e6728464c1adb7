# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One module for each operation: its docstring, its contract and its plan.

``ops/X.py`` belongs to ``kernels_cu/X.cu`` and ``tests/test_X.py``. The ordinary call of each is
measured by ``benchmarks/bench_operations.py``; what is to be fast also by a ``bench_X.py``.
"""

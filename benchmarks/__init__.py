# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Speed of every operation, beside its peers and its physical floor.

``python -m pytest benchmarks`` runs what the machine can run; ``python -m benchmarks.report`` turns
the JSON that ``--benchmark-json`` writes into ``results/``, tables and plots.

* ``timing``: device time from CUDA graphs, host time from enqueue-only batches, the copy ceiling
* ``suite``: one workload, several contenders: checks, measures and fills one record
* ``peers``: other implementations of the same operations
* ``bench_X``: the cases of operation X
* ``baselines``: kernels without each founding optimisation, for ``bench_ablation``
"""

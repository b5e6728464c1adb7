# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Where memory is."""

from typing import NamedTuple


class Device(NamedTuple):
    """The CPU, or a GPU by its index: kind is "cpu" or "cuda"."""

    kind: str
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)
# The index of a GPU that is not there: arrays on it are only described, launches raise
# `launch.KernelNeeded`.
NOWHERE = -1

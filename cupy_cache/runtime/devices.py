# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Devices: the CPU, and GPUs by their indices."""

from typing import NamedTuple


class Device(NamedTuple):
    """The CPU, or a GPU by its index: kind is "cpu" or "cuda"."""

    kind: str
    index: int

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)
# The index of a GPU that does not exist. Arrays on it have no memory (descriptions.py); launches
# raise `launch.KernelNeeded`.
NOWHERE = -1

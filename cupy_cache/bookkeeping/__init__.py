# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Which blocks hold the tokens of which sequence: an engine's host side, in pure Python."""

from .block_pool import BlockPool
from .block_tables import BlockTables
from .csr import block_table_to_csr, csr_to_block_table
from .step import Step

__all__ = ["BlockPool", "BlockTables", "Step", "block_table_to_csr", "csr_to_block_table"]

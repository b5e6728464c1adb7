# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The version, readable without importing the package."""

__version__ = "0.2.0"

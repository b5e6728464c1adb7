# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What attention needs besides the cache: ALiBi slopes and biases. One file per operation."""

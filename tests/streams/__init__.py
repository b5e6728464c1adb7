# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Order between streams, how long memory must live, and which GPU is current: on a real GPU."""

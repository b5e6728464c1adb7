# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters to frameworks. Each module imports its framework; nothing else imports them."""

# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m cupy_cache``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Random calls of every public function: ordinary ones, and ordinary ones of which one thing is
another than it should be.

`call` makes one. Each array lies somewhere in a byte storage of its own, with bytes around it that
nothing may touch. What a call must do is said by plain loops over the very bytes that its arrays
show.
"""

from .arrays import pick
from .changes import call
from .judging import judge, judge_recorded

__all__ = ["call", "judge", "judge_recorded", "pick"]

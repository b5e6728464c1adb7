# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The package's logger: silent unless the program, or CUPYCACHE_LOGLEVEL, asks otherwise."""

import logging

from . import env

logger = logging.getLogger("cupy_cache")
logger.addHandler(logging.NullHandler())


def configure():
    """Print the log to standard error at the level CUPYCACHE_LOGLEVEL names, if it names one."""
    level = env.text(env.LOGLEVEL).strip().upper()
    if not level:
        return
    if not isinstance(logging.getLevelName(level), int):
        raise ValueError(
            f"Invalid value of {env.LOGLEVEL.name}: expected a level name, got {level!r}"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)

# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The package's logger: silent unless the program, or CUPYCACHE_LOGLEVEL, asks otherwise."""

import logging
import sys

from .. import errors
from . import env

logger = logging.getLogger("cupy_cache")
logger.addHandler(logging.NullHandler())


class _Printed(logging.StreamHandler):
    """Prints to what standard error is at that moment: notebooks and tests exchange it."""

    def __init__(self):
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    @property
    def stream(self):
        """Standard error."""
        return sys.stderr


_printed = _Printed()


def configure():
    """Print the log to standard error at the level CUPYCACHE_LOGLEVEL names, if it does."""
    name = env.text(env.LOGLEVEL).strip().upper()
    if not name:
        return
    level = env.whole_number(name)
    if level is None:
        level = logging.getLevelName(name)
    if not isinstance(level, int):
        env.say_once(
            f"{env.LOGLEVEL.name}: expected a logging level, such as DEBUG or 10, got "
            f"{errors.shown(name)}; nothing is printed"
        )
        return
    logger.addHandler(_printed)  # once, however often the package is imported anew
    logger.setLevel(level)

# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Locks that are free in a forked child. A plain lock may stay locked there for ever: the thread of
the parent that held it does not exist in the child."""

import os
import threading
import weakref


class Lock:
    """``threading.RLock``, as a context manager. A signal handler, or an object's end, may call an
    operation in the middle of another: a plain lock would wait for its own thread."""

    def __init__(self):
        self.renew()
        _locks.add(self)

    def renew(self):
        """Become free, whichever thread held it."""
        self._lock = threading.RLock()

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *exc):
        try:
            self._lock.release()
        except RuntimeError:  # a signal handler forked meanwhile, and here, in the child, it is new
            pass


_locks: weakref.WeakSet = weakref.WeakSet()


def _renew_all():
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_renew_all)

# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Locks that a forked child finds free: another thread of the parent, which the child has not, may
have held them."""

import os
import threading
import weakref


class Lock:
    """What ``threading.Lock`` is, as a context manager."""

    def __init__(self):
        self.renew()
        _locks.add(self)

    def renew(self):
        """Be free, whoever held it."""
        self._lock = threading.Lock()

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, *exc):
        self._lock.release()


_locks: weakref.WeakSet = weakref.WeakSet()


def _renew_all():
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_renew_all)

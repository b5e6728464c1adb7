# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A swap space on the CPU whose copies are made later than they are begun, as a GPU's."""

import ctypes

from cupy_cache.kv_cache import swap_space

POISON = 0xFF


class Late(swap_space._Memory):
    """In the place of the copy engines: copies are made in order, when one waits for them or has
    asked often enough. New memory is poisoned."""

    def __init__(self, rng):
        self.rng, self.copies, self.made = rng, [], 0

    def zeros(self, shape):
        memory = super().zeros(shape)
        memory[...] = POISON
        return memory

    def empty(self, framework, device, shape, dtype):
        memory = super().empty(framework, device, shape, dtype)
        memory[...] = POISON
        return memory

    def copy(self, destination, source, size):
        self.copies.append((destination, source, size))

    def point(self, stream):
        del stream
        return Point(self)


class Point:
    """What stands for `driver.Event`."""

    def __init__(self, late):
        self.late, self.until, self.asked_for = late, len(late.copies), late.rng.integers(6)

    def done(self):
        self.asked_for -= 1
        if self.asked_for < 0:
            self.wait()
        return self.late.made >= self.until

    def wait(self):
        for destination, source, size in self.late.copies[self.late.made : self.until]:
            ctypes.memmove(destination, source, size)
        self.late.made = max(self.late.made, self.until)


class LateSpace(swap_space.SwapSpace):
    """A `SwapSpace` with `Late` copies, which are counted."""

    def __init__(self, rng, *given, **options):
        self.late = Late(rng)
        super().__init__(*given, **options)

    def _new_bus(self):
        return self.late

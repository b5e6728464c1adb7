# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Deleting this library's kernels from the folder in which CuPy keeps everybody's."""

import contextlib
import os
from pathlib import Path

# The namespace of every kernel of ours, as compilers spell it in the names of functions.
OURS = b"10cupy_cache"


def clear(folder):
    """Delete them; returns (how many, their bytes, how many files stay). Machine code that holds a
    function of ours is ours, and so is the source that CuPy may have written beside it. A folder
    that is not there holds nothing; other errors are `OSError`."""
    count = size = 0
    # Not the folder "", which CuPy does not find: a `Path` takes it for the current one.
    for path in sorted(Path(folder).glob("*.cubin")) if folder else ():
        if not path.is_file():  # a pipe would never be read to its end
            continue
        with contextlib.suppress(FileNotFoundError):  # another process may clear, too
            if OURS not in path.read_bytes():
                continue
            size += path.stat().st_size
            path.unlink()
            count += 1
            path.with_name(f"{path.name}.cu").unlink()
    stay = os.listdir(folder) if os.path.lexists(folder) else []
    return count, size, len(stay)

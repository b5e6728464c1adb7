# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Neighbouring segments of rows, the tokens of one sequence after the other."""


def evenly(count, rows):
    """(Segments of a row, rows of a segment) if all ``count`` were equally long: where a search for
    a row's segment begins."""
    return (count / rows, rows / count) if count and rows else (0.0, 0.0)

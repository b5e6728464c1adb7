# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Block tables as FlashInfer takes them, and back."""

import weakref

import numpy as np
import pytest

import cupy_cache as cc

FRAMEWORKS = ["numpy", "torch"]


def given_as(framework, values):
    if framework == "torch":
        return pytest.importorskip("torch").from_numpy(values)
    return values


def problem(rng):
    """(Table with numbers that no sequence needs, lengths, size of a block), and as loops say what
    they are, (indptr, indices, last_page_len)."""
    size, width, count = (int(n) for n in rng.integers([1, 1, 0], [6, 7, 9]))
    lens = rng.integers(0, width * size + 1, count)
    lens[rng.random(count) < 0.3] = 0
    table = rng.integers(0, 1000, (count, width))
    indptr, indices, last = [0], [], []
    for row, length in zip(table, lens):
        left = int(length)
        for page in range(width):
            if left > 0:
                indices.append(int(row[page]))
                tokens = min(left, size)
                left -= tokens
            else:
                row[page] = -1
        indptr.append(len(indices))
        last.append(tokens if length else 0)
    return table, lens, size, (indptr, indices, last)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_there_and_back(rng, framework):
    for _ in range(40):
        table, lens, size, expected = problem(rng)
        dtypes = rng.choice(["int32", "int64"], 3)
        spare = np.concatenate([table, table[:1]]).astype(dtypes[0])  # rows of no sequence
        made = cc.block_table_to_csr(
            given_as(framework, spare), given_as(framework, lens.astype(dtypes[1])), size
        )
        for one, wanted in zip(made, expected, strict=True):
            assert type(one).__module__.partition(".")[0] == framework
            assert str(one.dtype).removeprefix("torch.") == "int32" and one.tolist() == wanted
        back = cc.csr_to_block_table(*made, size, width=table.shape[1])
        assert back[0].tolist() == table.tolist() and back[1].tolist() == lens.tolist()
        assert tuple(back[0].shape) == table.shape
        narrow, _ = cc.csr_to_block_table(*made, size)
        assert narrow.shape[1] == max(np.diff(expected[0]), default=0)


def test_the_formula_of_flashinfer(rng):
    """Lengths are (blocks - 1, at least 0) * block size + last_page_len."""
    table, lens, size, _ = problem(rng)
    indptr, _, last = cc.block_table_to_csr(table, lens, size)
    np.testing.assert_array_equal(np.maximum(np.diff(indptr) - 1, 0) * size + last, lens)


def test_views_and_other_bounds():
    """Strides of any kind; indices that begin later, and go on."""
    table = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::-1]
    lens = np.array([5, 0, 3, 0])[::2]
    indptr, indices, last = cc.block_table_to_csr(table, lens, 2)
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == (
        [0, 3, 5],
        [5, 4, 3, 17, 16],
        [1, 1],
    )
    back, lens = cc.csr_to_block_table(
        np.array([1, 3, 3]), np.array([9, 8, 7, -5]), np.array([2, 77]), 2, width=3
    )
    assert back.tolist() == [[8, 7, -1], [-1, -1, -1]] and lens.tolist() == [4, 0]


def table_to_csr(table=((1, 2), (3, 4)), lens=(3, 4), size=2):
    return cc.block_table_to_csr(np.array(table), np.array(lens), size)


def csr_to_table(indptr=(0, 2, 3), indices=(1, 2, 3), last=(1, 2), size=2, **options):
    return cc.csr_to_block_table(
        np.array(indptr), np.array(indices), np.array(last), size, **options
    )


@pytest.mark.whole
@pytest.mark.parametrize("call, what, argument", [
    (lambda: table_to_csr(lens=(3, 5)), "value", "seq_lens"),
    (lambda: table_to_csr(lens=(-1, 4)), "value", "seq_lens"),
    (lambda: table_to_csr(lens=(1, 1, 1)), "shape", "block_table"),
    (lambda: table_to_csr(lens=((1, 1),)), "shape", "seq_lens"),
    (lambda: table_to_csr(lens=(1.0, 1.0)), "dtype", "seq_lens"),
    (lambda: table_to_csr(table=(1, 2)), "shape", "block_table"),
    (lambda: table_to_csr(table=((1, -2), (3, 4))), "value", "block_table"),
    (lambda: table_to_csr(table=((1, 2**31), (3, 4))), "value", "block_table"),
    (lambda: table_to_csr(size=0), "value", "block_size"),
    (lambda: cc.block_table_to_csr([[1]], np.array([1]), 2), "type", "block_table"),
    (lambda: csr_to_table(indptr=(0, 2)), "shape", "indptr"),
    (lambda: csr_to_table(indptr=(0, 2, 4)), "value", "indptr"),
    (lambda: csr_to_table(indptr=(0, 2, 1)), "value", "indptr"),
    (lambda: csr_to_table(indptr=(-1, 2, 3)), "value", "indptr"),
    (lambda: csr_to_table(indices=(1, 2, -1)), "value", "indices"),
    (lambda: csr_to_table(last=(0, 2)), "value", "last_page_len"),
    (lambda: csr_to_table(last=(1, 3)), "value", "last_page_len"),
    (lambda: csr_to_table(width=1), "value", "width"),
    (lambda: csr_to_table(size=True), "value", "block_size"),
])  # fmt: skip
def test_refusals(call, what, argument):
    with pytest.raises(
        cc.CupyCacheError, match=rf"^(block_table_to_csr|csr_to_block_table): Invalid {what} of "
    ) as caught:
        call()
    assert f" of {argument}: expected " in str(caught.value)


class Exporting:
    """An array that exports a copy, which is overwritten as soon as nobody owns it."""

    def __init__(self, values):
        self.values = np.array(values)

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        del options
        storage = self.values.copy()
        exported = storage.view(Watched)
        weakref.finalize(exported, storage.fill, 99)
        return exported.__dlpack__()


class Watched(np.ndarray):
    """What can be told when it goes."""


@pytest.mark.parametrize("size", [2**31, 2**62, 2**63 - 1])
def test_blocks_too_large_to_count_their_tokens(size):
    """Of 2**62 tokens, say, five would have as many as none."""
    with pytest.raises(cc.ArgumentError, match="block_size: expected 1..2147483647"):
        cc.csr_to_block_table(np.array([0, 5]), np.arange(5), np.array([7]), size)
    with pytest.raises(cc.ArgumentError, match="block_size: expected 1..2147483647"):
        cc.block_table_to_csr(np.array([[1], [2]]), np.array([3, 4]), size)


def test_copies_that_are_exported_live_until_they_are_read():
    found = cc.block_table_to_csr(Exporting([[7, 3], [5, 0]]), Exporting([6, 4]), 4)
    assert [one.tolist() for one in found] == [[0, 2, 3], [7, 3, 5], [2, 4]]
    found = cc.csr_to_block_table(Exporting([0, 2, 3]), Exporting([7, 3, 5]), Exporting([2, 4]), 4)
    assert [one.tolist() for one in found] == [[[7, 3], [5, -1]], [6, 4]]


def test_the_row_of_a_wrong_block_is_told():
    table = np.array([[1, 7], [2, -1], [3, -1]])
    assert cc.block_table_to_csr(table, np.array([8, 4, 3]), 4)[1].tolist() == [1, 7, 2, 3]
    with pytest.raises(cc.ArgumentError, match="got -1 in row 2"):
        cc.block_table_to_csr(table, np.array([8, 4, 5]), 4)


@pytest.mark.gpu
def test_arrays_on_a_gpu_are_refused():
    cupy = pytest.importorskip("cupy")
    with pytest.raises(cc.DeviceError, match="copy it to the host"):
        cc.block_table_to_csr(cupy.array([[1]]), np.array([1]), 2)

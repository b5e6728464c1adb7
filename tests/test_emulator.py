# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The emulator sees what it is there to see: each kernel here has one planted mistake, or none."""

import shutil

import numpy as np
import pytest

from cupy_cache.runtime import (
    arrays,
    driver,
    env,
    formats,
    launch,
    making,
    modules,
    params,
    streams,
)

SOURCE = """\
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

struct Params {
  char* to;
  const char* from;
  i64 number;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) planted(const __grid_constant__ Params p) {
  const int thread = threadIdx.x;
%s
}

}  // namespace cupy_cache
"""
PARAMS = params.Struct(per_call="to:ptr from:ptr number:i64")
REVERSE = """
  __shared__ int held[kThreads];
  held[thread] = thread;
  %s
  reinterpret_cast<int*>(p.to)[thread] = held[kThreads - 1 - thread];
"""


class Bench:
    """Runs small kernels on byte storages ``to`` and ``source`` of the emulated device."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder
        self.kernels = {}

    def storage(self, values):
        values = np.ascontiguousarray(values)
        return self.world.upload(values.reshape(-1).view(np.uint8))

    def kernel(self, body, threads, source_text=SOURCE, **options):
        text = source_text % body
        stem = self.kernels.setdefault(text, f"planted{len(self.kernels)}")
        (self.folder / f"{stem}.cu").write_text(text)
        return modules.Kernel("planted", stem, f"planted<{threads}>", PARAMS, **options)

    def run(self, body, to, source=None, number=0, threads=32, grid=(1, 1, 1), **options):
        kernel = self.kernel(body, threads, **options)
        at = 0 if source is None else source.ptr
        launch.Launcher(kernel, 0).enqueue(grid, threads, 0, to.ptr, at, number)


@pytest.fixture
def bench(emulated_world, tmp_path, monkeypatch):
    shutil.copytree(modules.kernel_dir() / "include", tmp_path / "include")
    monkeypatch.setenv(env.KERNEL_DIR.name, str(tmp_path))
    world = emulated_world()
    yield Bench(world, tmp_path)
    world.close()


def caught(bench, *words, **run):
    """The kernel's report names each of ``words``; the next launch works."""
    from emulator import EmulationError

    with pytest.raises(EmulationError) as error:
        bench.run(**run)
    for word in words:
        assert word in str(error.value)
    to = bench.storage(np.zeros(32, np.int32))
    bench.run("  reinterpret_cast<int*>(p.to)[thread] = 7;", to)
    assert (to.bytes.view(np.int32) == 7).all()


@pytest.mark.extra
class TestMistakes:
    @pytest.mark.parametrize("nbytes", [0, 7, 4096 - 256])
    @pytest.mark.parametrize(
        "number, access",
        [
            (1, "p.to[end] = 0;"),
            (1, "static_cast<volatile char*>(p.to)[end];"),
            (-1, "p.to[-1] = 0;"),
        ],
    )
    def test_one_byte_outside(self, bench, nbytes, number, access):
        at = -1 if number < 0 else nbytes
        words = (
            "out of bounds: thread 5 of block (0, 0, 0)",
            "kernels_cu/planted0.cu:",
            f"byte {at} of a storage of {nbytes} ",
        )
        body = f"  const i64 end = {nbytes};\n  if (thread == 5) {access}"
        caught(bench, *words, body=body, to=bench.storage(np.zeros(nbytes, np.uint8)))

    @pytest.mark.parametrize("number", [-(2**62), -(2**30), 2**20, 2**35, 2**62])
    def test_far_outside(self, bench, number):
        to = bench.storage(np.zeros(64, np.uint8))
        caught(bench, "kernels_cu/", body="  p.to[p.number] = 1;", to=to, number=number)

    def test_null(self, bench):
        body = "  if (thread == 5) reinterpret_cast<int*>(p.number)[0] = 1;"
        to = bench.storage(np.zeros(64, np.uint8))
        words = "out of bounds: thread 5 ", "writes 4 bytes at address 0x0", "planted0.cu:"
        caught(bench, *words, body=body, to=to, number=0)

    def test_freed(self, bench):
        to, gone = (bench.storage(np.zeros(64, np.uint8)) for _ in range(2))
        address = gone.ptr
        bench.run("  p.to[thread] = 1;", gone)
        del gone
        body = "  reinterpret_cast<char*>(p.number)[0] = 1;"
        caught(bench, "out of bounds", "kernels_cu/", body=body, to=to, number=address)

    @pytest.mark.parametrize("size", [2, 16])
    @pytest.mark.parametrize("side", ["load", "store"])
    def test_misaligned(self, bench, size, side):
        load, store = (size // 2, 0) if side == "load" else (0, size // 2)
        body = f"store_vector<{size}>(p.to + {store}, load_vector<{size}>(p.from + {load}));"
        to, source = (bench.storage(np.zeros(64, np.uint8)) for _ in range(2))
        caught(
            bench, "misaligned", f"requires {size} byte alignment",
            "planted0.cu", body=body, to=to, source=source,
        )  # fmt: skip

    def test_what_is_undefined_once(self, bench):
        """The launch is run again for its report; here that finds what the first has written."""
        body = "  if (thread == 5 && !p.to[0]++) reinterpret_cast<int*>(p.to)[1] += 0x7fffffff;"
        words = "undefined behaviour, which was not met when run again", "planted"
        caught(bench, *words, body=body, to=bench.storage(np.array([0, 1], np.int32)))

    def test_signed_overflow(self, bench):
        to = bench.storage(np.zeros(8, np.uint8))
        body = "  *reinterpret_cast<i64*>(p.to) = p.number * 2;"
        caught(bench, "signed integer overflow", "planted0.cu:", body=body, to=to, number=2**62)

    @pytest.mark.parametrize(
        "access, word",
        [
            ("held[thread + p.number]", "out of bounds"),
            ("(held + p.number)[thread]", "insufficient space"),
            (
                "int* volatile hidden = held; hidden[thread + p.number]",
                "byte 256 of __shared__ held",
            ),
        ],
    )
    def test_shared_memory_overrun(self, bench, access, word):
        to = bench.storage(np.zeros(4 * 64, np.uint8))
        body = REVERSE.replace("held[thread]", access) % "__syncthreads();"
        caught(bench, word, "planted0.cu:", body=body, to=to, threads=64, number=1)

    def test_shared_memory_of_another_variable(self, bench):
        to = bench.storage(np.zeros(8, np.uint8))
        body = """
  __shared__ int first[kThreads], second[kThreads];
  int* volatile behind[2] = {first + kThreads, second + kThreads};
  if (thread == 7) *behind[p.number] = 1;
"""
        for number, name in enumerate(("first", "second")):
            words = f"byte 128 of __shared__ {name}", "planted0.cu:18"
            caught(bench, *words, body=body, to=to, number=number)

    def test_stale_shared_memory(self, bench):
        """A block does not find what the one before left."""
        to = bench.storage(np.zeros(4 * 2 * 32, np.uint8))
        body = """
  __shared__ int held[kThreads];
  reinterpret_cast<int*>(p.to)[blockIdx.x * kThreads + thread] = held[thread];
  held[thread] = thread;
"""
        bench.run(body, to, grid=(2, 1, 1))
        assert (to.bytes == 0xA5).all()

    def test_barrier_that_not_all_reach(self, bench):
        body = "  if (thread < 32) __syncthreads(); else if (thread < 40) __syncwarp(0xff);"
        to = bench.storage(np.zeros(8, np.uint8))
        bench.run(body, to, threads=64)  # threads that have returned do not count
        body = "  if (thread == 3) __syncthreads(); else __syncwarp();"
        caught(bench, "deadlock", "thread 3 waits at __syncthreads", body=body, to=to)

    def test_shuffle_from_outside_its_mask(self, bench):
        to = bench.storage(np.zeros(8, np.uint8))
        body = "  if (thread < 16) __shfl_xor_sync(0xffffu, thread, 16);"
        caught(bench, "not in its mask", "planted0.cu:", body=body, to=to)

    def test_endless_loop(self, bench, monkeypatch):
        from emulator import Runner

        monkeypatch.setattr(Runner, "TIMEOUT", 1)
        to = bench.storage(np.zeros(8, np.uint8))
        body = "  while (*reinterpret_cast<volatile char*>(p.to) == 0) {}"
        caught(bench, "did not end", body=body, to=to)

    def test_source_that_does_not_compile(self, bench):
        from emulator import EmulationError

        with pytest.raises(EmulationError, match=r"kernels_cu/planted0.cu:\d+.*nonsense"):
            bench.run("  nonsense;", bench.storage(np.zeros(8, np.uint8)))


# What two threads of a launch do, and the words for the later one and the earlier one; either may
# come first.
FIRST_BYTES = "  int* const at = reinterpret_cast<int*>(p.to);\n"
RACES = {
    "no barrier": REVERSE % "",
    "a barrier before both": "  __syncthreads();\n" + REVERSE % "",
    "a shuffle orders nothing": REVERSE % "__shfl_sync(0xffffffffu, thread, 0);",
    "a warp's barrier, two warps": REVERSE % "__syncwarp();",
    "half a warp": """
  __shared__ int held[kThreads];
  held[thread] = thread;
  if (thread % 32 < 16) __syncwarp(0xffffu); else __syncwarp(0xffff0000u);
  reinterpret_cast<int*>(p.to)[thread] = held[thread ^ 31];
""",
    "both write": FIRST_BYTES + "  *at = 7;",
    "both write one value": FIRST_BYTES + "  if (thread == 3 || thread == 40) at[5] = 1;",
    "two sizes": FIRST_BYTES
    + """
  if (thread == 3) reinterpret_cast<uint4*>(at)[1] = {};
  if (thread == 40) reinterpret_cast<char*>(at)[27] = 1;
""",
    "a sum": FIRST_BYTES + "  *at += thread;",
    "an atomic sum, and a load": FIRST_BYTES + "  if (thread) atomicAdd(at, 1); else at[1] = *at;",
    "an atomic sum, and a store": FIRST_BYTES + "  if (thread) atomicAdd(at, 1); else *at = 1;",
    "before and behind a barrier": FIRST_BYTES
    + """
  if (thread == 1) at[0] = 1;
  __syncthreads();
  if (thread == 2) at[1] = at[0];
  if (thread == 3) at[0] = 2;
""",
    "one of many readers": FIRST_BYTES
    + "  if (thread != 9) at[thread + 1] = at[0]; else at[0] = 9;",
    "shared memory that is used again": """
  __shared__ int held[kThreads];
  for (int turn = 0; turn < 2; ++turn) {
    held[thread] = thread + turn;
    __syncthreads();
    reinterpret_cast<int*>(p.to)[thread] = held[(thread + 1) % kThreads];
  }
""",
    "a copy in place": FIRST_BYTES + "  at[thread + 1] = at[thread];",
    "memcpy": FIRST_BYTES
    + "  memcpy(p.to + 12 * thread, p.from, 16 + static_cast<u32>(p.number));",
}
ORDERED = {
    "a barrier": REVERSE % "__syncthreads();",
    "a warp's barrier": "  if (thread < 32) {"
    + REVERSE.replace("kThreads", "32") % "__syncwarp();"
    + "}",
    "half a warp": """
  __shared__ int held[kThreads];
  held[thread] = thread;
  if (thread % 32 < 16) __syncwarp(0xffffu); else __syncwarp(0xffff0000u);
  reinterpret_cast<int*>(p.to)[thread] = held[thread ^ 15];
""",
    "atomic sums": FIRST_BYTES + "  atomicAdd(at, thread); atomicMax(at, 3);",
    "an atomic sum, a barrier, and a load": FIRST_BYTES
    + """
  atomicAdd(at, 1);
  __syncthreads();
  at[1 + thread] = *at;
""",
    "neighbouring bytes": "  p.to[thread] = p.to[thread] + 1;",
    "all read": FIRST_BYTES + "  at[thread + 1] = at[0];",
    "who has returned": FIRST_BYTES
    + """
  if (thread >= 32) { at[thread] = 1; return; }
  __syncthreads();
  at[thread] = at[thread + 32];
""",
    "one thread": FIRST_BYTES
    + "  if (thread == 4) { at[0] = 1; at[0] += at[0]; atomicAdd(at, 1); }",
    "warps in turns": """
  __shared__ int held[33];
  int* const to = reinterpret_cast<int*>(p.to);
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (thread / 32 == warp) {
      held[thread % 32] = thread;
      __syncwarp();
      to[thread] = held[31 - thread % 32];
    }
    __syncthreads();
  }
""",
}


class TestRaces:
    """Two threads that touch a byte, one of them writing, with nothing between that orders them."""

    def storages(self, bench):
        return bench.storage(np.zeros(1024, np.uint8)), bench.storage(np.zeros(64, np.uint8))

    @pytest.mark.parametrize("name", RACES)
    def test_is_seen(self, bench, name):
        """In any order of the threads."""
        from emulator import EmulationError

        for _ in range(4):
            to, source = self.storages(bench)
            with pytest.raises(
                EmulationError, match="ERROR: race.*no barrier.*\n(.*\n)+.*That is"
            ) as error:
                bench.run(RACES[name], to, source, threads=64, number=3)
            assert "planted0.cu:" in str(error.value)

    @pytest.mark.parametrize("name", ORDERED)
    def test_is_none(self, bench, name):
        for _ in range(4):
            to, source = self.storages(bench)
            bench.run(ORDERED[name], to, source, threads=64)

    @pytest.mark.parametrize(
        "write, is_race",
        [
            ("p.to[thread] = blockIdx.x;", True),
            ("p.to[thread + 32 * blockIdx.x] = 1;", False),
            ("if (blockIdx.x == 2) p.to[5] = p.to[6]; else if (thread == 9) p.to[6] = 1;", True),
            ("if (blockIdx.x == 2) p.to[thread] = p.to[32];", False),
            ("__syncthreads(); if (thread == blockIdx.x) p.to[0] = 1;", True),
            (
                "__shared__ char held[32]; held[thread] = 1; "
                "p.to[thread + 32 * blockIdx.x] = held[thread];",
                False,
            ),
        ],
    )
    def test_between_blocks(self, bench, write, is_race):
        """Shared memory is another one in each, and no barrier orders them."""
        from emulator import EmulationError

        for _ in range(2):
            to, _ = self.storages(bench)
            if is_race:
                with pytest.raises(
                    EmulationError, match=r"race: .*thread \d+ of block \(\d, 0, 0\)"
                ):
                    bench.run(write, to, grid=(3, 1, 1))
            else:
                bench.run(write, to, grid=(3, 1, 1))

    @pytest.mark.parametrize("left_out", ["", "barrier", "release", "count", "acquire", "last"])
    def test_fences_and_atomic_accesses_order_blocks(self, bench, left_out):
        """The last block sees what the others wrote before; with any step left out it may not."""
        from emulator import EmulationError

        steps = {
            "": "  int* const at = reinterpret_cast<int*>(p.to);\n  __shared__ int count;\n"
            "  at[1 + kThreads * blockIdx.x + thread] = thread;\n",
            "barrier": "  __syncthreads();\n",
            "release": "  if (thread == 0) __threadfence();\n",
            "count": "  if (thread == 0) count = atomicAdd(at, 1);\n",
            "acquire": "  if (thread == 0) __threadfence();\n",
            "last": "  __syncthreads();\n",
            "sum": "  for (int i = 0; i < 3 && (count == 2 || p.number); ++i) {\n"
            "    at[1 + kThreads * (3 + i) + thread] = at[1 + kThreads * i + (thread + 1) % 64];\n"
            "  }\n",
        }
        body = "".join(step for name, step in steps.items() if not left_out or name != left_out)
        if left_out == "count":
            body = body.replace("(count == 2 || p.number)", "blockIdx.x == 2 * p.number")
        if not left_out:
            for _ in range(3):
                bench.run(body, bench.storage(np.zeros(2048, np.uint8)), threads=64, grid=(3, 1, 1))
            return
        seen = 0
        for number in (0, 1):  # blocks run in either order
            to = bench.storage(np.zeros(2048, np.uint8))
            try:
                bench.run(body, to, threads=64, grid=(3, 1, 1), number=number)
            except EmulationError as error:
                assert "race" in str(error)
                seen += 1
        assert seen

    def test_counts_in_memory_that_holds_anything(self, bench):
        """One of the blocks is the last to arrive, each time; scratch.cuh."""
        body = """
  u64* const words = reinterpret_cast<u64*>(p.to);
  if (arrive_block(words, 0x123456789abc0000, gridDim.x)) words[1 + thread] += 1;
"""
        text = SOURCE.replace('#include "cupy_cache/vec.cuh"', '#include "cupy_cache/scratch.cuh"')
        for word in (0, 1, 2, 0x123456789ABB0001, 0x123456789ABD0002, 2**64 - 1):
            to = bench.storage(np.array([word] + [0] * 64, np.uint64))
            for launched in range(1, 4):
                bench.run(body, to, threads=64, grid=(5, 1, 1), source_text=text)
                words = to.bytes.view(np.uint64)
                assert words[0] == 0
                assert (words[1:] == launched).all()

    def test_what_is_told(self, bench):
        """The kernel, the line, both threads, what they did, and which byte of which argument."""
        body = FIRST_BYTES + "  if (thread == 3 || thread == 40) at[5 + (thread == 40)] = at[5];"
        to, _ = self.storages(bench)
        words = (
            "planted<64>",
            "planted0.cu:16",
            "of block (0, 0, 0)",
            "thread 3",
            "thread 40",
            "byte 20 of a storage of 1024 bytes, to which points: to.",
        )
        caught(bench, "race", *words, body=body, to=to, threads=64)

    def test_launches_are_ordered(self, bench):
        to, _ = self.storages(bench)
        for _ in range(3):
            bench.run("  p.to[31 - thread] = 1;", to)
            bench.run("  p.to[thread] = p.to[thread] + 1;", to)


# Two groups of copies, and so many that are not waited for; what is copied by the first is read.
ASYNC = """
  __shared__ __align__(16) char held[2 * 16 * kThreads];
  for (int group = 0; group < 2; ++group) {
    const int at = 16 * (group * kThreads + thread);
    copy_async<16>(held + at, p.from + at, thread != 5);
    commit_copies();
  }
  wait_for_copies<%d>();
  for (int i = 0; i < 16; ++i) p.to[16 * thread + i] = held[16 * thread + i];
"""


# A row that one thread has copied; it is read by all, after the wait or without it.
ROW = """
  __shared__ __align__(16) char held[16 * kThreads];
  __shared__ __align__(8) u64 word;
  if (thread == 0) {
    begin_arrivals(&word, 1);
    expect_bytes(&word, sizeof(held));
    copy_row(held, p.from, sizeof(held), &word);
  }
  __syncthreads();
  if (%s) wait_for_rows(&word, 0);
  for (int i = 0; i < 16; ++i) p.to[16 * thread + i] = held[16 * thread + i];
  wait_for_rows(&word, 0);
"""


LATE = {
    "copies of threads": (ASYNC, 1, 2),
    "rows that one thread copies": (ROW, "true", "false"),
}


@pytest.mark.extra
@pytest.mark.parametrize("body, waits, does_not", LATE.values(), ids=LATE)
def test_copies_that_are_not_waited_for(bench, rng, monkeypatch, body, waits, does_not):
    """In some launches they are done at once, and in some when they must be."""
    monkeypatch.setattr("emulator.ARCHITECTURES", (90,))
    values = rng.integers(1, 128, (2, 32, 16), np.uint8)
    source, right = bench.storage(values), values[0].copy()
    if body is ASYNC:
        right[5] = 0
    text = SOURCE.replace("paging.cuh", "async.cuh").replace("%s", body)
    for given, outcomes in ((waits, {True}), (does_not, {True, False})):
        found = []
        for _ in range(4):
            to = bench.storage(np.zeros(512, np.uint8))
            bench.run(given, to, source, source_text=text)
            found.append((to.bytes.reshape(32, 16) == right).all())
        assert set(found) == outcomes


# A tile is transposed through shared memory, and each row's sum is made by shuffles.
TRANSPOSE = """
  constexpr int kRows = kThreads / 32;
  __shared__ int tile[kRows][33];
  const int row = thread / 32, lane = thread % 32;
  const int* from = reinterpret_cast<const int*>(p.from) + blockIdx.x * kThreads;
  int* to = reinterpret_cast<int*>(p.to) + blockIdx.x * 2 * kThreads;
  const int mine = from[thread];
  tile[row][lane] = mine;
  __syncthreads();
  to[thread] = tile[thread % kRows][thread / kRows];
  int sum = mine;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  __syncthreads();
  if (lane == 0) tile[row][0] = sum;
  __syncthreads();
  to[kThreads + thread] = tile[row][0];
"""


class TestRightKernels:
    @pytest.mark.parametrize("threads", [32, 256, 1024])
    def test_barriers_and_shuffles(self, bench, rng, threads):
        blocks = 3
        values = rng.integers(-(2**20), 2**20, (blocks, threads // 32, 32), np.int32)
        to = bench.storage(np.zeros((blocks, 2, threads), np.int32))
        bench.run(TRANSPOSE, to, bench.storage(values), threads=threads, grid=(blocks, 1, 1))
        got = to.bytes.view(np.int32).reshape(blocks, 2, threads)
        np.testing.assert_array_equal(got[:, 0], values.swapaxes(1, 2).reshape(blocks, threads))
        sums = np.repeat(values.sum(axis=2), 32, axis=1)
        np.testing.assert_array_equal(got[:, 1], sums)

    def test_warp_operations(self, bench):
        """Against the results the CUDA C++ programming guide defines, lane by lane."""
        body = """
  int* to = reinterpret_cast<int*>(p.to) + thread;
  const unsigned all = 0xffffffffu;
  to[0 * 32] = __shfl_sync(all, thread, 35);
  to[1 * 32] = __shfl_sync(all, thread, 3, 8);
  to[2 * 32] = __shfl_up_sync(all, thread, 2u, 16);
  to[3 * 32] = __shfl_down_sync(all, thread, 5u, 8);
  to[4 * 32] = __shfl_xor_sync(all, thread, 9, 8);
  to[5 * 32] = __ballot_sync(all, thread % 3 == 0);
  to[6 * 32] = __any_sync(all, thread == 31) + 2 * __all_sync(all, thread < 31);
  to[7 * 32] = __reduce_add_sync(all, thread - 40);
  to[8 * 32] = __reduce_min_sync(all, (thread + 7) % 32 - 3) + 100 * __reduce_max_sync(all, thread);
  if (thread < 8) to[9 * 32] = __reduce_or_sync(0xffu, 1u << thread);
  if (thread >= 8) to[9 * 32] = __shfl_sync(0xffffff00u, thread, 9);
"""
        lanes = np.arange(32)
        inside = {width: lanes % width for width in (8, 16)}
        other = lanes ^ 9
        expected = [
            np.full(32, 3),
            lanes - inside[8] + 3,
            np.where(inside[16] >= 2, lanes - 2, lanes),
            np.where(inside[8] + 5 < 8, lanes + 5, lanes),
            np.where(other <= (lanes | 7), other, lanes),
            np.full(32, np.uint32(sum(1 << i for i in range(0, 32, 3))).astype(np.int32)),
            np.full(32, 1),
            np.full(32, sum(range(-40, -8))),
            np.full(32, 3100 - 3),
            np.where(lanes < 8, 255, 9),
        ]
        to = bench.storage(np.zeros((len(expected), 32), np.int32))
        bench.run(body, to)
        np.testing.assert_array_equal(to.bytes.view(np.int32).reshape(-1, 32), expected)

    def test_pointers_in_device_memory(self, bench):
        targets = [bench.storage(np.zeros(4, np.uint8)) for _ in range(32)]
        table = bench.storage(np.array([t.ptr for t in targets], np.uint64))
        body = "  reinterpret_cast<char* const*>(p.from)[thread][blockIdx.x] = thread + blockIdx.x;"
        bench.run(body, table, table, grid=(4, 1, 1))
        for number, target in enumerate(targets):
            assert target.bytes.tolist() == [number + block for block in range(4)]

    def test_whole_grid(self, bench):
        grid, threads = (3, 4, 5), 64
        to = bench.storage(np.zeros((5, 4, 3, threads), np.int32))
        body = """
  const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  reinterpret_cast<int*>(p.to)[block * blockDim.x + thread] += thread + 1;
"""
        bench.run(body, to, grid=grid, threads=threads)
        got = to.bytes.view(np.int32).reshape(-1, threads)
        np.testing.assert_array_equal(got, np.broadcast_to(np.arange(1, 65), got.shape))

    def test_faults_are_taken_once(self, bench):
        to = bench.storage(np.zeros(8, np.uint8))
        body = "  in_bounds(thread == 9 ? p.number : 0, 5, 2, thread);"
        bench.run(body, to, number=77, guarded=("first", "second"))
        (fault,) = driver.active.take_faults()
        assert (fault.argument, fault.row, fault.value, fault.limit) == ("second", 9, 77, 5)
        assert not driver.active.take_faults()

    def test_new_arrays(self, bench):
        """What an operation returns is made on the device, and is not blank."""
        device = arrays.Device("cuda", 0)
        for shape in ((3, 5), (0, 2), 7):
            made = making.empty("emulated", device, shape, formats.DTYPES["int32"])
            seen = arrays.view(made, "made")
            assert (seen.framework, seen.device, seen.writable) == ("emulated", device, True)
            assert bench.world.numpy(made).shape == np.empty(shape).shape
            assert (bench.world.numpy(made) == np.int32(-0x5A5A5A5B)).all()
            assert streams.current("emulated", 0)() == 0


def test_the_cache_follows_the_text(bench):
    """The same text is compiled once; an edited header, and only that, compiles again."""
    from emulator import _build, build

    def path(kernel):
        _build.cache_clear()  # what is on disk, not what this process remembers
        return build(kernel).path

    kernel = bench.kernel("  p.to[thread] = 1;", 32)
    first = path(kernel)
    compiled = first.stat().st_ino
    assert path(kernel) == first and first.stat().st_ino == compiled
    header = bench.folder / "include" / "cupy_cache" / "ints.cuh"
    header.write_text(header.read_text() + "// edited\n")
    assert path(kernel) != first

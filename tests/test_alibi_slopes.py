# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import functools
import subprocess
import sys

import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.attention import alibi_slopes as attention
from cupy_cache.runtime import driver

EIGHT = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
FORTY = [
    *(0.84089642, 0.70710678, 0.59460356, 0.5, 0.42044821, 0.35355339, 0.29730178, 0.25),
    *(2.0 ** (-i / 4) for i in range(9, 33)),
    *(0.91700404, 0.77110541, 0.64841978, 0.54525387),
    *(0.45850202, 0.38555271, 0.32420989, 0.27262693),
]
SIXTEEN_BIAS = [2.0**-i for i in range(2, 17, 2)]
# Published figures: heads, max_bias, slopes.
WORKED = (
    (1, 8, [2.0**-8]),
    (8, 8, EIGHT),
    (12, 8, [*EIGHT, 0.70710678, 0.35355339, 0.17677670, 0.08838835]),
    (40, 8, FORTY),
    (8, 16, SIXTEEN_BIAS),
    (12, 16, [*SIXTEEN_BIAS, 0.5, 0.125, 0.03125, 0.0078125]),
)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Nothing is remembered from test to test."""
    monkeypatch.setattr(attention, "_remembered", {})


def written(world, rng, count, make):
    """What ``make(out=...)`` writes to a strided array with bytes all around that must stay."""
    storage = worlds.Buffer(8 * count + 24, rng)
    spec = storage.view((count,), "float32", offset=12, strides=(8,))
    out = world.put(spec)
    assert make(out=out) is out
    after = world.bytes_of(spec)
    slopes = spec.on(after).copy()
    expected = storage.bytes.copy()
    spec.on(expected)[:] = slopes
    np.testing.assert_array_equal(after, expected)
    return slopes


def expect_close(slopes, exact):
    """Within 1e-6, and exact where the exponent is an integer."""
    exact = np.array(exact)
    np.testing.assert_allclose(slopes, exact, rtol=1e-6, atol=0)
    powers = np.frexp(exact)[0] == 0.5
    np.testing.assert_array_equal(slopes[powers], exact[powers].astype(np.float32))


class TestAlibiSlopes:
    @pytest.mark.parametrize("num_heads, max_bias, slopes", WORKED)
    def test_worked_values(self, world, rng, num_heads, max_bias, slopes):
        assert len(slopes) == num_heads

        def make(out):
            return cc.alibi_slopes(num_heads, max_bias=max_bias, out=out)

        expect_close(written(world, rng, num_heads, make), slopes)

    def test_both_published_rules(self, world, rng):
        for num_heads in {*rng.integers(1, 300, 4).tolist(), 3, 112, 128}:
            for max_bias in (8.0, 16, float(rng.uniform(1e-3, 126)), 126):
                paper = oracle.alibi_slopes(num_heads, max_bias)
                mpt = oracle.mpt_slopes(num_heads, max_bias)
                np.testing.assert_allclose(mpt, paper, rtol=1e-12)

                def make(out, num_heads=num_heads, max_bias=max_bias):
                    return cc.alibi_slopes(num_heads, max_bias=max_bias, out=out)

                expect_close(written(world, rng, num_heads, make), paper)

    def test_ranks_share_the_whole_models_slopes(self, world, rng):
        """71 heads per rank: shares start and end on either side of the largest power of two."""
        whole = written(world, rng, 213, lambda out: cc.alibi_slopes(213, out=out))
        expect_close(whole, oracle.alibi_slopes(213))
        for rank in range(3):

            def make(out, rank=rank):
                return cc.alibi_slopes(213, tp_rank=rank, tp_size=3, out=out)

            part = written(world, rng, 71, make)
            np.testing.assert_array_equal(part, whole[71 * rank : 71 * (rank + 1)])

    def test_very_many_heads(self, world, rng):
        num_heads = attention.MAX_HEADS if world.name != "emulated" else 300_001
        found = written(world, rng, num_heads, lambda out: cc.alibi_slopes(num_heads, out=out))
        expect_close(found, oracle.alibi_slopes(num_heads))

    @pytest.mark.parametrize(
        "arguments, words",
        [
            ({"num_heads": 0}, ("num_heads", "positive", "0")),
            ({"num_heads": -8}, ("num_heads", "-8")),
            ({"num_heads": 8.0}, ("num_heads", "8.0")),
            ({"num_heads": True}, ("num_heads", "True")),
            ({"num_heads": 2**20 + 1}, ("num_heads", "1048576", "1048577")),
            ({"max_bias": 0}, ("max_bias", "0")),
            ({"max_bias": -8.0}, ("max_bias", "-8.0")),
            ({"max_bias": 126.5}, ("max_bias", "126")),
            ({"max_bias": float("nan")}, ("max_bias", "nan")),
            ({"max_bias": "8"}, ("max_bias", "'8'")),
            ({"tp_size": 5}, ("tp_size", "divisor", "12", "5")),
            ({"tp_size": 0}, ("tp_size", "positive")),
            ({"tp_rank": 2, "tp_size": 2}, ("tp_rank", "0..1", "2")),
            ({"tp_rank": -1}, ("tp_rank", "-1")),
            ({"tp_rank": 0.0}, ("tp_rank", "0.0")),
            ({"framework": "jax"}, ("framework", "'jax'")),
            ({"framework": "numpy", "device": "cuda:9999"}, ("device", "cuda:9999")),
            ({"framework": "cupy", "device": "cpu"}, ("device", "GPU", "cpu")),
            ({"device": "tpu"}, ("device", "'tpu'")),
            ({"device": -1}, ("device", "-1")),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, words):
        arguments = {"num_heads": 12, **arguments}
        with pytest.raises(cc.ArgumentError) as caught:
            cc.alibi_slopes(**arguments)
        for word in ("alibi_slopes", *words):
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        "out, error, words",
        [
            (lambda rng: worlds.array(rng, (7,), "float32"), cc.ShapeError, ("[8]", "[7]")),
            (lambda rng: worlds.array(rng, (8, 1), "float32"), cc.ShapeError, ("2 dimensions",)),
            (lambda rng: worlds.array(rng, (8,), "float16"), cc.DTypeError, ("float32", "float16")),
            (
                lambda rng: worlds.Buffer(64, rng).view((8,), "float32", strides=(0,)),
                cc.StrideError,
                ("share",),
            ),
        ],
    )
    def test_a_wrong_out_is_refused(self, world, rng, out, error, words):
        spec = out(rng)
        put = world.put(spec)
        with pytest.raises(error) as caught:
            cc.alibi_slopes(8, out=put)
        for word in ("alibi_slopes", "out", *words):
            assert word in str(caught.value)
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    def test_out_decides_framework_and_device(self):
        out = np.zeros(8, np.float32)
        for extra in ({"framework": "numpy"}, {"device": "cpu"}):
            with pytest.raises(cc.ArgumentError, match=r"(framework|device): .*out"):
                cc.alibi_slopes(8, out=out, **extra)
        assert not out.any()


class TestPlaceSlopes:
    @pytest.mark.parametrize("count", (0, 1, 5, 1016, 1017, 3000))
    def test_values_arrive_rounded_to_float32(self, world, rng, count):
        """1016 is what one launch's parameters hold."""
        values = rng.standard_normal(count) * 10.0 ** rng.integers(-50, 38, count)
        found = written(world, rng, count, lambda out: cc.place_slopes(values.tolist(), out=out))
        np.testing.assert_array_equal(found, values.astype(np.float32))

    def test_bits_travel_unchanged(self, world, rng):
        values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-130)], np.float32)
        found = written(world, rng, 7, lambda out: cc.place_slopes(values, out=out))
        np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32))

    @pytest.mark.parametrize(
        "slopes, words",
        [
            ([[1.0, 2.0]], ("[n]", "[1, 2]")),
            (1.0, ("[n]", "[]")),
            (["x"], ("numbers",)),
            (None, ("numbers",)),
            ([1.0, -1e39], ("float32", "-1e+39")),
            (np.zeros(2**20 + 1), ("1048576", "1048577")),
        ],
    )
    def test_bad_values_are_refused(self, slopes, words):
        with pytest.raises(cc.ArgumentError) as caught:
            cc.place_slopes(slopes)
        for word in ("place_slopes", "slopes", *words):
            assert word in str(caught.value)

    def test_remembered_by_value(self):
        first = cc.place_slopes([0.5, 0.1], device="cpu")
        assert cc.place_slopes((0.5, 0.1), device="cpu") is first
        assert cc.place_slopes(np.array([0.5, 0.1], np.float32), device="cpu") is first
        assert cc.place_slopes([0.1, 0.5], device="cpu") is not first
        np.testing.assert_array_equal(first, np.array([0.5, 0.1], np.float32))

    def test_the_callers_own_array_stays_theirs(self):
        values = np.ones(3, np.float32)
        first = cc.place_slopes(values, device="cpu")
        values[:] = 2
        np.testing.assert_array_equal(first, [1, 1, 1])
        np.testing.assert_array_equal(cc.place_slopes(values, device="cpu"), [2, 2, 2])


class TestWhoseArray:
    def test_numpy_where_there_is_no_gpu(self, monkeypatch):
        monkeypatch.setattr(driver.active, "device_count", lambda: 0, raising=False)
        assert type(cc.alibi_slopes(8)) is np.ndarray

    def test_numpy_without_cupy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cupy", None)
        assert type(cc.alibi_slopes(8)) is np.ndarray
        with pytest.raises(cc.MissingDependencyError, match="CuPy"):
            cc.alibi_slopes(8, device=0)

    def test_no_such_gpu(self, monkeypatch):
        for count, word in ((0, "no CUDA GPU"), (2, "below 2")):
            monkeypatch.setattr(driver.active, "device_count", lambda n=count: n, raising=False)
            with pytest.raises(cc.DeviceError, match=word):
                cc.alibi_slopes(8, device="cuda:2")

    def test_torch(self):
        torch = pytest.importorskip("torch")
        for arguments in (
            {"device": torch.device("cpu")},
            {"framework": "torch", "device": "cpu"},
        ):
            slopes = cc.alibi_slopes(12, **arguments)
            assert slopes.dtype == torch.float32 and slopes.device.type == "cpu"
            expect_close(slopes.numpy(), oracle.alibi_slopes(12))

    def test_torch_is_not_imported_for_the_user(self):
        code = (
            "import sys, cupy_cache as cc\n"
            "try: cc.alibi_slopes(8, framework='torch')\n"
            "except cc.MissingDependencyError as error: assert 'import torch' in str(error)\n"
            "else: raise SystemExit('not refused')\n"
            "assert 'torch' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestRemembering:
    def test_on_the_cpu(self):
        first = cc.alibi_slopes(40, device="cpu")
        assert cc.alibi_slopes(40, device="cpu") is first
        assert cc.alibi_slopes(40, max_bias=8, tp_rank=0, tp_size=1, framework="numpy") is first
        for other in ({"max_bias": 4}, {"tp_size": 2}, {"tp_size": 2, "tp_rank": 1}):
            assert cc.alibi_slopes(40, device="cpu", **other) is not first
        assert cc.alibi_slopes(41, device="cpu") is not first
        with pytest.raises(ValueError, match="read-only"):
            first[0] = 1

    def test_is_bounded(self, monkeypatch):
        monkeypatch.setattr(attention, "MAX_REMEMBERED", 3)
        for num_heads in range(1, 9):
            cc.alibi_slopes(num_heads, device="cpu")
        assert len(attention._remembered) == 3
        slopes = cc.alibi_slopes(8, device="cpu")  # still right, only made anew
        expect_close(slopes, oracle.alibi_slopes(8))


class Event:
    """`driver.Event` under a test's control."""

    def __init__(self, stream):
        self.stream, self.is_done, self.held = stream, False, []

    def done(self):
        return self.is_done

    def hold(self, stream):
        self.held.append(stream)


@pytest.mark.parametrize(
    "make", [functools.partial(cc.alibi_slopes, 3), functools.partial(cc.place_slopes, [1, 2, 3])]
)
def test_remembered_from_inference_mode(make):
    """Autograd refuses what torch made there, also later on."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        first = make(framework="torch", device="cpu")
    weight = torch.ones(3, requires_grad=True)
    again = make(framework="torch", device="cpu")
    (weight * again).sum().backward()
    assert again is first and torch.equal(weight.grad, first)


@pytest.mark.whole
@pytest.mark.parametrize("change", ["written", "loaded", "with a gradient"])
@pytest.mark.parametrize(
    "make", [functools.partial(cc.alibi_slopes, 3), functools.partial(cc.place_slopes, [1, 2, 3])]
)
def test_what_a_caller_changed_is_not_returned_again(make, change, monkeypatch):
    """A model multiplies them, or loads others into its buffer."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(attention, "_remembered", {})
    first = make(framework="torch", device="cpu")
    expected = first.clone()
    if change == "loaded":
        module = torch.nn.Module()
        module.register_buffer("slopes", first)
        module.load_state_dict({"slopes": torch.zeros(3)})
    elif change == "written":
        first.mul_(0.5)
    else:
        first.requires_grad_()
    again = make(framework="torch", device="cpu")
    assert again is not first and not again.requires_grad and torch.equal(again, expected)
    assert make(framework="torch", device="cpu") is again
    # The first one's memory may still be read on some stream.
    assert any(known.array is first for known in attention._remembered.values())


@pytest.fixture
def gpu(emulated_world):
    """The emulated device, with streams that a test controls. ``slopes(**more)`` asks for them on
    it; `launches` holds the streams of the launches so far."""
    world = emulated_world()

    class Driver(type(world.driver)):
        def __init__(self):
            super().__init__()
            self.is_capturing, self.launches, self.events = False, [], []

        def capturing(self, stream, device):
            return self.is_capturing

        def event(self, stream, device):
            assert not self.is_capturing, "a captured stream has no events"
            self.events.append(Event(stream))
            return self.events[-1]

        def order(self, before, after, device):
            if before != after and not self.is_capturing:
                self.event(before, device).hold(after)

        def launch(self, loaded, grid, threads, stream, record):
            self.launches.append(stream)
            super().launch(loaded, grid, threads, stream, record)

        @staticmethod
        def slopes(**more):
            return cc.alibi_slopes(12, framework="emulated", **more)

    driver.active = Driver()  # until the world is closed
    yield driver.active
    world.close()


class TestStreams:
    """An array may be used on another stream than the one it was made on."""

    def test_made_once(self, gpu):
        first = gpu.slopes()
        expect_close(first.numpy(), oracle.alibi_slopes(12))
        assert gpu.slopes() is first
        assert gpu.slopes(device=0) is first and gpu.slopes(device="cuda:0") is first
        assert gpu.launches == [0]

    def test_another_stream_waits_until_the_array_is_there(self, gpu):
        first = gpu.slopes()
        (event,) = gpu.events
        assert event.stream == 0
        assert gpu.slopes(stream=5) is first
        assert event.held == [5]
        event.is_done = True
        assert gpu.slopes(stream=6) is first
        event.done = None  # known by now: nobody asks again
        assert gpu.slopes(stream=7) is first
        assert event.held == [5] and gpu.launches == [0]

    def test_a_stream_other_than_the_allocating_one_waits_for_it(self, gpu):
        gpu.slopes(stream=9)
        before, after = gpu.events
        assert (before.stream, before.held) == (0, [9])
        assert (after.stream, after.held) == (9, [])
        assert gpu.launches == [9]

    def test_captured_results_are_not_remembered(self, gpu):
        gpu.is_capturing = True
        first, second = gpu.slopes(), gpu.slopes()
        assert first is not second and gpu.launches == [0, 0]
        gpu.is_capturing = False
        third = gpu.slopes()
        assert third is not first and third is not second

    def test_what_is_known_to_be_there_serves_a_capture(self, gpu):
        first = gpu.slopes()
        gpu.is_capturing = True
        assert gpu.slopes() is not first  # for all that is known its kernel may still be running
        gpu.is_capturing = False
        gpu.events[0].is_done = True
        assert gpu.slopes() is first
        gpu.is_capturing = True
        assert gpu.slopes() is first
        assert len(gpu.launches) == 2

    def test_an_array_of_the_callers_is_always_written(self, gpu):
        out = gpu.slopes()
        for _ in range(2):
            assert cc.alibi_slopes(12, out=out, max_bias=4.0, stream=3) is out
        assert gpu.launches == [0, 3, 3]
        expect_close(out.numpy(), oracle.alibi_slopes(12, 4.0))
        assert len(attention._remembered) == 1

    def test_placed_values_too(self, gpu):
        values = [1.5, -2.0, 0.1]
        first = cc.place_slopes(values, framework="emulated")
        assert cc.place_slopes(values, framework="emulated", stream=4) is first
        np.testing.assert_array_equal(first.numpy(), np.array(values, np.float32))
        assert gpu.launches == [0] and gpu.events[0].held == [4]


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ("cupy", "torch"))
class TestOnAGpu:
    def start(self, framework):
        module = pytest.importorskip(framework)
        cc.alibi_slopes(20, max_bias=3.0, framework=framework)  # loads the kernels
        cc.place_slopes([0.25], framework=framework)
        return module

    def test_kind_and_device(self, framework):
        module = self.start(framework)
        for device in (None, 0, "cuda", "cuda:0"):
            slopes = cc.alibi_slopes(40, framework=framework, device=device)
            assert isinstance(slopes, module.Tensor if framework == "torch" else module.ndarray)
            assert slopes.dtype == module.float32
            assert cc.alibi_slopes(40, framework=framework, device=device) is slopes
            host = slopes.cpu().numpy() if framework == "torch" else slopes.get()
            expect_close(host, oracle.alibi_slopes(40))
        if framework == "torch":
            assert cc.alibi_slopes(40, device=module.device("cuda")) is slopes
        else:
            assert cc.alibi_slopes(40) is slopes
            assert cc.alibi_slopes(40, device=module.cuda.Device(0)) is slopes

    def test_captured_into_a_graph(self, framework):
        module = self.start(framework)
        values = [0.5, 0.75]
        if framework == "torch":
            graph = module.cuda.CUDAGraph()
            with module.cuda.graph(graph):
                computed = cc.alibi_slopes(12, framework="torch") * 1
                placed = cc.place_slopes(values, framework="torch") * 1
            graph.replay()
            module.cuda.synchronize()
            computed, placed = computed.cpu().numpy(), placed.cpu().numpy()
        else:
            stream = module.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture()
                computed = cc.alibi_slopes(12)
                placed = cc.place_slopes(values)
                graph = stream.end_capture()
                graph.launch(stream)
            stream.synchronize()
            computed, placed = computed.get(), placed.get()
        expect_close(computed, oracle.alibi_slopes(12))
        np.testing.assert_array_equal(placed, values)
        assert not any("alibi_slopes" in key and 12 in key[3] for key in attention._remembered)

    def test_used_at_once_on_another_stream(self, framework):
        """The first stream is busy for a while; the second must wait for what that one makes."""
        module = self.start(framework)
        if framework == "torch":
            first, second = module.cuda.Stream(), module.cuda.Stream()
            with module.cuda.stream(first):
                module.cuda._sleep(200_000_000)
                cc.alibi_slopes(96, framework="torch")
            with module.cuda.stream(second):
                seen = cc.alibi_slopes(96, framework="torch").clone()
            second.synchronize()
            seen = seen.cpu().numpy()
        else:
            first, second = (module.cuda.Stream(non_blocking=True) for _ in range(2))
            busy = module.RawKernel(
                'extern "C" __global__ void busy() '
                "{ long long t = clock64(); while (clock64() - t < 200000000) {} }",
                "busy",
            )
            with first:
                busy((1,), (1,), ())
                cc.alibi_slopes(96)
            with second:
                seen = cc.alibi_slopes(96).copy()
            second.synchronize()
            seen = seen.get()
        expect_close(seen, oracle.alibi_slopes(96))

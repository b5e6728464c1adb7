# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m cupy_cache``, or ``cupy-cache`` once installed.

Exit codes: 0 all is well, 1 the demo found a difference, 2 the command could not be run as given,
or its output not be written, 3 it failed in a way that nobody foresaw, 130 it was interrupted,
141 the reader of the output has gone.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from .. import errors
from .._version import __version__
from ..compilation import warmup
from ..errors import CupyCacheError, FaultError, KernelError, MissingDependencyError
from ..runtime import cuda, formats
from . import bench, clearing, demo, info

PROMPT = 400  # bytes of the input that the demo reads, at most


class CannotRun(Exception):
    """The command cannot be run as given; the text says why."""


def main(argv=None):
    """Run the command line ``argv`` (by default the process's); returns the exit code."""
    parser, leaving = _parser(), None
    with _any_text(sys.stdout):
        try:
            try:
                status = _run(parser.parse_args(argv), parser.prog)
            except SystemExit as error:  # argparse has said all
                leaving = error
            _flush(sys.stdout)
        except BrokenPipeError:  # as `| head -1` does: nothing is wrong, and nobody listens
            _silence(sys.stdout)
            return READER_GONE
        except OSError as error:
            _silence(sys.stdout)
            _complain(f"{parser.prog}: error: cannot write the output: {error.strerror or error}")
            return CANNOT_RUN
        finally:
            try:
                _flush(sys.stderr)
            except OSError:
                _silence(sys.stderr)
        if leaving is not None:
            raise leaving
        return status


CANNOT_RUN, FAILED, INTERRUPTED, READER_GONE = 2, 3, 130, 141


def _run(args, name):
    """The exit code of a command. Errors of writing the output are raised."""
    try:
        return args.command(args)
    except (CannotRun, MissingDependencyError, KernelError) as error:
        _complain(f"{name}: error: {error}")
        return CANNOT_RUN
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted")
        return INTERRUPTED
    except OSError:  # of files that are read, `CannotRun` tells
        raise
    except Exception:
        _complain(traceback.format_exc().rstrip())
        return FAILED


@contextlib.contextmanager
def _any_text(stream):
    """Where this is entered, the stream shows what it cannot encode as escapes."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None:
        yield
        return
    before = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # flushes, which may not work any more
            reconfigure(errors=before)


def _flush(stream):
    if stream is not None:
        stream.flush()


def _silence(stream):
    """Have what is left of an output go nowhere: Python would complain of it at the end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _complain(text):
    """Print to standard error, if there is one that takes it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message, file=None):
        """Python's own may not tell where the output cannot be written, and fail where there is no
        standard error."""
        if file is not None and file is sys.stdout:
            file.write(message)
        elif sys.stderr is not None:
            with contextlib.suppress(OSError):
                sys.stderr.write(message)


def _parser():
    parser = _Parser(
        prog="cupy-cache",
        description="Paged key/value cache operations for any framework's arrays.",
        epilog="exit codes: 0 all is well; 1 a difference was found; 2 the command cannot be run, "
        "or its output not be written; 3 it failed; 130 it was interrupted; 141 the reader of the "
        "output has gone",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_info, _add_demo, _add_warmup, _add_bench, _add_clear_cache):
        add(commands)
    return parser


# --- info -----------------------------------------------------------------------------------------


def _add_info(commands):
    parser = commands.add_parser(
        "info",
        help="what is installed, what the GPU operations need, and what is missing",
        description="Print versions, devices, where NVRTC and the CUDA headers are, the kernel "
        "cache, the environment variables, and what is missing with the command that brings it.",
    )
    _add_json(parser)
    parser.set_defaults(command=_info)


def _add_json(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _info(args):
    if args.json:
        print(json.dumps(info.collect(), indent=2))
    else:
        print(info.as_text(info.collect()))
    return 0


# --- demo -----------------------------------------------------------------------------------------


def _add_demo(commands):
    parser = commands.add_parser(
        "demo",
        help="decode a text with a small model in a paged cache, and compare with a dense cache",
        description="A small ALiBi decoder with random weights reads the first bytes of FILE and "
        "continues them, greedily and by beam search. Its keys and values live in a paged cache: "
        "written, forked, swapped out to host memory and back, attended to, gathered. Every step "
        "is compared with the same model on a dense cache: keys and values bit for bit, logits "
        f"within {demo.TOLERANCE['float16']:g} ({demo.TOLERANCE['float32']:g} in float32, "
        f"{demo.TOLERANCE['bfloat16']:g} in bfloat16), and the tokens chosen. Exits with 1 at the "
        "first difference.",
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE",
        help=f"what to read, up to {PROMPT} bytes (default: this library's README)",
    )  # fmt: skip
    for option, kind, default, meaning in (
        ("--backend", ("auto", "numpy", "cupy"), "auto", "auto is CuPy where there is a GPU"),
        ("--tokens", _positive, 32, "how many to decode each time"),
        ("--beams", _positive, 4, "width of the beam search"),
        ("--layers", _positive, 3, "layers of the model"),
        ("--seed", _natural, 0, "of the model's random weights"),
        ("--block-size", _positive, 16, "slots of a cache block"),
        ("--layout", ("NHD", "HND"), "NHD", "memory order of the cache"),
        ("--dtype", tuple(demo.DTYPES), "float16", "of the cache's elements"),
    ):
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
        parser.add_argument(option, default=default, help=f"{meaning} (default: {default})", **how)
    parser.set_defaults(command=_demo)


def _whole(text):
    try:
        return int(text)
    except ValueError:
        got = errors.shown(text)
        raise argparse.ArgumentTypeError(f"expected a whole number, got {got}") from None


def _natural(text):
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def _positive(text):
    value = _whole(text)
    if not 1 <= value < 2**31:
        expected = "1 or more" if value < 1 else "a number below 2**31"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {value}")
    return value


def _demo(args):
    name, prompt = _prompt(args.file)
    xp, device = _machine(args.backend)
    print(f"cupy_cache {__version__}, backend {xp.__name__} on {device}")
    print(
        f"model: {errors.counted(args.layers, 'layer')}, {demo.QUERY_HEADS} query heads, "
        f"{demo.KV_HEADS} key/value heads of {demo.HEAD_SIZE}, seed {args.seed}\n"
        f"cache: blocks of {args.block_size}, {args.dtype}, {args.layout}\n"
        f"prompt: {errors.counted(len(prompt), 'byte')} of {name}",
        flush=True,
    )
    totals = {"prompt": len(prompt), "greedy": args.tokens, "beam search": args.tokens}
    try:
        with Progress(totals, sys.stderr) as progress:
            run, greedy, beams, preempted, elsewhere = demo.demo(
                xp, prompt, args.tokens, args.beams, args.layers, args.seed, args.block_size,
                args.layout, args.dtype, progress,
            )  # fmt: skip
    except (demo.Difference, FaultError) as difference:
        _complain(f"DIFFERENCE: {difference}")
        return 1
    except MemoryError as error:
        if isinstance(error, CupyCacheError):  # of blocks, of which there are enough
            raise
        raise CannotRun(f"too little memory for these sizes: {cuda.named(error)}") from error
    print(f"greedy: {bytes(greedy.tokens)!r}")
    for beam in beams:
        print(f"beam, log probability {beam.score:.2f}: {bytes(beam.tokens)!r}")
    rates = (f"{phase} {statistics.median(rates):,.0f}" for phase, rates in run.rates.items())
    print(f"tokens per second, median of the steps: {', '.join(rates)}")
    swapped = errors.counted(preempted, "block")
    print(f"swapped out and in: {swapped}, {elsewhere} of them into other places")
    print(f"{'operation':<24}{'calls':>8}{'bytes moved':>16}   (comparing included)")
    for operation, moved in run.paged.moved.items():
        print(f"{operation:<24}{run.paged.calls[operation]:>8,}{moved:>16,}")
    print(
        f"OK: {run.steps} steps as with a dense cache: {run.compared:,} elements read back bit for "
        f"bit, logits within {run.worst:.1g}"
    )
    return 0


def _prompt(path):
    """(Name, first bytes) of the file at ``path``, or of the README."""
    if path is None:
        package = Path(__file__).resolve().parent.parent
        readme = package.parent / "README.md"
        if (package.parent / "kernels_cu").is_dir() and readme.is_file():
            path = readme  # a checkout: elsewhere a README beside the package would be another's
    if path is not None:
        try:
            with open(path, "rb") as file:
                prompt = file.read(PROMPT)
        except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
            why = getattr(error, "strerror", None) or error
            raise CannotRun(f"cannot read {path}: {why}") from error
        if not prompt:
            raise CannotRun(f"cannot decode {path}: it is empty, and the model needs a first byte")
        return str(path), prompt
    try:
        text = importlib.metadata.metadata("cupy-cache").get("Description")
    except importlib.metadata.PackageNotFoundError:
        text = None
    if not text:
        raise CannotRun("there is no README beside the package or in its metadata: name a FILE")
    return "the README in the package's metadata", text.encode()[:PROMPT]


def _machine(backend):
    """(Array module, the device in words) for ``backend``: auto, numpy or cupy."""
    cpu = f"CPU ({os.cpu_count()} cores)"
    if backend == "numpy":
        return np, cpu
    try:
        import cupy

        problem = None if cupy.cuda.is_available() else "CuPy sees no CUDA GPU"
    except Exception as error:  # a broken installation raises whatever it likes
        problem = f"CuPy cannot be imported: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            problem = "CuPy is not installed"
    if problem is None:
        index = cupy.cuda.runtime.getDevice()
        gpu = cupy.cuda.runtime.getDeviceProperties(index)
        return cupy, f"cuda:{index}, {gpu['name'].decode()} (sm_{gpu['major']}{gpu['minor']})"
    if backend == "cupy":
        raise CannotRun(f"{problem}; `python -m cupy_cache info` says what is missing")
    return np, f"{cpu}; {problem}"


# --- warmup, bench, clear-cache -------------------------------------------------------------------


def _add_warmup(commands):
    parser = commands.add_parser(
        "warmup",
        help="compile the kernels of a model, so that no call compiles later",
        description="Compile and load every kernel that a model's shape needs, in parallel. They "
        "stay in CuPy's kernel cache, where every process of this user finds them.",
    )
    for option, required, meaning in (
        ("--num-kv-heads", True, "key/value heads on this GPU"),
        ("--head-size", True, "elements of a head's key"),
        ("--head-size-v", False, "of a head's value, where it differs"),
        ("--num-heads", False, "query heads on this GPU (default: as many as of keys)"),
    ):
        parser.add_argument(option, type=_positive, metavar="N", required=required, help=meaning)
    parser.add_argument(
        "--block-size", type=_positive, default=16, metavar="N",
        help="slots of a cache block (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="bfloat16", help="of keys and values (default: bfloat16)"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="DTYPE", help="fp8, int8, … (default: auto)"
    )
    parser.add_argument(
        "--layout", action="append", choices=tuple(formats.LAYOUTS), dest="layouts",
        help="of the caches; may be given several times (default: NHD)",
    )  # fmt: skip
    parser.add_argument(
        "--op", action="append", metavar="NAME", dest="ops",
        help="only this operation; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument("--alibi", action="store_true", help="attention has ALiBi slopes")
    parser.add_argument("--soft-cap", action="store_true", help="attention's logits are capped")
    parser.add_argument("--device", type=_natural, metavar="N", help="the GPU (default: 0)")
    _add_json(parser)
    parser.set_defaults(command=_warmup)


def _warmup(args):
    started = time.monotonic()
    try:
        kernels = warmup(
            args.num_kv_heads, args.head_size, args.block_size, args.dtype,
            layouts=args.layouts or ["NHD"], head_size_v=args.head_size_v,
            kv_cache_dtype=args.kv_cache_dtype, device=args.device, num_heads=args.num_heads,
            alibi=args.alibi, soft_cap=args.soft_cap, ops=args.ops,
        )  # fmt: skip
    except CupyCacheError as error:
        raise CannotRun(str(error)) from error
    seconds, folder = time.monotonic() - started, cuda.cache_folder()
    if args.json:
        print(json.dumps({"kernels": kernels, "seconds": seconds, "kernel_cache": folder}))
    else:
        ready = errors.counted(kernels, "kernel is ready", "kernels are ready")
        print(f"{ready}, in {seconds:.1f} s; kept in {folder}")
    return 0


def _add_bench(commands):
    parser = commands.add_parser(
        "bench",
        help="measure the main operations on this machine, beside a copy of as many bytes",
        description="Measure the main operations, in float16, with 8 key/value heads of 128 and "
        "blocks of 16, each beside a copy that reads and writes as many bytes. Takes less than a "
        "minute.",
    )
    parser.add_argument(
        "--backend", choices=("auto", "numpy", "cupy"), default="auto",
        help="auto is CuPy where there is a GPU (default: auto)",
    )  # fmt: skip
    _add_json(parser)
    parser.set_defaults(command=_bench)


def _bench(args):
    xp, device = _machine(args.backend)
    rows = []
    if args.json:

        def told(row):
            rows.append(row)
            _complain(row["case"])
    else:
        told = _print_row
        print(f"cupy_cache {__version__}, backend {xp.__name__} on {device}; microseconds\n")
        print(f"{'':32}{'MB moved':>10}{'ours':>10}{'copy':>10}{'of copy':>9}{'host':>8}")
    bench.measure(xp is not np, told)
    if xp is not np and not args.json:
        print("\nhost: to enqueue a call with CuPy's arrays; torch's take a shorter way")
    if args.json:
        facts = {"cupy_cache": __version__, "backend": xp.__name__, "device": device}
        print(json.dumps({**facts, "rows": rows}, indent=2))
    return 0


def _print_row(row):
    def shown(value):
        return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"

    moved, us, copy = row["bytes"] / 1e6, row["us"], row["copy_us"]
    share = "" if copy is None else f"{copy / us:.0%}"
    print(
        f"{row['case']:<32}{shown(moved or None):>10}{shown(us):>10}{shown(copy):>10}{share:>9}"
        f"{shown(row['host_us']):>8}",
        flush=True,
    )


def _add_clear_cache(commands):
    parser = commands.add_parser(
        "clear-cache",
        help="delete this library's compiled kernels from CuPy's kernel cache",
        description="Delete the compiled kernels of this library from CuPy's kernel cache "
        "(CUPY_CACHE_DIR). Those of other programs stay. They are compiled again when needed.",
    )
    parser.set_defaults(command=_clear_cache)


def _clear_cache(args):
    folder = cuda.cache_folder()
    try:
        count, size, others = clearing.clear(folder)
    except OSError as error:
        raise CannotRun(f"cannot clear {error.filename or folder}: {error.strerror}") from error
    deleted, kept = (
        errors.counted(count, "kernel"),
        errors.counted(others, "file stays", "files stay"),
    )
    print(f"deleted {deleted}, {size / 2**20:.1f} MiB, of {folder}; {kept}")
    return 0


class Progress:
    """How far the demo is: on a terminal one updated line, elsewhere a line now and then."""

    WIDTH, SECONDS = 24, 5.0

    def __init__(self, totals, stream):
        self.totals, self.stream = totals, stream  # None: there is no stream
        self.done = dict.fromkeys(totals, 0)
        self.terminal = stream is not None and stream.isatty()
        self.last = time.monotonic()

    def __call__(self, phase, tokens):
        self.done[phase] += tokens
        done, total = self.done[phase], self.totals[phase]
        text = f"{phase}: {done} of {errors.counted(total, 'token')}"
        if self.terminal:
            part = sum(self.done.values()) / sum(self.totals.values())
            bar = "#" * int(self.WIDTH * part)
            self._write(f"\r[{bar:<{self.WIDTH}}] {part:4.0%} {text}\x1b[K")
        elif done == total or time.monotonic() - self.last > self.SECONDS:
            self.last = time.monotonic()
            self._write(f"{text}\n")

    def _write(self, text):
        if self.stream is not None:
            with contextlib.suppress(OSError):  # nobody to tell is no reason to stop
                self.stream.write(text)
                self.stream.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.terminal:  # leave no half line behind
            self._write("\r\x1b[K")

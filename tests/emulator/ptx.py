# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The inline PTX of the kernels: every text there is, what it does (a function of ``ptx.h``), and
the machine instruction that it is for. Any other text is refused: what an instruction does can be
changed by a letter, and nothing but a GPU would show it.

tests/test_ptx.py compares the machine instructions with what NVRTC makes of the texts.
"""

import functools
import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """``function``: its name in ``ptx.h``. ``constraints``: of its operands. ``machine``: what must
    be in the machine code for sm_90, as a regular expression. ``stays``: it is volatile; the
    compiler leaves it where it stands, whatever it thinks of its result. ``only``: the one compute
    capability that has it."""

    function: str
    constraints: str
    machine: str
    stays: bool = False
    clobbers: str = ""
    only: int | None = None


# A load or store with a policy has it in a pair of uniform registers, to which it was moved.
_POLICY = r"R2UR UR4, .* R2UR UR5, .* {} desc\[UR4\]"


def _load(function, suffix, to, constraints, machine):
    count = constraints.count("=")
    text = f"ld.global.L2::cache_hint.{suffix} {to}, [%{count}], %{count + 1};"
    return text, Instruction(function, constraints, _POLICY.format(machine + r" R\d+,"), stays=True)


def _store(function, suffix, value, constraints, machine):
    policy = constraints.count(" ") - 1
    text = (
        f"{{ .reg .pred when; setp.ne.u32 when, %{policy + 1}, 0; "
        f"@when st.global.L2::cache_hint.{suffix} [%0], {value}, %{policy}; }}"
    )
    return text, Instruction(
        function, constraints, _POLICY.format(machine), stays=True, clobbers='"memory"'
    )


def _warpgroup_product(columns, kind, machine):
    sums = columns // 2
    registers = ", ".join(f"%{number}" for number in range(sums))
    text = (
        "{ .reg .pred adds; setp.eq.u32 adds, 0, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{registers}}}, "
        f"%{sums}, %{sums + 1}, adds, 1, 1, %{sums + 2}, 0; }}"
    )
    machine = rf"HGMMA\.64x{columns}x16{machine} R\d+, gdesc\[UR\d+\]\.tnspA, R\d+"
    constraints = " ".join(["+f"] * sums + ["l", "l", "n"])
    return text, Instruction(f"wgmma_{kind}<{columns}>", constraints, machine, stays=True, only=90)


INSTRUCTIONS = {
    "ld.global.s64 %0, [%1];": Instruction("ld_s64", "=l l", r"LDG\.E\.64 R\d+, desc", stays=True),
    "mov.s64 %0, %1;": Instruction("mov_s64", "=l l", r"LDG\.E\.64 .* STG\.E\.64", stays=True),
    "ld.global.s32 %0, [%1];": Instruction("ld_s32", "=r l", r"LDG\.E R\d+, desc", stays=True),
    **dict(
        (
            _load("ld_v4_u32", "v4.u32", "{%0, %1, %2, %3}", "=r =r =r =r l l", r"LDG\.E\.128"),
            _load("ld_v2_u32", "v2.u32", "{%0, %1}", "=r =r l l", r"LDG\.E\.64"),
            _load("ld_u32", "u32", "%0", "=r l l", r"LDG\.E"),
            _load("ld_u16", "u16", "%0", "=h l l", r"LDG\.E\.U16"),
            _load("ld_u8", "u8", "%0", "=h l l", r"LDG\.E\.U8"),
            _store("st_v4_u32", "v4.u32", "{%1, %2, %3, %4}", "l r r r r l r", r"STG\.E\.128"),
            _store("st_v2_u32", "v2.u32", "{%1, %2}", "l r r l r", r"STG\.E\.64"),
            _store("st_u32", "u32", "%1", "l r l r", r"STG\.E"),
            _store("st_u16", "u16", "%1", "l h l r", r"STG\.E\.U16"),
            _store("st_u8", "u8", "%1", "l h l r", r"STG\.E\.U8"),
        )
    ),
    "cvt.f32.f16 %0, %1;": Instruction(
        "cvt_f32_f16", "=f h", r"HADD2\.F32 R\d+, -RZ, R\d+\.H0_H0 "
    ),
    "cvt.rn.f16.f32 %0, %1;": Instruction(
        "cvt_rn_f16_f32", "=h f", r"F2FP\.F16\.F32\.PACK_AB R\d+, RZ, R\d+ "
    ),
    "cvt.rn.bf16.f32 %0, %1;": Instruction(
        "cvt_rn_bf16_f32", "=h f", r"F2FP\.BF16\.F32\.PACK_AB R\d+, RZ, R\d+ "
    ),
    "cvt.rn.f16x2.e4m3x2 %0, %1;": Instruction(
        "cvt_rn_f16x2_e4m3x2", "=r h", r"F2FP\.F16\.E4M3\.UNPACK_B R"
    ),
    "{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high;}": Instruction(
        "cvt_rn_f16x2_e4m3x2_high",
        "=r r",
        r"LDG\.E\.U16 R2, \S+\+0x2\] .* F2FP\.F16\.E4M3\.UNPACK_B R",
    ),
    "cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;": Instruction(
        "cvt_rn_satfinite_e5m2x2_f32", "=h f f", r"F2FP\.SATFINITE\.E5M2\.F32\.PACK_AB_MERGE_C R"
    ),
    "cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;": Instruction(
        "cvt_rn_satfinite_e4m3x2_f32", "=h f f", r"F2FP\.SATFINITE\.E4M3\.F32\.PACK_AB_MERGE_C R"
    ),
    "cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;": Instruction(
        "cvt_pack_sat_s8_s32_b32", "=r r r", r"I2IP\.S8\.S32\.SAT R\d+, R\d+, R\d+, RZ "
    ),
    "div.rn.f32 %0, %1, %2;": Instruction("div_rn_f32", "=f f f", r"FCHK .* FFMA R.* CALL"),
    "mul.rn.f32 %0, %1, %2;": Instruction("mul_rn_f32", "=f f f", r"FMUL R"),
    "add.rn.f32 %0, %1, %2;": Instruction("add_rn_f32", "=f f f", r"FADD R"),
    "sub.rn.f32 %0, %1, %2;": Instruction("sub_rn_f32", "=f f f", r"FADD R\d+, R\d+, -R"),
    "ex2.approx.ftz.f32 %0, %1;": Instruction("ex2", "=f f", r"MUFU\.EX2 R"),
    "sub.rn.f16x2 %0, %1, %2;": Instruction(
        "sub_f16x2", "=r r r", r"HADD2 R\d+, R\d+, -R|HFMA2\.MMA R\d+, R\d+, 1, 1, -R"
    ),
    **{
        f"cp.async.{how}.shared.global{hint} [%0], [%1], {size}, %2;": Instruction(
            f"cp_{size}", "r l r", machine, stays=True, clobbers='"memory"'
        )
        for size, how, hint, machine in (
            (16, "cg", ".L2::128B", r"LDGSTS\.E\.BYPASS\.LTC128B\.128"),
            (8, "ca", "", r"LDGSTS\.E\.\S*64"),
            (4, "ca", "", r"LDGSTS\.E(\.ZFILL)? "),
        )
    },
    "cp.async.commit_group;": Instruction(
        "cp_commit", "", r"LDGDEPBAR", stays=True, clobbers='"memory"'
    ),
    **{
        f"cp.async.wait_group {groups};": Instruction(
            f"cp_wait_{groups}",
            "",
            rf"DEPBAR\.LE SB0, 0x{groups}",
            stays=True,
            clobbers='"memory"',
        )
        for groups in range(4)
    },
    "mbarrier.init.shared::cta.b64 [%0], %1;": Instruction(
        "mbarrier_init", "r r", r"SYNCS\.EXCH\.64", stays=True, clobbers='"memory"'
    ),
    "fence.mbarrier_init.release.cluster;": Instruction(
        "fence_mbarrier_init", "", r"", stays=True, clobbers='"memory"'
    ),
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;": Instruction(
        "mbarrier_arrive", "r r", r"SYNCS\.ARRIVE\.TRANS64", stays=True, clobbers='"memory"'
    ),
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];": (
        Instruction("cp_bulk", "r l r r", r"UBLKCP", stays=True, clobbers='"memory"')
    ),
    "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; "
    "selp.u32 %0, 1, 0, over; }": Instruction(
        "mbarrier_try_wait",
        "=r r r",
        r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
        stays=True,
        clobbers='"memory"',
    ),
    "fence.proxy.async.shared::cta;": Instruction(
        "fence_proxy", "", r"FENCE\.VIEW\.ASYNC", stays=True, clobbers='"memory"'
    ),
    **{
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%0, %1, %2, %3}}, [%4];": Instruction(
            f"ldmatrix_x4{trans.replace('.', '_')}",
            "=r =r =r =r r",
            machine,
            stays=True,
            clobbers='"memory"',
        )
        for trans, machine in (("", r"LDSM\.16\.M88\.4"), (".trans", r"LDSM\.16\.MT88\.4"))
    },
    "movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;": Instruction(
        "movmatrix_trans", "=r r", r"MOVM\.16\.MT88 R", stays=True
    ),
    **{
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%0, %1, %2, %3}}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};": Instruction(
            f"mma_{kind}", "=f =f =f =f r r r r r r f f f f", machine, stays=True
        )
        for kind, machine in (("bf16", r"HMMA\.16816\.F32\.BF16"), ("f16", r"HMMA\.16816\.F32 "))
    },
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
    "{%7, %8, %9, %10};": Instruction(
        "mma_f16_8", "=f =f =f =f r r r f f f f", r"HMMA\.1688\.F32 ", stays=True
    ),
    "wgmma.fence.sync.aligned;": Instruction(
        "nothing", "", r"WARPGROUP\.ARRIVE", stays=True, clobbers='"memory"', only=90
    ),
    "wgmma.commit_group.sync.aligned;": Instruction(
        "nothing", "", r"", stays=True, clobbers='"memory"', only=90
    ),
    "wgmma.wait_group.sync.aligned 0;": Instruction(
        "nothing", "", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", stays=True, clobbers='"memory"', only=90
    ),
    **dict(
        _warpgroup_product(columns, kind, machine)
        for columns in (16, 32)
        for kind, machine in (("bf16", r"\.F32\.BF16"), ("f16", r"\.F32"))
    ),
    "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;": Instruction(
        "cluster_sync", "", r"UCGABAR_ARV .*UCGABAR_WAIT", stays=True, clobbers='"memory"'
    ),
    "barrier.cluster.arrive.relaxed.aligned;": Instruction(
        "nothing", "", r"UCGABAR_ARV", stays=True, clobbers='"memory"'
    ),
    "barrier.cluster.wait.aligned;": Instruction(
        "cluster_sync", "", r"UCGABAR_WAIT", stays=True, clobbers='"memory"'
    ),
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];": (
        Instruction("st_async", "r f f r", r"STAS\.64", stays=True, clobbers='"memory"')
    ),
    "{ .reg .pred over; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], 0; "
    "selp.u32 %0, 1, 0, over; }": Instruction(
        "mbarrier_try_wait",
        "=r r",
        r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
        stays=True,
        clobbers='"memory"',
    ),
    "bar.sync %0, %1;": Instruction(
        "bar_sync", "r r", r"BAR\.SYNC", stays=True, clobbers='"memory"'
    ),
    # Launches are run one after the other here.
    "griddepcontrol.wait;": Instruction(
        "nothing", "", r"ACQBULK ;", stays=True, clobbers='"memory"'
    ),
    "griddepcontrol.launch_dependents;": Instruction(
        "nothing", "", r"PREEXIT ;", stays=True, clobbers='"memory"'
    ),
    "mapa.shared::cluster.u32 %0, %1, %2;": Instruction(
        "mapa", "=r r r", r"PRMT R\d+, R\d+, 0x654, R", stays=True
    ),
    "ld.shared::cluster.v2.f32 {%0, %1}, [%2];": Instruction(
        "ld_cluster", "=f =f r", r"LD\.E\.64|LDS\.64", stays=True, clobbers='"memory"'
    ),
}

_ASM = re.compile(r"\basm\b\s*(?P<volatile>volatile\b)?\s*\(")


class UnknownPTX(Exception):
    """The text of an instruction that is not in the list."""


class Statement(NamedTuple):
    """An ``asm`` statement of a source: its place there, its text, the operands as C++ in the order
    of their numbers, and what else `Instruction` has."""

    start: int
    end: int
    text: str
    operands: tuple
    constraints: str
    stays: bool
    clobbers: str


def statements(source):
    """All `Statement`\\ s of a source."""
    for found in _ASM.finditer(source):
        end, parts = _parts(source, found.end())
        text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', parts[0])).replace("\\n", " ")
        text = " ".join(text.split())
        operands = [item for part in parts[1:3] for item in _split(part, ",") if item.strip()]
        pairs = [re.fullmatch(r'\s*"([^"]+)"\s*\((.*)\)\s*', item, re.S) for item in operands]
        yield Statement(
            found.start(), end, text, tuple(pair[2] for pair in pairs),
            " ".join(pair[1] for pair in pairs), found["volatile"] is not None,
            "".join(parts[3:]).strip(),
        )  # fmt: skip


def _parts(source, start):
    """The parts of an asm statement whose parenthesis opens before ``start``, and its end."""
    depth, at, quoted = 1, start, False
    while depth:
        letter = source[at]
        if letter == '"' and source[at - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (letter == "(") - (letter == ")")
        at += 1
    return source.index(";", at) + 1, _split(source[start : at - 1], ":")


def _split(text, separator):
    """``text`` at the separators that are in no string and no parenthesis."""
    parts, depth, quoted = [""], 0, False
    for letter in text:
        if letter == '"':
            quoted = not quoted
        elif not quoted:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == separator and not quoted and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


@functools.lru_cache(maxsize=64)
def with_calls(source):
    """``source`` with calls of the functions of ``ptx.h`` for its asm statements."""
    made, end = [], 0
    for statement in statements(source):
        instruction = INSTRUCTIONS.get(statement.text)
        for name in ("constraints", "stays", "clobbers"):
            if getattr(instruction, name, None) != getattr(statement, name):
                raise UnknownPTX(f"not in tests/emulator/ptx.py, or other {name}: {statement}")
        lines = source.count("\n", statement.start, statement.end)
        call = f"ptx::{instruction.function}({', '.join(statement.operands)});"
        made += [source[end : statement.start], call, "\n" * lines]
        end = statement.end
    return "".join((*made, source[end:]))

"""What a compiled TPU program moves to and from HBM, counted from its text.

XLA's cost analysis adds up the operands and results of every instruction wherever they lie: a
weight that is prefetched into on-chip memory is counted as read from HBM, written, and read again.
The text says where every array lies (`S(1)` in its layout is on-chip), so that only what is in HBM
can be counted, once an access. Upper bounds stay: an operand counts as a whole, but for gathers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.+?) ([\w\-]+)\(([^)]*)\)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_MOVES_NOTHING = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "copy-done",
    "slice-done",
    "partition-id",
    "iota",
}


class _Array(NamedTuple):
    bytes: int
    in_hbm: bool


def hbm_bytes(hlo: str, layer_bytes: int) -> float:
    """Bytes that the entry computation reads from HBM and writes to it; pages are left out.

    Branches of conditionals count nothing but their result: the sampler's are not taken by greedy
    decoding.

    Args:
        hlo: text of a compiled program for a TPU.
        layer_bytes: arrays of just this size are a layer's pages, of which kernels read what page
            tables say.
    """
    arrays: dict[str, list[_Array]] = {}
    total = 0.0
    for name, result, op, operands, is_gather in _instructions(hlo):
        arrays[name] = _arrays(result)
        if op in _MOVES_NOTHING:
            continue
        written = [a for a in arrays[name] if a.bytes != layer_bytes]
        read = [a for n in operands for a in arrays.get(n, []) if a.bytes != layer_bytes]
        if op in ("copy-start", "slice-start"):
            # The results are destination and source of a copy of the destination's size.
            size = min(a.bytes for a in written[:2])
            total += size * sum(a.in_hbm for a in written[:2])
            continue
        if op == "conditional":
            read = []
        most = max((a.bytes for a in written), default=0) if is_gather else math.inf
        total += sum(min(a.bytes, most) for a in read if a.in_hbm)
        total += sum(a.bytes for a in written if a.in_hbm)
    return total


def _instructions(hlo: str) -> Iterator[tuple[str, str, str, list[str], bool]]:
    """Name, result, operation, names of operands, and whether it gathers, of the entry's."""
    entry = hlo[hlo.index("\nENTRY") :]
    for line in entry.splitlines()[2:]:
        if 'custom_call_target="ConcatBitcast"' in line:
            line = line.replace(" custom-call(", " bitcast(")
        if found := _INSTRUCTION.match(line):
            name, result, op, operands = found.groups()
            yield name, result, op, re.findall(r"%[\w.\-]+", operands), "gather" in name


def _arrays(result: str) -> list[_Array]:
    found = []
    for dtype, shape, layout in _SHAPE.findall(result):
        count = 1
        for size in filter(None, shape.split(",")):
            count *= int(size)
        found.append(_Array(count * _ITEM_BYTES.get(dtype, 8), "S(" not in layout))
    return found

"""What a compiled program does, read from its text: which operations there are, and how large."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32, "s32": 32, "u32": 32,
    "f64": 64, "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|[\w]+\[[^ ]*) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        opcode: "dot", "all-reduce", ...; the start of an asynchronous pair has the plain name, its end is left out.
        arrays: dtype and shape of each result.
        results: the text before its opcode: types with layouts; S(1) is memory on the chip.
        operands: the text between its parentheses, and after.
        op_name: where in the traced program it comes from.
        computation: the function it stands in.
    """

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    results: str
    operands: str
    op_name: str
    computation: str

    @property
    def nbytes(self) -> int:
        """Of the largest result."""
        return max((math.prod(shape) * BITS.get(dtype, 8) // 8 for dtype, shape in self.arrays), default=0)

    def __str__(self) -> str:
        arrays = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in self.arrays)
        return f"{self.opcode} {arrays} ({self.op_name or self.name})"


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a compiled program's text (compiled.as_text())."""
    computation = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            computation = line.split("(")[0].split()[-1] if line.endswith("{") and "(" in line else computation
            continue
        found = _INSTRUCTION.match(line)
        if found is None or found[3].endswith("-done"):
            continue
        arrays = tuple((dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(found[2]))
        op_name = _OP_NAME.search(found[4])
        yield Instruction(
            name=found[1],
            opcode=found[3].removesuffix("-start"),
            arrays=arrays,
            results=found[2],
            operands=found[4],
            op_name=op_name[1] if op_name else "",
            computation=computation,
        )


def distinct_collectives(program: Iterable[Instruction]) -> list[Instruction]:
    """Each collective once: XLA:TPU writes one that runs beside other work into each fusion that starts, carries or ends it."""
    found: dict[tuple, Instruction] = {}
    for i in program:
        if i.opcode in COLLECTIVES:
            channel = _CHANNEL.search(i.operands)
            key = (i.opcode, channel[1], i.arrays, i.op_name) if channel else i.name
            found.setdefault(key, i)
    return list(found.values())


def collectives(text: str) -> dict[str, int]:
    """How many of each collective a program has; one in a loop's body counts once."""
    counts = collections.Counter(found.opcode for found in distinct_collectives(instructions(text)))
    return dict(sorted(counts.items()))

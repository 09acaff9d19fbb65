"""NVIDIA machine code as text: a cubin's kernels, their instructions, and the unit that each runs on."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
# Attributes of .nv.info: where a kernel's parameters lie in constant bank 0, and each of them.
PARAMETER_BANK, PARAMETER = 0x0A, 0x17
SIZED = 4

PIPES = ("FMA", "ALU", "XU", "LSU", "FP64", "tensor", "uniform", "control")
OPCODES = {
    "FMA": "FADD FMUL FFMA IMAD HFMA2 HADD2 HMUL2 FADD2 FMUL2 FFMA2 FSWZADD FADD32I FMUL32I FFMA32I IMAD32I",
    "XU": "MUFU I2F F2I F2F FRND POPC FLO BREV I2I",
    "LSU": "LDS STS LDG STG LDL STL LD ST SHFL LDSM STSM ATOM ATOMS ATOMG RED LDGSTS UBLKCP MATCH LDC LDCU",
    "FP64": "DADD DMUL DFMA DSETP DMNMX",
    "tensor": "HMMA IMMA DMMA BMMA HGMMA QGMMA UTCHMMA",
    "control": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV BAR WARPSYNC ENDCOLLECTIVE NOP YIELD "
    "DEPBAR LDGDEPBAR MEMBAR ERRBAR FENCE CCTL VOTE S2R CS2R BPT KILL NANOSLEEP SYNCS UCGABAR_ARV "
    "UCGABAR_WAIT ELECT ACQBULK PREEXIT WARPGROUP ARRIVES",
    "uniform": "S2UR R2UR VOTEU ULDC",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in OPCODES.items() for opcode in opcodes.split()}


@dataclass
class Instruction:
    """One instruction: ``@!P0 IADD3.X R5, RZ, ~R10, RZ`` is guarded by ``!P0``."""

    address: int
    guard: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    target: int | None = None

    @property
    def pipe(self) -> str:
        """The unit that it keeps busy; what is not listed is integer arithmetic, comparison or selection."""
        if self.opcode in PIPE_OF:
            return PIPE_OF[self.opcode]
        return "uniform" if self.opcode.startswith("U") else "ALU"


@dataclass
class Kernel:
    """A kernel of a cubin."""

    name: str
    index: int
    parameters_at: int = 0
    parameters: list[tuple[int, int]] = field(default_factory=list)  # offset and bytes of each
    literals: bytes = b""  # the compiler's own constants, bank 2
    code: list[Instruction] = field(default_factory=list)

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each innermost loop."""
        found = {
            (line.target // 16, at)
            for at, line in enumerate(self.code)
            if line.opcode == "BRA" and line.target is not None and line.target < line.address
        }
        return sorted(
            (first, last)
            for first, last in found
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b in found)
        )


def cubin_kernels(path: Path) -> dict[str, Kernel]:
    """The kernels of a cubin by mangled name, without their code."""
    data = path.read_bytes()
    at, size, count, names_at = struct.unpack_from("<Q10xHHH", data, 40)
    headers = [SECTION_HEADER.unpack_from(data, at + size * number) for number in range(count)]

    def text(table: tuple[int, ...], offset: int) -> str:
        start = table[4] + offset
        return data[start : data.index(b"\0", start)].decode()

    sections = {text(headers[names_at], header[0]): header for header in headers}
    symbols = sections[".symtab"]
    strings = headers[symbols[6]]
    kernels = {}
    for index in range(symbols[5] // SYMBOL.size):
        name_at, info, *_ = SYMBOL.unpack_from(data, symbols[4] + SYMBOL.size * index)
        name = text(strings, name_at)
        if info & 15 == 2 and f".nv.info.{name}" in sections and f".text.{name}" in sections:
            kernels[name] = Kernel(name, index)
            read_parameters(data, sections[f".nv.info.{name}"], kernels[name])
            if literals := sections.get(f".nv.constant2.{name}"):
                kernels[name].literals = data[literals[4] : literals[4] + literals[5]]
    return kernels


def read_parameters(data: bytes, section: tuple[int, ...], kernel: Kernel) -> None:
    at, end = section[4], section[4] + section[5]
    while at < end:
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind != SIZED:
            continue
        if attribute == PARAMETER_BANK:
            kernel.parameters_at = struct.unpack_from("<4xH", data, at)[0]
        elif attribute == PARAMETER:
            _, _, offset, flags = struct.unpack_from("<IHHI", data, at)
            kernel.parameters.append((offset, flags >> 18))
        at += size
    kernel.parameters.sort()


def read_code(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in ``nvdisasm -c``'s output."""
    kernels: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    jumps: list[tuple[Instruction, str]] = []
    code: list[Instruction] = []
    for line in listing.splitlines():
        if line.startswith(".text."):
            code = kernels.setdefault(line[6:].rstrip(":"), [])
            waiting = []
        elif found := re.match(r"^([.$]\S+):$", line):
            waiting.append(found[1])
        elif found := re.match(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line):
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            instruction, label = parse(address, found[2])
            code.append(instruction)
            if label and instruction.opcode != "RET":
                jumps.append((instruction, label))
    for instruction, label in jumps:
        instruction.target = labels.get(label)
    return kernels


def parse(address: int, text: str) -> tuple[Instruction, str | None]:
    guard = ""
    text = text.strip("{} ")
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
    name, _, rest = text.partition(" ")
    opcode, *modifiers = name.split(".")
    label = None
    if found := re.search(r"`\(([^)]*)\)", rest):
        label = found[1]
        rest = rest.replace(found[0], "")
    operands = tuple(word.strip().replace(".reuse", "") for word in rest.split(",") if word.strip())
    return Instruction(address, guard, opcode, tuple(modifiers), operands), label

"""Follows a warp through its machine code and counts what it issues.

Integers and predicates are computed, for each lane where lanes differ, from the launch's arguments and from
block and thread index. Floating-point numbers and what is read from global memory stay unknown. A condition
on an unknown number counts as false, which is the usual path of a division; a loop that hangs on one is an
error.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .sass import Instruction, Kernel

LANES = 32
WORD, LONG = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
EVERY = WORD
LANE = np.arange(LANES, dtype=np.uint64)
STACK_TOP = 0xFFFF00
MOST_ISSUED = 20_000_000
# An int where all lanes agree, a vector where they differ, None where nobody knows.
Value = Any


class CannotFollow(Exception):
    """The way through a kernel depends on what is not known here, or on an unknown instruction."""


class Guess:
    """False, as a condition on an unknown number counts."""

    def __bool__(self) -> bool:
        return False


GUESS = Guess()


def signed(value: Value) -> Value:
    if isinstance(value, int):
        return (value ^ 0x80000000) - 0x80000000
    return (value ^ np.uint64(0x80000000)).astype(np.int64) - 0x80000000


def long_signed(value: Value) -> Value:
    return (value ^ 1 << 63) - (1 << 63) if isinstance(value, int) else value.astype(np.int64)


def word(value: Value) -> Value:
    if isinstance(value, int):
        return value & WORD
    return value.astype(np.uint64) & np.uint64(WORD)


def is_known(*values: Value) -> bool:
    return all(value is not None for value in values)


def lanes_of(mask: int) -> np.ndarray:
    return (np.uint64(mask) >> LANE) & np.uint64(1) != 0


def bits_of(predicate: Any) -> int:
    """A predicate's lanes as bits."""
    if isinstance(predicate, np.ndarray):
        return int((predicate.astype(np.uint64) << LANE).sum())
    return EVERY if predicate else 0


def negated(predicate: Any) -> Any:
    return ~predicate if isinstance(predicate, np.ndarray) else not predicate


class SharedMemory:
    """The integers that a block's warps, which are followed one after another, leave for each other.

    A word counts as known where nothing else is ever written: whoever reads it later finds it.
    """

    def __init__(self) -> None:
        self.words: dict[int, int | None] = {}

    def write(self, addresses: Value, values: list[Value], lanes: int) -> None:
        """Words that lie one after another, of each lane."""
        if isinstance(addresses, np.ndarray) and lanes & (lanes - 1):
            places = addresses[lanes_of(lanes)]
            low, high = int(places.min()), int(places.max()) + 4 * len(values)
            for place in [place for place in self.words if low <= place < high]:
                self.words[place] = None
            return
        lane = lanes.bit_length() - 1
        for number, value in enumerate(values):
            one = int(value[lane]) if isinstance(value, np.ndarray) and lanes == 1 << lane else value
            word = one if isinstance(one, int) else None
            place = int(addresses[lane] if isinstance(addresses, np.ndarray) else addresses) + 4 * number
            self.words[place] = word if self.words.get(place, word) == word else None

    def read(self, address: Value, count: int) -> list[int | None]:
        """Words that all lanes read alike; None where nobody knows."""
        if not isinstance(address, int):
            return [None] * count
        return [self.words.get(address + 4 * number) for number in range(count)]


class Warp:
    """The state of one warp, and the addresses of what it issued."""

    def __init__(
        self,
        kernel: Kernel,
        constants: bytes,
        block: tuple[int, int, int],
        warp: int,
        threads: int,
        memory: SharedMemory | None = None,
    ):
        self.kernel, self.banks = kernel, {"0": constants, "2": kernel.literals}
        self.memory = memory or SharedMemory()
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, Any] = {}
        first = warp * LANES
        self.special: dict[str, Value] = {
            "SR_TID.X": LANE + np.uint64(first),
            "SR_CTAID.X": block[0],
            "SR_CTAID.Y": block[1],
            "SR_CTAID.Z": block[2],
            "SR_LANEID": LANE,
        }
        self.alive = (1 << min(LANES, threads - first)) - 1
        self.mask = self.alive
        self.at = 0
        self.others: list[tuple[int, int]] = []  # runnable paths: instruction and lanes
        self.groups: dict[str, list[int]] = {}  # lanes that wait for each other, by barrier register
        # Instruction to go on at, lanes, whom they wait for, at which barrier register.
        self.waiting: list[tuple[int, int, int, str]] = []
        self.issued: list[int] = []
        self.conflicts: dict[int, int] = {}
        self.guesses: set[int] = set()

    # Operands.
    def write(self, name: str, value: Value, lanes: int) -> None:
        if name in ("RZ", "URZ"):
            return
        if lanes == EVERY or lanes == self.alive or name.startswith("U"):
            self.registers[name] = value
            return
        before = self.registers.get(name)
        if value is None or before is None:
            # Lanes that know and lanes that do not: of what is written first only the writers read.
            self.registers[name] = value
        elif isinstance(value, int) and isinstance(before, int) and value == before:
            pass
        else:
            self.registers[name] = np.where(
                lanes_of(lanes),
                np.uint64(value) if isinstance(value, int) else value,
                np.uint64(before) if isinstance(before, int) else before,
            )

    def test(self, name: str) -> Any:
        if name.startswith("!"):
            return negated(self.test(name[1:]))
        if name in ("PT", "UPT"):
            return True
        return self.predicates.get(name, GUESS)

    def decide(self, name: str, value: Any, lanes: int) -> None:
        if name in ("PT", "UPT"):
            return
        if lanes == EVERY or lanes == self.alive or name.startswith("U"):
            self.predicates[name] = value
            return
        before = self.predicates.get(name, GUESS)
        if value is before or (isinstance(value, bool) and isinstance(before, bool) and value == before):
            return
        chosen = lanes_of(lanes)
        now = np.where(
            chosen,
            value if isinstance(value, np.ndarray) else bool(value),
            before if isinstance(before, np.ndarray) else bool(before),
        )
        self.predicates[name] = now

    def constant(self, bank: str, offset: Value, size: int) -> Value:
        if isinstance(offset, int):
            raw = self.banks[bank][offset : offset + size]
            return int.from_bytes(raw, "little") if len(raw) == size else None
        if offset is None:
            return None
        return np.array([self.constant(bank, int(each), size) or 0 for each in offset], dtype=np.uint64)

    # Paths.
    def run(self) -> None:
        """Go on until every lane has left."""
        plan = steps_of(self.kernel)
        issued = self.issued
        count = len(plan)
        while True:
            if self.others:
                self.choose()
            at = self.at
            if at >= count:
                raise CannotFollow(f"{self.kernel.name} runs past its end")
            issued.append(at)
            guard, action = plan[at]
            lanes = self.mask
            if guard:
                lanes &= bits_of(self.test(guard))
            self.at = at + 1
            if action is not None and action(self, lanes) and not self.next_path():
                return
            if len(issued) > MOST_ISSUED:
                raise CannotFollow(f"{self.kernel.name} does not end")

    def choose(self) -> None:
        """Go on where the code is behind, and join the paths that meet."""
        self.others.append((self.at, self.mask))
        joined: dict[int, int] = {}
        for at, lanes in self.others:
            joined[at] = joined.get(at, 0) | lanes
        self.at = min(joined)
        self.mask = joined.pop(self.at)
        self.others = list(joined.items())

    def next_path(self) -> bool:
        """Leave the path; whether there is another one."""
        self.release()
        if self.others:
            self.at, self.mask = self.others.pop()
            return True
        if self.waiting:
            raise CannotFollow(f"lanes of {self.kernel.name} wait for others for ever")
        return False

    def release(self) -> None:
        """Let those go on for whom everybody has come."""
        while True:
            for at, _, group, _ in self.waiting:
                there = [entry[1] for entry in self.waiting if entry[0] == at]
                come = functools.reduce(int.__or__, there)
                if group & self.alive & ~come == 0:
                    self.waiting = [entry for entry in self.waiting if entry[0] != at]
                    self.others.append((at, come))
                    break
            else:
                return

    def wait(self, group: int, name: str = "") -> bool:
        """Wait before the next instruction for lanes; True where the path stops here."""
        group &= self.alive
        if group & ~self.mask == 0:
            return False
        self.waiting.append((self.at, self.mask, group, name))
        return True

    def jump(self, target: int, lanes: int) -> bool:
        rest = self.mask & ~lanes
        if lanes:
            if rest:
                self.others.append((self.at, rest))
            self.at, self.mask = target, lanes
        return False


Action = Callable[[Warp, int], Any]


def steps_of(kernel: Kernel) -> list[tuple[str, Action | None]]:
    """Each instruction as a guard and a function; None for what changes nothing that is followed."""
    steps = kernel.__dict__.get("steps")
    if steps is None:
        steps = [
            (line.guard if line.guard not in ("PT", "UPT") else "", action_of(line)) for line in kernel.code
        ]
        kernel.__dict__["steps"] = steps
    return steps


REGISTER = re.compile(r"^U?R(\d+|Z)$")


def reader(text: str) -> Callable[[Warp], Value]:
    """A 32-bit operand."""
    if text.startswith("-") and not re.match(r"^-[\d.]", text):
        inner = reader(text[1:])
        return lambda warp: (
            None
            if (value := inner(warp)) is None
            else word(0 - value if isinstance(value, int) else np.uint64(1 << 32) - value)
        )
    if text.startswith("~"):
        inner = reader(text[1:])
        return lambda warp: None if (value := inner(warp)) is None else value ^ WORD
    if text in ("RZ", "URZ", "SRZ"):
        return lambda warp: 0
    if re.match(r"^U?R\d+$", text):
        # What nobody has written may hold anything: compilers keep flags in such registers, bit by bit.
        return lambda warp: warp.registers.get(text, 0)
    if re.match(r"^-?0x[0-9a-f]+$", text):
        number = int(text, 16) & WORD
        return lambda warp: number
    if re.match(r"^-?\d+$", text):
        number = int(text) & WORD
        return lambda warp: number
    if found := re.match(r"^c\[0x([02])\]\[(?:(U?R\d+|RZ|URZ)\+?)?(-?0x[0-9a-f]+)?\]$", text):
        bank, base, offset = found[1], found[2], int(found[3] or "0", 16)
        if base:
            inner = reader(base)
            return lambda warp: warp.constant(bank, None if (at := inner(warp)) is None else at + offset, 4)
        return lambda warp: warp.constant(bank, offset, 4)
    return lambda warp: None


def following(text: str, by: int = 1) -> str:
    """The name of the next register, or the next word of a constant."""
    if found := re.match(r"^([~-]?)(U?R)(\d+)(?:\.64)?$", text):
        return f"{found[1]}{found[2]}{int(found[3]) + by}"
    if found := re.match(r"^(c\[0x[02]\]\[(?:U?R\d+\+)?)(0x[0-9a-f]+)\]$", text):
        return f"{found[1]}{int(found[2], 16) + 4 * by:#x}]"
    return "RZ" if text.lstrip("-~") in ("RZ", "URZ") else text


def pair_reader(text: str) -> Callable[[Warp], Value]:
    """A 64-bit operand; an immediate is a word of its own."""
    low = reader(text.removesuffix(".64"))
    if re.match(r"^-?0x|^-?\d", text):
        number = int(text, 0) & LONG
        return lambda warp: number
    high = reader(following(text))

    def read(warp: Warp) -> Value:
        a, b = low(warp), high(warp)
        if a is None or b is None:
            return None
        if isinstance(a, int) and isinstance(b, int):
            return a | b << 32
        return np.uint64(a) | np.uint64(b) << np.uint64(32)

    return read


def write_pair(warp: Warp, name: str, value: Value, lanes: int) -> None:
    if value is None:
        low = high = None
    elif isinstance(value, int):
        low, high = value & WORD, value >> 32 & WORD
    else:
        low, high = value & np.uint64(WORD), value >> np.uint64(32)
    warp.write(name, low, lanes)
    warp.write(following(name), high, lanes)


def is_predicate(text: str) -> bool:
    return re.match(r"^!?U?P(\d|T)$", text) is not None


def is_long(line: Instruction) -> bool:
    """Whether it takes 64-bit integers."""
    return "S64" in line.modifiers or "U64" in line.modifiers


def results_of(line: Instruction) -> list[str]:
    """The registers that it writes."""
    name, modifiers = line.opcode, line.modifiers
    if name in ("STS", "STG", "STL", "ST", "RED", "BAR", "STSM", "LDGSTS", "EXIT") or not line.operands:
        return []
    first = next((text for text in line.operands if not is_predicate(text)), "")
    if not REGISTER.match(first) or first in ("RZ", "URZ"):
        return []
    count = 1
    if name.startswith("LD") or name in ("ULDC", "ULDCU", "LDCU", "ATOMG", "ATOM"):
        count = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    elif name.startswith("D") and name != "DSETP":
        count = 2
    elif name in ("F2F", "I2F"):
        count = 2 if modifiers[:1] == ("F64",) else 1
    elif name == "F2I":
        count = 2 if "U64" in modifiers or "S64" in modifiers else 1
    elif name in ("HMMA", "IMMA"):
        count = 4
    elif name == "CS2R":
        count = 1 if "32" in modifiers else 2
    elif "WIDE" in modifiers or name in ("FADD2", "FMUL2", "FFMA2") or "64" in modifiers:
        count = 2
    elif name == "IMNMX":
        count = 2 if is_long(line) else 1
    if name == "LDSM":
        count = int(modifiers[-1]) if modifiers[-1].isdecimal() else 1
    return [following(first, number) if number else first for number in range(count)]


def forget(line: Instruction) -> Action | None:
    """What leaves unknown numbers."""
    names = results_of(line)
    decisions = [text for text in line.operands[:2] if is_predicate(text)]
    if line.opcode not in ("FSETP", "DSETP", "ISETP", "HSETP2", "FCHK", "VOTE", "SHFL", "UISETP"):
        decisions = []
    if not names and not decisions:
        return None

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        for name in names:
            warp.write(name, None, lanes)
        for name in decisions:
            warp.decide(name, GUESS, lanes)

    return act


def split(line: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """Result, predicates that are written, sources, predicates that are read."""
    result, *rest = line.operands
    written: list[str] = []
    while rest and is_predicate(rest[0]) and len(written) < 2:
        written.append(rest.pop(0))
    sources = [text for text in rest if not is_predicate(text)]
    return result, written, sources, [text for text in rest if is_predicate(text)]


def action_of(line: Instruction) -> Action | None:
    name = line.opcode
    if name in CONTROL:
        return CONTROL[name](line)
    short = name[1:] if name.startswith("U") and name[1:] in ARITHMETIC else name
    if short in ARITHMETIC:
        return ARITHMETIC[short](line)
    return forget(line)


def add(line: Instruction) -> Action:
    result, written, sources, carried = split(line)
    readers = [reader(text) for text in sources]
    extended = "X" in line.modifiers
    # A complement in an extended addition, or a negation in the low one, is part of a subtraction's carry.
    borrows = (
        [text.startswith("-") and text not in ("-RZ", "-URZ") for text in sources] if not extended else []
    )

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        values = [read(warp) for read in readers]
        if not is_known(*values):
            warp.write(result, None, lanes)
            for target in written:
                warp.decide(target, GUESS, lanes)
            return
        total: Value = 0
        for value, borrow in zip(values, borrows or [False] * len(values)):
            total = total + value
            if borrow and written:
                # -x is ~x + 1: of x = 0 the sum carries, though its word is 0.
                total = total + (1 << 32) * (
                    value == 0 if isinstance(value, int) else (value == 0).astype(np.uint64)
                )
        if extended:
            for source in carried:
                flag = warp.test(source)
                total = total + (flag.astype(np.uint64) if isinstance(flag, np.ndarray) else int(bool(flag)))
        warp.write(result, word(total), lanes)
        for number, target in enumerate(written):
            limit = (number + 1) << 32
            warp.decide(target, total >= limit, lanes)

    return act


def multiply(line: Instruction) -> Action:
    result, written, sources, carried = split(line)
    modifiers = line.modifiers
    if "MOV" in modifiers or "IADD" in modifiers or "SHL" in modifiers:
        modifiers = ()
    unsigned = "U32" in modifiers
    wide, high = "WIDE" in modifiers, "HI" in modifiers
    a_reader, b_reader = reader(sources[0]), reader(sources[1])
    addend = sources[2] if len(sources) > 2 else "RZ"
    c_reader = pair_reader(addend) if wide or high else reader(addend)
    extended = "X" in modifiers

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        a, b, c = a_reader(warp), b_reader(warp), c_reader(warp)
        # Nothing times anything is nothing: how the compiler moves registers.
        if sources[0] in ("RZ", "URZ") or sources[1] in ("RZ", "URZ"):
            a = b = 0
        if not is_known(a, b, c):
            warp.write(result, None, lanes)
            if wide:
                warp.write(following(result), None, lanes)
            for target in written:
                warp.decide(target, GUESS, lanes)
            return
        if not (wide or high):
            total = a * b + c
            if extended:
                for source in carried:
                    flag = warp.test(source)
                    total = total + (
                        flag.astype(np.uint64) if isinstance(flag, np.ndarray) else int(bool(flag))
                    )
            warp.write(result, word(total), lanes)
            for target in written:
                warp.decide(target, total > WORD, lanes)
            return
        if not unsigned:
            a, b = sign_extended(a), sign_extended(b)
        carry: Any
        if all(isinstance(value, int) for value in (a, b, c)):
            product = a * b & LONG
            total = product + c
            carry, total = total > LONG, total & LONG
        else:
            product = np.asarray(a, dtype=np.uint64) * np.asarray(b, dtype=np.uint64)
            total = product + np.asarray(c, dtype=np.uint64)
            carry = total < product
        if extended:
            for source in carried:
                flag = warp.test(source)
                total = total + (flag.astype(np.uint64) if isinstance(flag, np.ndarray) else int(bool(flag)))
                if isinstance(total, int):
                    total &= LONG
        if wide:
            write_pair(warp, result, total, lanes)
        else:
            warp.write(result, total >> 32 if isinstance(total, int) else total >> np.uint64(32), lanes)
        for target in written:
            warp.decide(target, carry, lanes)

    return act


def sign_extended(value: Value) -> Value:
    """A word as 64 bits."""
    if isinstance(value, int):
        return signed(value) & LONG
    return signed(value).astype(np.uint64)


def shifted_left(value: Value, by: int) -> Value:
    return value << by if isinstance(value, int) else value << np.uint64(by)


def load_address(line: Instruction) -> Action:
    """LEA: a scaled index and a base; .HI takes what the scaled index shifts out of its word."""
    result, written, sources, carried = split(line)
    high, extended, wide = "HI" in line.modifiers, "X" in line.modifiers, "SX32" in line.modifiers
    by = int(sources[-1], 16)
    values = sources[:-1]
    a_reader, b_reader = reader(values[0]), reader(values[1])
    c_reader = reader(values[2]) if len(values) > 2 else reader("RZ")

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        a, b, c = a_reader(warp), b_reader(warp), c_reader(warp)
        if not is_known(a, b, c):
            warp.write(result, None, lanes)
            for target in written:
                warp.decide(target, GUESS, lanes)
            return
        if high:
            if wide:
                above = sign_extended(a) >> 32 if isinstance(a, int) else sign_extended(a) >> np.uint64(32)
                scaled = shifted_left(above, by) | (
                    a >> (32 - by) if isinstance(a, int) else a >> np.uint64(32 - by)
                )
            else:
                low = a >> (32 - by) if isinstance(a, int) else a >> np.uint64(32 - by)
                scaled = (shifted_left(c, by) if not isinstance(c, int) or c else 0) | low
            scaled = word(scaled)
        else:
            scaled = word(shifted_left(a, by))
        total = scaled + b
        if extended:
            for source in carried:
                flag = warp.test(source)
                total = total + (flag.astype(np.uint64) if isinstance(flag, np.ndarray) else int(bool(flag)))
        warp.write(result, word(total), lanes)
        for target in written:
            warp.decide(target, total > WORD, lanes)

    return act


def table_of(values: list[Value], table: int) -> Value:
    """Bit by bit, the table's entry of three values' bits."""
    a, b, c = values
    total: Value = 0
    for entry in range(8):
        if table >> entry & 1:
            part = a if entry & 4 else a ^ WORD
            part = part & (b if entry & 2 else b ^ WORD)
            total = total | (part & (c if entry & 1 else c ^ WORD))
    return total


# The tables that are one operation, and there are few others.
COMMON_TABLES: dict[int, Callable[[Value, Value, Value], Value]] = {
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
    0xF0: lambda a, b, c: a,
    0xCC: lambda a, b, c: b,
    0xAA: lambda a, b, c: c,
    0xFE: lambda a, b, c: a | b | c,
    0x80: lambda a, b, c: a & b & c,
    0x33: lambda a, b, c: b ^ WORD,
    0x0F: lambda a, b, c: a ^ WORD,
    0x30: lambda a, b, c: a & (b ^ WORD),
    0xF8: lambda a, b, c: a | (b & c),
    0xEA: lambda a, b, c: (a & b) | c,
}


def logic(line: Instruction) -> Action:
    result, written, sources, joined = split(line)
    if is_predicate(result):
        written, (result, *sources) = [result, *written], sources
    how = "AND" if "PAND" in line.modifiers else "OR"
    table = int(sources[-1], 16)
    readers = [reader(text) for text in sources[:-1]]
    operation = COMMON_TABLES.get(table) or (lambda a, b, c: table_of([a, b, c], table))
    needed = [table_needs(table, number) for number in range(3)]

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        values = [read(warp) if need else 0 for read, need in zip(readers, needed)]
        if not is_known(*values):
            warp.write(result, None, lanes)
            for target in written:
                warp.decide(target, GUESS, lanes)
            return
        value = operation(*values)
        warp.write(result, value, lanes)
        for target in written:
            answer = value != 0
            warp.decide(target, combined(how, answer, warp.test(joined[0])) if joined else answer, lanes)

    return act


def table_needs(table: int, operand: int) -> bool:
    bit = 4 >> operand
    return any((table >> entry & 1) != (table >> (entry ^ bit) & 1) for entry in range(8))


def predicate_logic(line: Instruction) -> Action:
    """PLOP3.LUT P0, PT, P1, P2, PT, 0x8, 0x0: two results of three predicates."""
    texts = list(line.operands)
    tables = [int(text, 16) for text in texts if not is_predicate(text)]
    names = [text for text in texts if is_predicate(text)]
    targets, sources = names[:2], names[2:5]

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        flags = [warp.test(text) for text in sources]
        guessed = any(flag is GUESS for flag in flags)
        values = [
            flag.astype(np.uint64) * np.uint64(WORD) if isinstance(flag, np.ndarray) else WORD if flag else 0
            for flag in flags
        ]
        for target, table in zip(targets, tables):
            value = table_of(values, table)
            answer = value != 0 if isinstance(value, np.ndarray) else bool(value)
            warp.decide(target, GUESS if guessed and answer is False else answer, lanes)

    return act


def shift(line: Instruction) -> Action:
    """SHF.R.S32.HI R0, RZ, by, R5; the two words are low and high, .HI is the upper word of the result."""
    result, _, sources, _ = split(line)
    readers = [reader(text) for text in sources]
    right, arithmetic = "R" in line.modifiers, "S32" in line.modifiers or "S64" in line.modifiers
    double = is_long(line)
    upper, wraps = "HI" in line.modifiers, "W" in line.modifiers

    def one(low: int, by: int, high: int) -> int:
        by = by & (63 if double else 31) if wraps else min(by, 64 if double else 32)
        both = low | high << 32
        if right:
            if upper and not double:
                both = (signed(high) if arithmetic else high) << 32 | low
                return both >> by >> 32 & WORD
            both = long_signed(both) if arithmetic else both
            return both >> by >> (32 if upper else 0) & WORD
        if not double and not upper:
            return low << by & WORD
        return both << by >> 32 & WORD if upper else low << by & WORD

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        low, by, high = (read(warp) for read in readers)
        if sources[0] in ("RZ", "URZ") or (right and upper and not double):
            low = 0
        if not right and not upper:
            high = 0
        if not is_known(low, by, high):
            warp.write(result, None, lanes)
        elif all(isinstance(value, int) for value in (low, by, high)):
            warp.write(result, one(low, by, high), lanes)
        elif isinstance(by, int) and not double and by < 32 and right == upper:
            if right:
                moved = signed(high) >> by if arithmetic else high >> np.uint64(by)
                warp.write(result, word(moved), lanes)
            else:
                warp.write(result, word(shifted_left(low, by)), lanes)
        else:
            each = [
                np.broadcast_to(np.asarray(value, dtype=np.uint64), LANES).tolist()
                for value in (low, by, high)
            ]
            warp.write(result, np.array([one(*lane) for lane in zip(*each)], dtype=np.uint64), lanes)

    return act


COMPARISONS: dict[str, Callable[[Value, Value], Any]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def as_flag(flag: Any) -> Any:
    return flag if isinstance(flag, np.ndarray) else bool(flag)


def combined(how: str, a: Any, b: Any) -> Any:
    if how == "AND":
        return as_flag(a) & as_flag(b)
    if how == "OR":
        return as_flag(a) | as_flag(b)
    return as_flag(a) ^ as_flag(b)


def compare(line: Instruction) -> Action:
    first, second, left, right, *rest = line.operands
    comparison = COMPARISONS.get(line.modifiers[0])
    if comparison is None:
        return forget(line) or (lambda warp, lanes: None)
    unsigned, extended = "U32" in line.modifiers, "EX" in line.modifiers
    how = next((word for word in ("AND", "OR", "XOR") if word in line.modifiers), "AND")
    before = rest[0] if rest else "PT"
    below = rest[1] if extended else None
    a_reader, b_reader = reader(left), reader(right)

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        a, b, flag = a_reader(warp), b_reader(warp), warp.test(before)
        if not is_known(a, b):
            # An unknown comparison is false; a conjunction with what is false is known all the same.
            certain = how == "AND" and isinstance(flag, bool) and not flag
            answer = combined(how, False, flag)
            warp.decide(
                first, answer if certain or answer is True or isinstance(answer, np.ndarray) else GUESS, lanes
            )
            warp.decide(second, GUESS, lanes)
            return
        if not unsigned:
            a, b = signed(a), signed(b)
        answer = comparison(a, b)
        if extended and below is not None:
            lower = as_flag(warp.test(below))
            equal = a == b
            if line.modifiers[0] == "EQ":
                answer = as_flag(equal) & lower
            elif line.modifiers[0] == "NE":
                answer = as_flag(a != b) | lower
            else:
                beyond = (a < b) if line.modifiers[0] in ("LT", "LE") else (a > b)
                answer = as_flag(beyond) | (as_flag(equal) & lower)
        warp.decide(first, combined(how, answer, flag), lanes)
        if second not in ("PT", "UPT"):
            warp.decide(second, combined(how, negated(as_flag(answer)), flag), lanes)

    return act


def select(line: Instruction) -> Action:
    result, a, b, condition = line.operands[0], *line.operands[1:4]
    a_reader, b_reader = reader(a), reader(b)

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        flag = warp.test(condition)
        if isinstance(flag, np.ndarray):
            yes, no = a_reader(warp), b_reader(warp)
            if not is_known(yes, no):
                warp.write(result, None, lanes)
                return
            warp.write(
                result,
                np.where(flag, np.asarray(yes, dtype=np.uint64), np.asarray(no, dtype=np.uint64)),
                lanes,
            )
        else:
            warp.write(result, a_reader(warp) if flag else b_reader(warp), lanes)

    return act


def extremum(line: Instruction) -> Action:
    """IMNMX and VIMNMX: the smaller where the predicate holds; VIADDMNMX adds its first two before.

    Newer architectures have more predicates, and pairs of registers: VIMNMX R2, PT, PT, R22, 0x4, PT and
    IMNMX.S64 PT, PT, R2, R2, R4, PT, !PT.
    """
    wide = is_long(line)
    at = [number for number, text in enumerate(line.operands) if not is_predicate(text)]
    result, *rest = (line.operands[number] for number in at)
    condition = line.operands[at[-1] + 1]
    readers = [pair_reader(text) if wide else reader(text) for text in rest]
    adds = line.opcode.startswith("VIADD")
    not_negative = "RELU" in line.modifiers
    unsigned = "U32" in line.modifiers or "U64" in line.modifiers

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        values = [read(warp) for read in readers]
        flag = warp.test(condition)
        best: Value = None
        if is_known(*values) and not isinstance(flag, np.ndarray):
            if adds:
                values = [word(values[0] + values[1]), *values[2:]]
            a, b = values if unsigned else map(long_signed if wide else signed, values)
            if isinstance(a, int) and isinstance(b, int):
                best = min(a, b) if flag else max(a, b)
                best = max(best, 0) if not_negative else best
            else:
                best = np.minimum(a, b) if flag else np.maximum(a, b)
                best = np.maximum(best, 0) if not_negative else best
        if wide:
            write_pair(warp, result, best.astype(np.uint64) if isinstance(best, np.ndarray) else best, lanes)
        else:
            warp.write(result, None if best is None else word(best), lanes)

    return act


def move(line: Instruction) -> Action:
    result, source = line.operands[0], line.operands[1]
    read = reader(source)

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            warp.write(result, read(warp), lanes)

    def to_uniform(warp: Warp, lanes: int) -> None:
        value = read(warp)
        if isinstance(value, np.ndarray):
            chosen = value[lanes_of(lanes or warp.mask)]
            value = int(chosen[0])
        warp.write(result, value, lanes)

    return to_uniform if line.opcode == "R2UR" else act


def add_two(line: Instruction) -> Action:
    result, a, b = line.operands[0], reader(line.operands[1]), reader(line.operands[2])

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            x, y = a(warp), b(warp)
            warp.write(result, word(x + y) if is_known(x, y) else None, lanes)

    return act


def absolute(line: Instruction) -> Action:
    result, read = line.operands[0], reader(line.operands[1])

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            value = read(warp)
            warp.write(result, None if value is None else word(abs(signed(value))), lanes)

    return act


def load_constant(line: Instruction) -> Action | None:
    names = results_of(line)
    if not names or not line.operands[1].startswith(("c[0x0]", "c[0x2]")):
        return forget(line)
    readers = [
        reader(following(line.operands[1], number) if number else line.operands[1])
        for number in range(len(names))
    ]

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            for name, read in zip(names, readers):
                warp.write(name, read(warp), lanes)

    return act


def special(line: Instruction) -> Action:
    names = results_of(line)
    source = line.operands[1]

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            value = 0 if source == "SRZ" else warp.special.get(source, 0)
            for number, name in enumerate(names):
                warp.write(name, 0 if number else value, lanes)

    return act


def half_constant(line: Instruction) -> Action | None:
    """HFMA2.MMA R7, -RZ, RZ, 1.875, 0: how the compiler loads a number through the unit of halves."""
    if line.operands[1:3] != ("-RZ", "RZ") or len(line.operands) != 5:
        return forget(line)
    try:
        high, low = (
            struct.unpack("<H", np.float16(text.replace("+", "")).tobytes())[0] for text in line.operands[3:]
        )
    except ValueError:
        return forget(line)
    result, number = line.operands[0], high << 16 | low

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            warp.write(result, number, lanes)

    return act


def each_lane(value: Value, operation: Callable[[int], int]) -> Value:
    if value is None:
        return None
    if isinstance(value, int):
        return operation(value)
    return np.array([operation(int(lane)) for lane in value], dtype=np.uint64)


def float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & WORD))[0]


def bits_of_float(number: float, upwards: bool = False) -> int:
    with np.errstate(over="ignore"):
        near = np.float32(number)
    if upwards and float(near) < number:
        near = np.nextafter(near, np.float32(np.inf))
    return struct.unpack("<I", near.tobytes())[0]


def to_float(line: Instruction) -> Action | None:
    """I2F, for the reciprocals in integer divisions."""
    if "F64" in line.modifiers or "F16" in line.modifiers:
        return forget(line)
    wide = is_long(line)
    read = pair_reader(line.operands[1]) if wide else reader(line.operands[1])
    is_signed = "U32" not in line.modifiers and "U64" not in line.modifiers
    upwards, result = "RP" in line.modifiers, line.operands[0]

    def convert(value: int) -> int:
        if is_signed:
            value = long_signed(value) if wide else signed(value)
        return bits_of_float(float(value) if abs(value) < 1 << 53 else value, upwards)

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            warp.write(result, each_lane(read(warp), convert), lanes)

    return act


def to_integer(line: Instruction) -> Action | None:
    if "F64" in line.modifiers or not REGISTER.match(line.operands[1]):
        return forget(line)
    wide = is_long(line)
    is_unsigned = "U64" in line.modifiers or "U32" in line.modifiers
    limit = (1 << (64 if wide else 32)) - 1
    read, result = reader(line.operands[1]), line.operands[0]

    def convert(bits: int) -> int:
        number = float_of(bits)
        if not np.isfinite(number):
            return limit if number > 0 else 0
        return min(max(int(number), 0), limit) if is_unsigned else int(number) & limit

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            value = each_lane(read(warp), convert)
            if wide:
                write_pair(warp, result, value, lanes)
            else:
                warp.write(result, value, lanes)

    return act


def reciprocal(line: Instruction) -> Action | None:
    if line.modifiers != ("RCP",) or not REGISTER.match(line.operands[1]):
        return forget(line)
    read, result = reader(line.operands[1]), line.operands[0]

    def invert(bits: int) -> int:
        number = float_of(bits)
        return bits_of_float(1 / number if number else float("inf"))

    def act(warp: Warp, lanes: int) -> None:
        if lanes:
            warp.write(result, each_lane(read(warp), invert), lanes)

    return act


def permute_bytes(line: Instruction) -> Action | None:
    result, a, chosen, b = line.operands
    a_reader, b_reader, chosen_reader = reader(a), reader(b), reader(chosen)
    if line.modifiers:
        return forget(line)

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        x, y, how = a_reader(warp), b_reader(warp), chosen_reader(warp)
        if not (isinstance(x, int) and isinstance(y, int) and isinstance(how, int)):
            warp.write(result, None, lanes)
            return
        both = (x | y << 32).to_bytes(8, "little")
        picked = bytes(both[how >> 4 * number & 7] for number in range(4))
        warp.write(result, int.from_bytes(picked, "little"), lanes)

    return act


def predicates_to_register(line: Instruction) -> Action:
    """P2R R0, PR, RZ, 0x8: the predicates of the mask, to be tested later."""
    result, bank, _, mask = line.operands
    uniform = bank.startswith("U")
    wanted = [number for number in range(7) if int(mask, 16) >> number & 1]

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        total: Value = 0
        for number in wanted:
            flag = warp.test(f"{'U' if uniform else ''}P{number}")
            part = (
                flag.astype(np.uint64) << np.uint64(number)
                if isinstance(flag, np.ndarray)
                else bool(flag) << number
            )
            total = total | part
        warp.write(result, total, lanes)

    return act


def register_to_predicates(line: Instruction) -> Action:
    bank, source, mask = line.operands
    uniform = bank.startswith("U")
    read = reader(source)
    wanted = [number for number in range(7) if int(mask, 16) >> number & 1]

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        value = read(warp)
        for number in wanted:
            name = f"{'U' if uniform else ''}P{number}"
            if value is None:
                warp.decide(name, GUESS, lanes)
            elif isinstance(value, int):
                warp.decide(name, bool(value >> number & 1), lanes)
            else:
                warp.decide(name, value >> np.uint64(number) & np.uint64(1) != 0, lanes)

    return act


def vote(line: Instruction) -> Action | None:
    """VOTE.ANY R0, PT, P0: who says yes."""
    source = line.operands[-1]
    names = [text for text in line.operands[:-1] if REGISTER.match(text)]
    flags = [text for text in line.operands[:-1] if is_predicate(text)]
    every = "ALL" in line.modifiers

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        answer = warp.test(source)
        yes = bits_of(answer) & lanes
        for name in names:
            warp.write(name, None if answer is GUESS else yes, lanes)
        for name in flags:
            warp.decide(name, GUESS if answer is GUESS else (yes == lanes if every else yes != 0), lanes)

    return act


def shared(line: Instruction) -> Action | None:
    """LDS and STS: clocks of the shared-memory unit, from the lanes' addresses, and what is known there."""
    results = results_of(line)
    place = next((text for text in line.operands if text.startswith("[")), "[]")[1:-1]
    width = 16 if "128" in line.modifiers else 8 if "64" in line.modifiers else 4
    parts = [part for part in re.split(r"\+(?=[UR0-9-])", place) if part]
    readers = [reader(part.split(".")[0]) for part in parts]
    scaled = [int(found[1]) if (found := re.search(r"\.X(\d+)$", part)) else 1 for part in parts]
    number = line.address // 16
    stored = [reader(following(line.operands[-1], word)) for word in range(width // 4)]

    def act(warp: Warp, lanes: int) -> None:
        if not lanes:
            return
        total: Value = 0
        for read, scale in zip(readers, scaled):
            value = read(warp)
            if value is None:
                total = None
                break
            total = total + value * scale
        if isinstance(total, np.ndarray):
            clocks = wavefronts(word(total)[lanes_of(lanes)].tobytes(), width)
        else:
            clocks = width // 4 if total is None else max(1, width // 8)
        warp.conflicts[number] = warp.conflicts.get(number, 0) + clocks
        if results:
            for name, value in zip(results, warp.memory.read(total, len(results))):
                warp.write(name, value, lanes)
        elif total is not None:
            warp.memory.write(total, [read(warp) for read in stored], lanes)

    return act


@functools.lru_cache(maxsize=65536)
def wavefronts(addresses: bytes, width: int) -> int:
    """Clocks of an access: 32 banks of 4 bytes, 128 bytes a clock, equal words once."""
    places = np.frombuffer(addresses, dtype=np.uint64).astype(np.int64)
    at_once = LANES * 4 // width
    total = 0
    for first in range(0, len(places), at_once):
        group = places[first : first + at_once]
        words = np.unique((group[:, None] // 4 + np.arange(width // 4)).reshape(-1))
        total += int(np.bincount(words % 32).max())
    return max(total, width // 8, 1)


ARITHMETIC: dict[str, Callable[[Instruction], Action | None]] = {
    "IADD3": add,
    "IADD": add,
    "IMAD": multiply,
    "LEA": load_address,
    "LOP3": logic,
    "PLOP3": predicate_logic,
    "SHF": shift,
    "ISETP": compare,
    "SEL": select,
    "IMNMX": extremum,
    "VIMNMX": extremum,
    "VIADDMNMX": extremum,
    "MOV": move,
    "R2UR": move,
    "VIADD": add_two,
    "IABS": absolute,
    "LDC": load_constant,
    "LDCU": load_constant,
    "S2R": special,
    "S2UR": special,
    "CS2R": special,
    "HFMA2": half_constant,
    "I2F": to_float,
    "F2I": to_integer,
    "MUFU": reciprocal,
    "PRMT": permute_bytes,
    "P2R": predicates_to_register,
    "UP2UR": predicates_to_register,
    "R2P": register_to_predicates,
    "VOTE": vote,
    "VOTEU": vote,
    "LDS": shared,
    "STS": shared,
}


def branch(line: Instruction) -> Action:
    condition = line.operands[0] if line.operands and is_predicate(line.operands[0]) else None
    target = None if line.target is None else line.target // 16
    here = line.address // 16
    if "DIV" in line.modifiers or "CONV" in line.modifiers:
        taken = "CONV" in line.modifiers

        def meet(warp: Warp, lanes: int) -> bool:
            if taken and target is not None:
                warp.at = target
            return warp.wait(EVERY)

        return meet

    names = [text.lstrip("!") for text in (line.guard, condition or "") if text]

    def act(warp: Warp, lanes: int) -> bool:
        if target is None:
            raise CannotFollow(f"{warp.kernel.name} jumps to a computed place at {line.address:#x}")
        if condition:
            lanes &= bits_of(warp.test(condition))
        for name in names:
            if warp.predicates.get(name) is GUESS:
                warp.guesses.add(here)
                if target <= here and lanes:
                    raise CannotFollow(
                        f"{warp.kernel.name}: the loop that ends at {line.address:#x} depends on numbers"
                    )
        return warp.jump(target, lanes)

    return act


def call(line: Instruction) -> Action:
    return branch(line)


def give_back(line: Instruction) -> Action:
    read = reader(line.operands[0])

    def act(warp: Warp, lanes: int) -> bool:
        value = read(warp)
        if isinstance(value, np.ndarray):
            places = set(value[lanes_of(lanes)].tolist())
            value = places.pop() if len(places) == 1 else None
        if value is None:
            raise CannotFollow(f"{warp.kernel.name} returns to an unknown place at {line.address:#x}")
        return warp.jump(int(value) // 16, lanes)

    return act


def leave(line: Instruction) -> Action:
    def act(warp: Warp, lanes: int) -> bool:
        if not lanes:
            return False
        warp.alive &= ~lanes
        warp.mask &= ~lanes
        if warp.mask:
            warp.release()
            return False
        return True

    return act


def set_barrier(line: Instruction) -> Action:
    name = line.operands[0]

    def act(warp: Warp, lanes: int) -> bool:
        others = [group & ~warp.mask for group in warp.groups.get(name, [])]
        warp.groups[name] = [group for group in others if group] + [warp.mask]
        return False

    return act


def meet_at_barrier(line: Instruction) -> Action:
    name = line.operands[0]

    def act(warp: Warp, lanes: int) -> bool:
        group = next((group for group in warp.groups.get(name, []) if group & warp.mask), warp.mask)
        return warp.wait(group, name)

    return act


def leave_barrier(line: Instruction) -> Action:
    name = line.operands[-1]

    def act(warp: Warp, lanes: int) -> bool:
        if lanes:
            warp.groups[name] = [group & ~lanes for group in warp.groups.get(name, []) if group & ~lanes]
            warp.waiting = [
                (at, there, group & ~lanes if at_name == name else group, at_name)
                for at, there, group, at_name in warp.waiting
            ]
            warp.release()
        return False

    return act


def meet_all(line: Instruction) -> Action:
    return lambda warp, lanes: warp.wait(EVERY) if lanes else False


CONTROL: dict[str, Callable[[Instruction], Action | None]] = {
    "BRA": branch,
    "CALL": call,
    "RET": give_back,
    "EXIT": leave,
    "BSSY": set_barrier,
    "BSYNC": meet_at_barrier,
    "BREAK": leave_barrier,
    "WARPSYNC": meet_all,
    "BAR": meet_all,
}
for _name in ("BRX", "JMP", "JMX"):
    CONTROL[_name] = branch

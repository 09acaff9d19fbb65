"""What the CUDA operators cost by their machine code: no change may make them dearer unseen."""

from __future__ import annotations

import collections
import shutil

import pytest
import torch

from lf_dense.benchmark import kernels, sass, warps
from lf_dense.errors import UsageError
from support import ROOT
from support.driving import load_tool

ARCHITECTURE = "sm_90"
# Upper bounds at 66,800 tokens, 49 landmarks and 64 channels in float32. Slots a tile are what the busiest
# scheduler issues for 64 tokens.
AIMS = {
    "slots a tile": {
        "stream_keys": 7_000,
        "stream_queries": 6_800,
        "query_gradients": 19_800,
        "key_gradients": 19_000,
    },
    "solver's slots": 35_000,  # 20 us of an H100
    "solver's microseconds": 27.0,
    "forward's milliseconds": 0.095,
    "forward and backward's milliseconds": 0.335,
    "forward's milliseconds at 224 x 224": 0.040,
    "launches backward": 6,
}


@pytest.fixture(scope="module")
def operators():
    try:
        return kernels.build(ARCHITECTURE)
    except UsageError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def readings(operators):
    case = kernels.documented_cases()[0]
    return kernels.read(operators, kernels.attention(operators, case))


def of_kernel(readings, name):
    return next(reading for reading in readings if reading.launch.name.split("<")[0] == name)


@pytest.mark.parametrize("name", AIMS["slots a tile"])
def test_a_tile_takes_no_more_slots(readings, name):
    reading = of_kernel(readings, name)
    tiles = kernels.tiles_of(kernels.documented_cases()[0])
    assert reading.slots / tiles <= AIMS["slots a tile"][name]
    assert reading.spilled == 0
    assert reading.at_once >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_tensors_take_hardly_more_slots(operators, readings, dtype):
    case = kernels.documented_cases()[0]
    narrow = kernels.read(operators, kernels.attention(operators, case, dtype))
    for name in AIMS["slots a tile"]:
        reading = of_kernel(narrow, name)
        assert reading.launch.name != of_kernel(readings, name).launch.name
        assert reading.slots <= 1.02 * of_kernel(readings, name).slots
        assert reading.spilled == 0
        assert reading.at_once >= 2


def test_the_solver_and_the_whole_take_no_longer(operators, readings):
    case = kernels.forward_only(kernels.documented_cases()[0])
    forward = len(kernels.launches_of(operators, kernels.attention(operators, case)))
    first = readings[0]
    slots = [block.slots() for _, block in first.kinds if first.is_other(block)]
    assert 0 < max(slots) <= AIMS["solver's slots"]
    solver = first.other_clocks / operators.machine.gigahertz / 1000
    assert 0 < solver <= AIMS["solver's microseconds"]
    assert kernels.milliseconds(readings[:forward]) <= AIMS["forward's milliseconds"]
    assert kernels.milliseconds(readings) <= AIMS["forward and backward's milliseconds"]
    assert len(readings) - forward <= AIMS["launches backward"]


def test_every_stage_at_224_takes_no_longer(operators):
    for case in kernels.documented_cases()[1:]:
        readings = kernels.read(operators, kernels.attention(operators, case), case.batch * case.heads)
        assert kernels.milliseconds(readings) <= AIMS["forward's milliseconds at 224 x 224"]


def test_the_tables_name_every_launch_and_the_hot_loops(readings):
    table = kernels.kernel_table(readings, kernels.tiles_of(kernels.documented_cases()[0]))
    assert len(table.splitlines()) == 2 + len(readings)
    loops = kernels.loop_rows(of_kernel(readings, "stream_queries"))
    arithmetic = [float(row[3]) for row in loops]
    assert max(arithmetic) >= 112


def test_the_floor_issues_two_instructions_a_pair(operators):
    """Sixteen pairs a step, eight steps a turn, and three instructions that turn the loop."""
    floor = next(kernel for name, kernel in operators.kernels.items() if "floor_loop" in name)
    kernels.load_code(operators, [floor])
    first, last = max(floor.loops(), key=lambda loop: loop[1] - loop[0])
    counts = collections.Counter(line.opcode for line in floor.code[first : last + 1])
    assert counts.pop("FADD") == 2 * 16 * 8
    assert sum(counts.values()) <= 4
    # What is followed is what is asked for: all pairs of a thread, twice, and little more.
    like = torch.empty(1)
    op = getattr(torch.ops, operators.namespace).arithmetic_floor
    (launch,) = kernels.launches_of(operators, lambda: op(like, 10**9))
    steps = 10**9 // (16 * launch.threads * launch.blocks)
    for trace in kernels.follow(launch, 3).traces:
        assert 32 * steps <= len(trace) <= 34 * steps + 400


def program(*lines):
    """A kernel of these instructions, at multiples of 16."""
    code = []
    for number, text in enumerate(lines):
        instruction, label = sass.parse(16 * number, text)
        instruction.target = int(label, 16) if label else None
        code.append(instruction)
    return sass.Kernel("program", 0, code=code)


def follow(*lines, constants=b"", literals=b"", block=(0, 0, 0), warp=0, threads=64, memory=None):
    kernel = program(*lines)
    kernel.literals = literals
    followed = warps.Warp(kernel, constants, block, warp, threads, memory)
    followed.run()
    return followed


def test_a_loop_turns_as_often_as_its_bound_says():
    done = follow(
        "MOV R0, RZ",
        "IADD3 R0, R0, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x4], PT",
        "@!P0 BRA `(0x10)",
        "EXIT",
        constants=(0).to_bytes(4, "little") + (7).to_bytes(4, "little"),
    )
    assert len(done.issued) == 1 + 3 * 7 + 1
    assert done.guesses == set()


def test_warps_find_what_one_thread_left_in_shared_memory():
    memory = warps.SharedMemory()
    code = (
        "S2R R0, SR_TID.X",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "MOV R2, 0x5",
        "MOV R3, R0",
        "@!P0 STS.64 [RZ+0x8], R2",
        "LDS.64 R4, [0x8]",
        "LDS R6, [RZ+0x20]",
        "EXIT",
    )
    for warp in range(2):
        done = follow(*code, warp=warp, memory=memory)
        assert [done.registers[name] for name in ("R4", "R5", "R6")] == [5, 0, None]


def test_shared_memory_that_is_written_twice_is_not_known():
    memory = warps.SharedMemory()
    one_lane = 1
    memory.write(0, [7, 8], one_lane)
    memory.write(0, [7, 9], one_lane)
    assert memory.read(0, 2) == [7, None]
    memory.write(4 * warps.LANE, [warps.LANE], warps.EVERY)
    assert memory.read(0, 1) == [None]
    # Lanes that leave different numbers in one place leave nobody knows which.
    memory.write(256, [warps.LANE], warps.EVERY)
    assert memory.read(256, 1) == [None]


def test_the_compilers_own_constants_are_read():
    """Bank 2, where compilers for compute capability 8.0 put 64-bit literals."""
    literals = b"".join(number.to_bytes(8, "little") for number in (9, 5))
    done = follow("IMAD.WIDE R2, RZ, RZ, c[0x2][0x8]", "MOV R4, c[0x2][0x0]", "EXIT", literals=literals)
    assert [done.registers[name] for name in ("R2", "R3", "R4")] == [5, 0, 9]


def test_the_smaller_of_two_as_newer_architectures_write_it():
    """With more predicates, and of pairs of registers. Where the condition fails it is the larger."""
    done = follow(
        "MOV R2, 0x5",
        "MOV R3, -0x1",
        "MOV R4, 0x7",
        "MOV R5, RZ",
        "IMNMX.S64 PT, PT, R6, R2, R4, PT, !PT",
        "IMNMX.S64 PT, PT, R8, R2, R4, !PT, !PT",
        "IMNMX.U64 PT, PT, R10, R2, R4, PT, !PT",
        "VIMNMX R12, PT, PT, R4, 0x6, PT",
        "EXIT",
    )
    assert done.registers["R12"] == 6
    minus, seven = [5, 0xFFFFFFFF], [7, 0]
    pairs = [[done.registers[f"R{at}"], done.registers[f"R{at + 1}"]] for at in (6, 8, 10)]
    assert pairs == [minus, seven, seven]


def test_lanes_part_and_meet_again():
    """Both sides of a condition on the thread are issued, and what comes after only once."""
    lines = [
        "S2R R0, SR_TID.X",
        "ISETP.GE.U32.AND P0, PT, R0, 0x28, PT",
        "BSSY B0, `(0x60)",
        "@P0 BRA `(0x50)",
        "BRA `(0x60)",
        "MOV R1, 0x1",
        "BSYNC B0",
        "EXIT",
    ]
    apart = collections.Counter(follow(*lines, warp=1).issued)
    assert apart[7] == 1
    assert apart[4] == apart[5] == 1
    together = collections.Counter(follow(*lines, warp=0).issued)
    assert together[5] == 0


def test_a_division_of_integers_is_followed():
    done = follow(
        "I2F.U32.RP R0, R4",
        "S2UR UR8, SR_CTAID.X",
        "MOV R4, 0x7",
        "I2F.U32.RP R0, R4",
        "MUFU.RCP R0, R0",
        "VIADD R2, R0, 0xffffffe",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
        "IMAD.MOV.U32 R2, RZ, RZ, RZ",
        "IADD3 R5, RZ, -R3, RZ",
        "IMAD R5, R5, R4, RZ",
        "IMAD.HI.U32 R3, R3, R5, R2",
        "IMAD.HI.U32 R6, R3, UR8, RZ",
        "EXIT",
        block=(100, 0, 0),
    )
    assert done.registers["R6"] == 100 // 7


def test_flags_in_an_unwritten_register_and_joined_conditions_are_followed():
    done = follow(
        "LOP3.LUT R7, R7, 0xfffffffe, RZ, 0xc0, !PT",
        "LOP3.LUT R7, R7, 0x1, RZ, 0xfc, !PT",
        "LOP3.LUT P0, RZ, R7, 0x1, RZ, 0xc0, !PT",
        "LOP3.LUT P1, RZ, R7, 0x2, RZ, 0xc0, P0",
        "@P1 BRA `(0x60)",
        "EXIT",
        "EXIT",
    )
    assert done.issued[-1] == 6
    assert done.guesses == set()


def test_a_condition_on_numbers_is_false_and_told_of():
    lines = ["FSETP.GT.AND P0, PT, R0, R1, PT", "@P0 BRA `(0x30)", "EXIT", "EXIT"]
    done = follow(*lines)
    assert done.issued == [0, 1, 2]
    assert done.guesses == {1}
    with pytest.raises(warps.CannotFollow, match="depends on numbers"):
        follow("FSETP.GT.AND P0, PT, R0, R1, PT", "@!P0 BRA `(0x0)", "EXIT")


def test_equal_words_are_read_at_once_and_equal_banks_one_by_one():
    lanes = warps.LANE * 4
    assert warps.wavefronts(lanes.tobytes(), 4) == 1
    assert warps.wavefronts((lanes * 0).tobytes(), 4) == 1
    assert warps.wavefronts((lanes * 32).tobytes(), 4) == 32
    assert warps.wavefronts((lanes * 4).tobytes(), 16) == 4


def test_flags_are_those_of_the_build():
    setup = (ROOT / "setup.py").read_text()
    for flag in kernels.FLAGS.split():
        name, _, value = flag.partition("=")
        assert name in setup
        assert value in setup


def test_without_a_tool_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda *unused, **wide: None)
    kernels.build.cache_clear()
    monkeypatch.setattr("sys.argv", ["read_kernels.py"])
    with pytest.raises(UsageError, match=r"^reading kernels needs nvcc, and it was not found: .+\.$"):
        load_tool("read_kernels").main()

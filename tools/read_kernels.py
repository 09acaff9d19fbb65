"""Read from the CUDA operators' machine code what they will cost: compiles and disassembles, needs no GPU.

Prints registers, shared memory, spills, the instructions of hot loops by unit, issue slots a tile, and an
estimate of the time at the shapes of the documentation, with its assumptions.
"""

from __future__ import annotations

from lf_dense.benchmark import kernels
from lf_dense.errors import run_tool, tool_parser


def main() -> None:
    parser = tool_parser(description=__doc__)
    kernels.add_options(parser)
    kernels.run_command_line(parser.parse_args())


if __name__ == "__main__":
    run_tool(main)

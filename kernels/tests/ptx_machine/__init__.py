"""A GPU's threads on the CPU: runs the PTX of a kernel, and finds what a kernel must not do.

    program       PTX text to instructions; the programs of a grid, one after the other
    instructions  those that compute
    memory        those that touch memory: loads, stores, bulk copies, barriers
    hopper        the Hopper decode kernel, compiled as for a launch and run so
    assembly      a block of inline assembly by itself

Why: Gluon has no interpreter, and the decode kernel that most of a serving GPU's time goes to is written in
it, with inline PTX for look-ups, bulk copies and mbarriers. Without the machine `make test` could only
compile it. With it the whole kernel runs on the CPU against attention in float64, in about a second a case:
every width of keys and values, head dimension, number of rows, window, cap, sink, anchor and merge.

What it finds besides a wrong result, each of which would be luck to see on a GPU (`memory.Fault`):

- a page read before its copy has come, or while the next one is on its way: copies come at the last moment;
- a wait that would never return, and a copy that none waits for;
- an access outside of a buffer, or of shared memory, or not aligned;
- a word of shared memory that another warp has touched since the last barrier;
- a register or shared memory read before it was written: it holds random bits, so results differ;
- a barrier that not all threads reach.

What it does not find: faults between lanes of one warp, which run together here; timing, registers and
spills, which `aot` has from the compiler; what an approximation such as `ex2.approx` costs, since they are
exact here. `test_ptx_machine.py` holds the machine to this list with small kernels that each have one fault.
"""

from ptx_machine.memory import Fault, Memory
from ptx_machine.program import Program

__all__ = ["Fault", "Memory", "Program"]

"""What the PTX machine must find in a kernel, in small ones that do it."""

import numpy as np
import pytest
from ptx_machine import Fault, Memory, Program

BYTES = 256
START = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0)
.reqntid 64
{
    .reg .pred p, first; .reg .b32 r<9>; .reg .b64 buffer, thread;
    mov.u32 r0, %tid.x;
    setp.eq.s32 first, r0, 0;
    mov.u32 r1, global_smem;
    shl.b32 r2, r0, 2;
    add.s32 r3, r1, r2; // a word of each thread
    ld.param.b64 buffer, [kernel_param_0];
    mad.wide.s32 thread, r0, 4, buffer;
"""
COPY = """
    @first mbarrier.init.shared::cta.b64 [r1], 1;
    bar.sync 0;
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [r1], 128;
    @first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [r1+256], [buffer], 128, [r1];
"""
WAIT = "{ .reg .pred done; W: mbarrier.try_wait.parity.shared::cta.b64 done, [r1], 0; @!done bra.uni W; }"


def run(body: str) -> np.ndarray:
    """The words 0, 1, 2, ... of a buffer after a program of 64 threads, with 512 bytes of shared memory."""
    buffer = np.arange(BYTES // 4, dtype=np.uint32).view(np.uint8)
    memory = Memory([buffer])
    Program(START + body + "ret; }").run((1, 1), memory, [memory.address(0)], 512)
    return buffer.view(np.uint32)


def test_what_is_copied_has_come_after_the_wait():
    result = run(COPY + WAIT + "ld.shared.b32 r4, [r1+264]; st.global.b32 [thread], r4;")
    assert (result == 2).all()


def test_a_barrier_shows_what_other_warps_have_written():
    result = run(
        "st.shared.b32 [r3], r0; bar.sync 0; xor.b32 r4, r2, 252; add.s32 r4, r4, r1;"
        "ld.shared.b32 r5, [r4]; st.global.b32 [thread], r5;"
    )
    assert result.tolist() == list(range(63, -1, -1))


def test_some_threads_store():
    result = run("mov.b32 r4, 7; @first st.global.b32 [buffer+16], r4;")
    assert result.tolist() == [7 if i == 4 else i for i in range(64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 r4, [thread+4];", "4 bytes at 256 of buffer 0"),
        ("ld.global.v2.b32 {r4, r5}, [buffer+4];", "8 bytes at 4 of buffer 0"),
        ("ld.global.b32 r4, [thread+68719476736];", "in no buffer"),
        ("st.shared.b32 [r3+512], r0;", "of shared memory"),
        ("add.s32 r4, r3, 2; ld.shared.b32 r5, [r4];", "of shared memory"),
        ("st.shared.b32 [r1], r0;", "different values at one place"),
        ("st.shared.b32 [r3], r0; xor.b32 r4, r3, 128; ld.shared.b32 r5, [r4];", "another warp has touched"),
        ("ld.shared.b32 r5, [r3]; xor.b32 r4, r3, 128; st.shared.b32 [r4], r0;", "another warp has touched"),
        ("@first bra L; mov.u32 r4, r0; L:", "threads of a program part"),
        ("@first bar.sync 0;", "not all threads arrive"),
        ("L: bra L;", "does not end"),
        (COPY, "on its way"),
        (COPY + "ld.shared.b32 r4, [r1+256];", "on its way"),
        (COPY + "bar.sync 0; st.shared.b32 [r1+256], r1;", "on its way"),
        (COPY.replace("_, [r1], 128", "_, [r1], 144") + WAIT, "never ends: 0 arrivals and 16 bytes"),
        (COPY + WAIT + WAIT.replace("[r1], 0", "[r1], 1"), "never ends: 1 arrivals and 0 bytes"),
        (COPY.replace("[r1+256]", "[r1+264]"), "16 bytes"),
        (WAIT, "no mbarrier"),
    ],
)
def test_faults(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"popc\.b32"):
        run("popc.b32 r4, r0;")


def test_what_was_never_written_is_no_zero():
    assert len(set(run("st.global.b32 [thread], r8;").tolist())) > 60
    assert len(set(run("ld.shared.b32 r4, [r3]; st.global.b32 [thread], r4;").tolist())) > 60

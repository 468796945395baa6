"""Memory of the PTX machine, and the instructions that touch it: loads, stores, copies, barriers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_machine.instructions import TYPES, Operation

SHARED_BASE = 0x1000
"""Where a program's shared memory begins, in the window of shared addresses."""
_BUFFER_BITS = 36


class Fault(Exception):
    """What a kernel must not do."""


class Memory:
    """Global memory: buffers far from each other, which are written in place."""

    def __init__(self, buffers: Sequence[np.ndarray]) -> None:
        """Each a vector of uint8."""
        self.buffers = buffers

    def address(self, buffer: int) -> int:
        return (buffer + 1) << _BUFFER_BITS

    def at(self, address: np.ndarray, size: int, kind: Any) -> tuple[np.ndarray, np.ndarray]:
        """A view of the buffer in which all of the accesses lie, and the index of each."""
        buffer = int(address[0] >> _BUFFER_BITS) - 1
        offset = address - self.address(buffer)
        if not 0 <= buffer < len(self.buffers):
            raise Fault(f"address {address[0]:#x} is in no buffer")
        data = self.buffers[buffer]
        wrong = (offset < 0) | (offset + size > len(data)) | (offset % size != 0)
        if wrong.any():
            raise Fault(f"{size} bytes at {offset[wrong][0]} of buffer {buffer}, which has {len(data)}")
        width = np.dtype(kind).itemsize
        return data[: len(data) // width * width].view(kind), offset // width


@dataclass
class _Barrier:
    """An mbarrier."""

    count: int
    pending: int
    bytes: int = 0
    """That are expected and have not come."""
    phase: int = 0
    copies: list[tuple[slice, np.ndarray]] = field(default_factory=list)


class Cta:
    """A program that runs: registers, shared memory, and who has touched it since the last barrier."""

    def __init__(self, registers: list[np.ndarray], threads: int, memory: Memory, shared_bytes: int) -> None:
        random = np.random.default_rng(0)
        self.registers = registers
        self.threads = threads
        self.everyone = np.ones(threads, dtype=bool)
        self.warp_bit = (1 << np.arange(threads) // 32).astype(np.uint8)
        self.memory = memory
        self.shared = random.integers(0, 256, -(-shared_bytes // 16) * 16, dtype=np.uint8)
        self.written = np.zeros(len(self.shared) // 4, dtype=np.uint8)
        self.read = np.zeros_like(self.written)
        self.in_flight = np.zeros(len(self.written), dtype=bool)
        self.barriers: dict[int, _Barrier] = {}

    # Shared memory

    def offsets(self, address: np.ndarray, size: int) -> np.ndarray:
        offset = address - SHARED_BASE
        wrong = (offset < 0) | (offset + size > len(self.shared)) | (offset % size != 0)
        if wrong.any():
            raise Fault(f"{size} bytes at {offset[wrong][0]} of {len(self.shared)} of shared memory")
        return offset

    def touch(self, words: np.ndarray, warp_bit: np.ndarray, changed: np.ndarray | None) -> None:
        """Notes that warps read words, or write them: `changed` says where to another value."""
        others = self.written[words] & ~warp_bit
        if self.in_flight[words].any():
            raise Fault(
                f"word {words[self.in_flight[words]][0]} of shared memory, to which a copy is on its way"
            )
        if changed is None:
            race = (others != 0) & (self.written[words] & warp_bit == 0)
        else:
            race = changed & (others | self.read[words] & ~warp_bit != 0)
        if race.any():
            raise Fault(f"word {words[race][0]} of shared memory, which another warp has touched")
        marks = self.read if changed is None else self.written
        for bit in np.unique(warp_bit):
            marks[words[np.broadcast_to(warp_bit == bit, words.shape)]] |= bit

    def load_shared(self, mask: np.ndarray, address: np.ndarray, kind: Any, count: int) -> np.ndarray:
        """[count, threads], zeros of threads that do not take part."""
        width = np.dtype(kind).itemsize
        offset = self.offsets(address[mask], width * count)
        self.touch(_words(offset, width * count), self.warp_bit[mask, None], None)
        values = np.zeros((count, self.threads), dtype=kind)
        values[:, mask] = self.shared.view(kind)[offset // width + np.arange(count)[:, None]]
        return values

    def store_shared(self, mask: np.ndarray, address: np.ndarray, values: Sequence[np.ndarray]) -> None:
        count, width = len(values), values[0].itemsize
        offset = self.offsets(address[mask], width * count)
        words = _words(offset, width * count)
        before = self.shared.view(np.uint32)[words]
        index = offset[:, None] // width + np.arange(count)
        data = np.stack([x[mask] for x in values], axis=1)
        view = self.shared.view(values[0].dtype)
        view[index] = data
        if (view[index] != data).any():
            raise Fault("threads store different values at one place of shared memory")
        self.touch(words, self.warp_bit[mask, None], self.shared.view(np.uint32)[words] != before)

    # Bulk copies

    def barrier(self, address: int) -> _Barrier:
        if address not in self.barriers:
            raise Fault(f"no mbarrier at {address - SHARED_BASE} of shared memory")
        return self.barriers[address]

    def copy(
        self, mask: np.ndarray, to: np.ndarray, source: np.ndarray, size: int, barrier: np.ndarray
    ) -> None:
        for thread in np.flatnonzero(mask):
            if to[thread] % 16 or source[thread] % 16 or size % 16:
                raise Fault("a bulk copy that is not aligned to 16 bytes")
            data, first = self.memory.at(source[thread : thread + 1] // 16 * 16, 16, np.uint8)
            begin = int(self.offsets(to[thread : thread + 1], 16)[0])
            if first[0] + size > len(data) or begin + size > len(self.shared):
                raise Fault(f"a bulk copy of {size} bytes from {first[0]} of {len(data)} to {begin}")
            words = np.arange(begin // 4, (begin + size) // 4)
            self.touch(words, self.warp_bit[thread], np.ones(len(words), dtype=bool))
            self.in_flight[words] = True
            arrival = self.barrier(int(barrier[thread]))
            arrival.copies.append((slice(begin, begin + size), data[first[0] : first[0] + size]))

    def wait(self, mask: np.ndarray, address: np.ndarray, parity: np.ndarray) -> np.ndarray:
        for at in np.unique(address[mask]):
            mine = mask & (address == at)
            barrier = self.barrier(int(at))
            if (parity[mine] != parity[mine][0]).any():
                raise Fault("threads wait for different phases of an mbarrier")
            if barrier.phase % 2 != parity[mine][0]:
                continue
            for to, data in barrier.copies:
                self.shared[to] = data
                barrier.bytes -= len(data)
                words = slice(to.start // 4, to.stop // 4)
                self.in_flight[words] = False
                self.written[words] = np.bitwise_or.reduce(self.warp_bit[mine])
            barrier.copies.clear()
            if barrier.pending or barrier.bytes:
                missing = f"{barrier.pending} arrivals and {barrier.bytes} bytes"
                raise Fault(f"a wait that never ends: {missing} are missing")
            barrier.phase += 1
            barrier.pending = barrier.count
        return mask


def _words(offset: np.ndarray, size: int) -> np.ndarray:
    """Words of shared memory, [accesses, words of each]."""
    return offset[:, None] // 4 + np.arange(max(1, size // 4))


def _synchronize(cta: Cta, mask: np.ndarray, _: np.ndarray) -> None:
    if not mask.all():
        raise Fault("a barrier at which not all threads arrive")
    cta.written.fill(0)
    cta.read.fill(0)


def _initialize(cta: Cta, mask: np.ndarray, address: np.ndarray, count: np.ndarray) -> None:
    cta.store_shared(mask, address, [np.zeros(cta.threads, dtype=np.uint64)])
    for at in address[mask]:
        cta.barriers[int(at)] = _Barrier(int(count[0]), int(count[0]))


def _expect(cta: Cta, mask: np.ndarray, address: np.ndarray, size: np.ndarray) -> None:
    for at in address[mask]:
        barrier = cta.barrier(int(at))
        barrier.bytes += int(size[0])
        barrier.pending -= 1
        if barrier.pending < 0:
            raise Fault("more arrivals at an mbarrier than its phase awaits")


def _copy(
    cta: Cta, mask: np.ndarray, to: np.ndarray, source: np.ndarray, size: np.ndarray, *rest: Any
) -> None:
    cta.copy(mask, to, source, int(size[0]), rest[0])


def _add_atomically(cta: Cta, mask: np.ndarray, address: np.ndarray, value: np.ndarray) -> np.ndarray:
    data, index = cta.memory.at(address[mask], 4, np.uint32)
    before = np.zeros_like(value)
    for thread, i in zip(np.flatnonzero(mask), index, strict=True):
        before[thread] = data[i]
        data[i] += value[thread]
    return before


def _matrix_rows(address: np.ndarray, matrix: int) -> np.ndarray:
    """Where each lane's word of an 8 x 8 matrix is; eight lanes have the addresses of its rows."""
    if (address % 16 != 0).any():
        raise Fault("rows of a matrix that are not aligned to 16 bytes")
    rows = address.reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
    return (rows[:, :, None] + 4 * np.arange(4)).ravel()


def _store_matrices(cta: Cta, mask: np.ndarray, address: np.ndarray, *values: np.ndarray) -> None:
    for i, value in enumerate(values):
        cta.store_shared(mask, _matrix_rows(address, i), [value])


def _load_matrices(count: int) -> Callable[..., Any]:
    def load(cta: Cta, mask: np.ndarray, address: np.ndarray) -> Any:
        parts = [cta.load_shared(mask, _matrix_rows(address, i), np.uint32, 1)[0] for i in range(count)]
        return parts[0] if count == 1 else tuple(parts)

    return load


def _load(space: str, kind: str, count: int) -> Callable[..., Any]:
    width = TYPES[kind].itemsize

    def load(cta: Cta, mask: np.ndarray, address: np.ndarray) -> Any:
        if space == "shared":
            values = cta.load_shared(mask, address, TYPES[kind], count)
        else:
            values = np.zeros((count, cta.threads), dtype=TYPES[kind])
            data, index = cta.memory.at(address[mask], width * count, TYPES[kind])
            values[:, mask] = data[index + np.arange(count)[:, None]]
        return values[0] if count == 1 else tuple(values)

    return load


def _store(space: str, kind: str, count: int) -> Callable[..., Any]:
    width = TYPES[kind].itemsize

    def store(cta: Cta, mask: np.ndarray, address: np.ndarray, *values: np.ndarray) -> None:
        if space == "shared":
            cta.store_shared(mask, address, values)
        else:
            data, index = cta.memory.at(address[mask], width * count, TYPES[kind])
            for i, value in enumerate(values):
                data[index + i] = value[mask]

    return store


def _accesses() -> Iterator[tuple[str, Operation]]:
    for space in ("global", "shared"):
        for count, vector in ((1, ""), (2, ".v2"), (4, ".v4")):
            for kind in ("b8", "b16", "b32", "b64"):
                for hint in ("", ".cg"):
                    name = f"{space}{hint}{vector}.{kind}"
                    yield f"ld.{name}", Operation(kind, ("address",), _load(space, kind, count), True)
                yield (
                    f"st.{space}{vector}.{kind}",
                    Operation(None, ("address", kind), _store(space, kind, count), True),
                )


_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
_COPY_SOURCES = ("address", "address", "u32", "address", "b64")
_NOTHING = Operation(None, ("b32",), lambda *_: None, True)
EFFECTS = {
    **dict(_accesses()),
    "bar.sync": Operation(None, ("b32",), _synchronize, True),
    "bar.warp.sync": _NOTHING,
    "fence.proxy.async.shared::cta": _NOTHING,
    "griddepcontrol.launch_dependents": _NOTHING,
    "atom.global.gpu.acq_rel.add.u32": Operation("u32", ("address", "u32"), _add_atomically, True),
    "mbarrier.init.shared::cta.b64": Operation(None, ("address", "u32"), _initialize, True),
    "mbarrier.arrive.expect_tx.shared::cta.b64": Operation("b64", ("address", "u32"), _expect, True),
    "mbarrier.try_wait.parity.shared::cta.b64": Operation("pred", ("address", "u32"), Cta.wait, True),
    _COPY: Operation(None, _COPY_SOURCES, _copy, True),
    f"{_COPY}.L2::cache_hint": Operation(None, _COPY_SOURCES, _copy, True),
    **{
        f"stmatrix.sync.aligned.m8n8.x{n}.shared.b16": Operation(
            None, ("address", "b32"), _store_matrices, True
        )
        for n in (1, 2, 4)
    },
    **{
        f"ldmatrix.sync.aligned.m8n8.x{n}.shared.b16": Operation("b32", ("address",), _load_matrices(n), True)
        for n in (1, 2, 4)
    },
}

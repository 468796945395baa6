"""Runs the PTX of a kernel on the CPU: a test of what Triton compiles for a GPU that is not at hand.

The programs of a grid (CTAs) run one after the other, the threads of one together, an instruction at a time,
in NumPy arrays. What a GPU leaves open is at its worst here, and what it would not notice is a `Fault`:

- Registers and shared memory hold random bits at first.
- An access of global memory lies in one buffer, one of shared memory in the program's, both aligned.
- A bulk copy comes at the last moment, when its mbarrier is waited for; until then none may touch its
  destination. A wait that would never return is a fault, as is a copy that none has waited for.
- Between two barriers of the program no warp reads a word of shared memory that another has written, nor
  writes another value to one that another has read or written.
- Threads of a program branch together.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_instructions import OPERATIONS, TYPES, Operation

SHARED_BASE = 0x1000
"""Where a program's shared memory begins, in the window of shared addresses."""
_BUFFER_BITS = 36
_MOST_STEPS = 1_000_000


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


def _prefetch(cta: Cta, mask: np.ndarray, address: np.ndarray) -> None:
    cta.memory.at(address[mask], 1, np.uint8)


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
_EFFECTS = {
    **dict(_accesses()),
    "bar.sync": Operation(None, ("b32",), _synchronize, True),
    "bar.warp.sync": _NOTHING,
    "fence.proxy.async.shared::cta": _NOTHING,
    "prefetch.global.L2": Operation(None, ("address",), _prefetch, True),
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


class _Scope:
    """Names of a block of PTX: registers, each by its number, and labels."""

    def __init__(self, parent: "_Scope | None" = None) -> None:
        self.parent = parent
        self.names: dict[str, int] = {}

    def find(self, name: str) -> int | None:
        if name in self.names or self.parent is None:
            return self.names.get(name)
        return self.parent.find(name)


_STATEMENT = re.compile(r"\s*(?:(\{)|(\})|([\w$]+)\s*:(?!:)|([^;]+);)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_REGISTER = re.compile(r"([%$\w.]+?)(?:<(\d+)>)?$")


class Program:
    """A kernel, or a piece of inline assembly, ready to run."""

    def __init__(self, ptx: str) -> None:
        size = re.search(r"\.reqntid (\d+)", ptx)
        self.threads = int(size[1]) if size else 32
        self.parameters = re.findall(r"\.param \.[uf](\d+) .*?(\w+_param_\d+)", ptx)
        self._random = np.random.default_rng(1)
        self.registers: list[np.ndarray] = []
        self.names = _Scope()
        for bits, name in (("32", "%ctaid.x"), ("32", "%ctaid.y"), ("32", "%tid.x"), *self.parameters):
            self._declare(self.names, name, f"b{bits}")
        self.registers[self.names.names["%tid.x"]] = np.arange(self.threads, dtype=np.uint32)
        begin = ptx.index("{", ptx.index(".entry")) if ".entry" in ptx else 0
        self.text: list[str] = []
        scopes = self._split(re.sub(r"//.*|^\s*\.loc.*", "", ptx[begin:], flags=re.MULTILINE))
        self.steps = [self._step(text, scope) for text, scope in zip(self.text, scopes, strict=True)]

    def _declare(self, scope: _Scope, name: str, kind: str) -> None:
        scope.names[name] = len(self.registers)
        bits = self._random.integers(0, 256, (self.threads, 8), dtype=np.uint8)
        if kind == "pred":
            self.registers.append(bits[:, 0] < 128)
        else:
            self.registers.append(bits[:, : TYPES[kind].itemsize].copy().view(TYPES[kind])[:, 0])

    def _split(self, ptx: str) -> list[_Scope]:
        """Cuts a text into its statements, and declares their names; returns the scope of each."""
        scope, scopes, at = self.names, [], 0
        while match := _STATEMENT.match(ptx, at):
            opened, closed, label, text = match.groups()
            at = match.end()
            if opened:
                scope = _Scope(scope)
            elif closed:
                assert scope.parent is not None
                scope = scope.parent
                if scope is self.names:
                    break
            elif label:
                scope.names[label] = len(self.text)
            elif text.startswith(".reg"):
                _, kind, names = text.split(None, 2)
                for item in names.split(","):
                    name, count = _REGISTER.match(item.strip()).groups()
                    for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                        self._declare(scope, register, kind[1:])
            elif not text.startswith("."):
                self.text.append(text.strip())
                scopes.append(scope)
        return scopes

    def _register(self, text: str, kind: str, scope: _Scope) -> int | None:
        """The number of a register, made for a constant; None where a result is dropped."""
        if text == "_":
            return None
        number = scope.find(text)
        if number is None and text.startswith("$"):
            self._declare(self.names, text, "b32")
            number = self.names.names[text]
        if number is None:
            number = len(self.registers)
            self.registers.append(
                np.full(self.threads, _constant(text), dtype=np.uint64).astype(_storage(kind))
            )
        return number

    def _sources(self, operands: list[str], kinds: Sequence[str], scope: _Scope) -> list[Any]:
        """Of each source a function that reads it from the registers."""
        readers = []
        for i, operand in enumerate(operands):
            kind = kinds[min(i, len(kinds) - 1)]
            if operand.startswith("["):
                name, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
                shared = scope.find(name) is not None and self.registers[scope.find(name)].itemsize == 4
                number = self._register(name, "b32" if shared else "b64", scope)
                readers.append(_reader(number, None, int(offset or 0)))
            else:
                readers.append(_reader(self._register(operand, kind, scope), TYPES[kind], 0))
        return readers

    def _step(self, text: str, scope: _Scope) -> Callable[[Cta], int | None]:
        guard, negated = None, False
        if text.startswith("@"):
            condition, text = text.split(None, 1)
            negated = condition[1] == "!"
            guard = scope.find(condition.lstrip("@!"))
        name, *rest = text.split(None, 1)
        groups = _OPERAND.findall(rest[0]) if rest else []
        if name in ("bra", "bra.uni"):
            return _branch(guard, negated, scope.find(groups[0]))
        if name == "ret":
            return _branch(guard, negated, len(self.text))
        if name.startswith("ld.param."):
            name, groups[1] = name.replace("ld.param", "mov"), groups[1].strip("[]")
        elif name == "mov.b32" and rest[0].count("{"):
            name = "unpack.b32" if groups[0].startswith("{") else "pack.b32"
        operation = _EFFECTS.get(name) or OPERATIONS.get(name)
        if operation is None:
            raise NotImplementedError(f"{name}: an instruction that the machine does not know, in: {text}")
        parts = [re.split(r"[\s,|]+", group.strip("{} ")) if group[0] != "[" else [group] for group in groups]
        results = []
        if operation.result:
            results = [self._register(x, operation.result, scope) for x in parts.pop(0)]
        sources = self._sources([x for part in parts for x in part], operation.sources, scope)
        return _computation(operation, guard, negated, results, sources)

    def run(
        self,
        grid: tuple[int, int],
        memory: Memory,
        arguments: Sequence[int],
        shared_bytes: int,
        *,
        backwards: bool = False,
    ) -> None:
        """Runs all programs of a grid, in its order or backwards. Arguments are the bits of parameters.

        Raises Fault where the kernel does what it must not.
        """
        ctas = [(x, y) for y in range(grid[1]) for x in range(grid[0])]
        for x, y in reversed(ctas) if backwards else ctas:
            values = {"%ctaid.x": x, "%ctaid.y": y}
            # Triton appends pointers to scratch memory, of which these kernels have none.
            names = (name for _, name in self.parameters)
            values |= dict(zip(names, [*arguments, 0, 0], strict=True))
            cta = Cta(self.registers.copy(), self.threads, memory, shared_bytes)
            for name, value in values.items():
                number = self.names.names[name]
                cta.registers[number] = np.full_like(self.registers[number], value)
            self._run(cta)

    def _run(self, cta: Cta) -> None:
        at = 0
        with np.errstate(all="ignore"):
            for _ in range(_MOST_STEPS):
                if at == len(self.steps):
                    break
                try:
                    target = self.steps[at](cta)
                except Fault as fault:
                    raise Fault(f"{self.text[at]}: {fault}") from None
                at = at + 1 if target is None else target
            else:
                raise Fault(f"a program that does not end within {_MOST_STEPS} instructions")
        if cta.in_flight.any():
            raise Fault("a program ends while a bulk copy to its shared memory is on its way")


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Runs a piece of assembly: 32-bit registers named `$...` before and after it."""
    program = Program(text)
    for name, value in registers.items():
        number = program._register(name, "b32", program.names)
        program.registers[number] = np.full(program.threads, value, dtype=np.uint32)
    cta = Cta(program.registers, program.threads, Memory([]), 0)
    program._run(cta)
    return {name: int(cta.registers[i][0]) for name, i in program.names.names.items() if name[0] == "$"}


def _storage(kind: str) -> Any:
    """How registers hold a type: its bits."""
    return np.bool_ if kind == "pred" else np.dtype(f"u{np.dtype(TYPES[kind]).itemsize}")


def _constant(text: str) -> int:
    if text == "global_smem":
        return SHARED_BASE
    text = text.rstrip("U")
    value = int(text[2:], 16) if text.startswith(("0f", "0F")) else int(text, 0)
    return value & 0xFFFF_FFFF_FFFF_FFFF


def _reader(number: int | None, kind: Any, offset: int) -> Callable[[list[np.ndarray]], np.ndarray]:
    if kind is None:
        return lambda registers: registers[number].astype(np.int64) + offset
    return lambda registers: registers[number].view(kind)


def _branch(guard: int | None, negated: bool, target: int) -> Callable[[Cta], int | None]:
    def step(cta: Cta) -> int | None:
        taken = cta.everyone if guard is None else cta.registers[guard] != negated
        if taken.all():
            return target
        if taken.any():
            raise Fault("threads of a program part")
        return None

    return step


def _computation(
    operation: Operation, guard: int | None, negated: bool, results: list[int | None], sources: list[Any]
) -> Callable[[Cta], None]:
    kind = TYPES[operation.result] if operation.result else None
    storage = _storage(operation.result) if operation.result else None

    def step(cta: Cta) -> None:
        registers = cta.registers
        mask = None if guard is None else registers[guard] != negated
        if mask is not None and not mask.any():
            return
        values = [read(registers) for read in sources]
        if operation.effect:
            values = [cta, cta.everyone if mask is None else mask, *values]
        found = operation.function(*values)
        for number, value in zip(results, found if isinstance(found, tuple) else (found,), strict=False):
            if number is not None:
                new = np.asarray(value).astype(kind, copy=False).view(storage)
                registers[number] = new if mask is None else np.where(mask, new, registers[number])

    return step

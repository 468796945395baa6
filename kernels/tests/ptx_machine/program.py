"""PTX text to instructions, and how they run.

The programs of a grid (CTAs) run one after the other, the threads of one together, an instruction at a time,
in NumPy arrays. What a GPU leaves open is at its worst here, and what it would not notice is a `Fault`:

- Registers and shared memory hold random bits at first.
- An access of global memory lies in one buffer, one of shared memory in the program's, both aligned.
- A bulk copy comes at the last moment, when its mbarrier is waited for; until then none may touch its
  destination. A wait that would never return is a fault, as is a copy that none has waited for.
- Between two barriers of the program no warp reads a word of shared memory that another has written, nor
  writes another value to one that another has read or written.
- Threads of a program branch together.

What only the lanes of one warp could see is not found: they run together.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx_machine.instructions import OPERATIONS, TYPES, Operation
from ptx_machine.memory import EFFECTS, SHARED_BASE, Cta, Fault, Memory

_MOST_STEPS = 1_000_000
_STATEMENT = re.compile(r"\s*(?:(\{)|(\})|([\w$]+)\s*:(?!:)|([^;]+);)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_REGISTERS = re.compile(r"([%\w]+)(?:<(\d+)>)?")


class _Scope:
    """Names of a block of PTX: registers, each by its number, and labels."""

    def __init__(self, parent: "_Scope | None" = None) -> None:
        self.parent = parent
        self.names: dict[str, int] = {}

    def find(self, name: str) -> int | None:
        if name in self.names or self.parent is None:
            return self.names.get(name)
        return self.parent.find(name)


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
                for name, count in _REGISTERS.findall(names):
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
        operation = EFFECTS.get(name) or OPERATIONS.get(name)
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
        parameters = dict(zip((name for _, name in self.parameters), arguments, strict=True))
        ctas = [(x, y) for y in range(grid[1]) for x in range(grid[0])]
        for x, y in reversed(ctas) if backwards else ctas:
            self.run_cta(memory, {"%ctaid.x": x, "%ctaid.y": y, **parameters}, shared_bytes)

    def run_cta(self, memory: Memory, values: dict[str, int], shared_bytes: int) -> dict[str, np.ndarray]:
        """Runs one program, in which some registers hold a value at first; all registers after it."""
        cta = Cta(self.registers.copy(), self.threads, memory, shared_bytes)
        for name, value in values.items():
            number = self.names.names[name]
            cta.registers[number] = np.full_like(self.registers[number], value)
        self._run(cta)
        return {name: cta.registers[number] for name, number in self.names.names.items()}

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

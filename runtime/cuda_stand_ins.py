"""Stand-ins for the CUDA libraries that PyTorch's default build is linked against.

    python cuda_stand_ins.py SITE_PACKAGES

PyPI carries PyTorch for x86-64 Linux in its CUDA build only. Its libraries, 2.7 GB and half of what the CPU
image would be, are never called without a GPU, but `import torch` fails unless the loader finds them and
every function whose address PyTorch takes. `Dockerfile.cpu` leaves them out and runs this: it writes an empty
shared object for each library that is missing, and one that defines all the functions. The CUDA runtime
(`libcudart`, 2 MB) stays real: PyTorch calls it to find that there is no GPU.
"""

import re
import struct
import sys
from pathlib import Path

LIBRARY = re.compile(
    r"lib(cu(blas|blasLt|dnn|fft|file|pti|rand|solver|sparse|sparseLt)|nccl|nvrtc|nvshmem_host)\.so\.\d+"
)
FUNCTION = re.compile(r"(cublas|cudnn|cufft|cuFile|cupti|curand|cusolver|cusparse|nccl|nvrtc|nvshmem)\w*")

CARRIER = "libnccl.so.2"
"""The stand-in that defines the functions, and needs the others, so that all are loaded with PyTorch as the
real ones are. The loader refuses a function that is asked for with a version of the library that should
define it if it finds that library without versions; of NCCL none has a version."""

_SECTION_HEADER, _SYMBOL, _DYNSYM = 64, 24, 11


def needed_and_undefined(library: Path) -> tuple[set[str], set[str]]:
    """All strings of a library's dynamic string table, and the names of its undefined symbols."""
    data = library.read_bytes()
    sections_at, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    sections = [
        struct.unpack_from("<2I4Q2I2Q", data, sections_at + i * _SECTION_HEADER) for i in range(count)
    ]
    symbols = next(section for section in sections if section[1] == _DYNSYM)
    strings_at, strings_size = sections[symbols[6]][4:6]
    strings = data[strings_at : strings_at + strings_size]

    undefined = set()
    for at in range(symbols[4], symbols[4] + symbols[5], _SYMBOL):
        name_at, _, _, section = struct.unpack_from("<I2BH", data, at)
        if section == 0:
            undefined.add(strings[name_at : strings.index(b"\0", name_at)].decode())
    return {text.decode() for text in strings.split(b"\0")}, undefined


def shared_object(soname: str, functions: list[str], needed: list[str]) -> bytes:
    """An x86-64 ELF shared object of that name, defining functions that nobody may call, needing libraries.

    One segment, loaded at address 0, holds everything: headers, hash table, symbols, strings, dynamic section
    (System V ABI, chapters 4 and 5).
    """
    hash_at = 64 + 2 * 56
    names = [name.encode() + b"\0" for name in functions]
    strings = b"\0" + soname.encode() + b"\0"
    symbols = bytes(_SYMBOL)
    for name in names:
        # A global function in some section, at an address that cannot be executed.
        symbols += struct.pack("<I2BH2Q", len(strings), 0x12, 0, 1, hash_at, 0)
        strings += name
    needed_at = []
    for library in needed:
        needed_at.append(len(strings))
        strings += library.encode() + b"\0"

    buckets, chains = [0] * max(1, len(names)), [0] * (len(names) + 1)
    for index, name in enumerate(names, start=1):
        bucket = _hash(name[:-1]) % len(buckets)
        chains[index], buckets[bucket] = buckets[bucket], index
    counts = (len(buckets), len(chains))
    table = struct.pack(f"<{2 + sum(counts)}I", *counts, *buckets, *chains)
    table += bytes(-len(table) % 8)

    symbols_at = hash_at + len(table)
    strings_at = symbols_at + len(symbols)
    strings += bytes(-len(strings) % 8)
    dynamic_at = strings_at + len(strings)
    # NEEDED each, SONAME, HASH, SYMTAB, SYMENT, STRTAB, STRSZ, end
    entries = [number for at in needed_at for number in (1, at)]
    entries += [14, 1, 4, hash_at, 6, symbols_at, 11, _SYMBOL, 5, strings_at, 10, len(strings), 0, 0]
    dynamic = struct.pack(f"<{len(entries)}Q", *entries)
    size = dynamic_at + len(dynamic)

    # 64 bits, little endian; ET_DYN for x86-64; no entry point, no section headers, two program headers.
    header = struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<2I6Q", 1, 6, 0, 0, 0, size, size, 4096)  # readable and writable
    dynamic_header = struct.pack("<2I6Q", 2, 6, *[dynamic_at] * 3, *[len(dynamic)] * 2, 8)
    return header + load + dynamic_header + table + symbols + strings + dynamic


def _hash(name: bytes) -> int:
    """The ABI's symbol hash."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value


def main(site_packages: Path) -> None:
    """Writes the stand-ins beside PyTorch's own libraries, where its run path looks last."""
    folder = site_packages / "torch" / "lib"
    sonames, functions = {CARRIER}, set()
    for library in folder.glob("*.so"):
        strings, undefined = needed_and_undefined(library)
        sonames |= {text for text in strings if LIBRARY.fullmatch(text)}
        functions |= {name for name in undefined if FUNCTION.fullmatch(name)}
    others = sorted(sonames - {CARRIER})
    (folder / CARRIER).write_bytes(shared_object(CARRIER, sorted(functions), others))
    for soname in others:
        (folder / soname).write_bytes(shared_object(soname, [], []))
    print(f"{CARRIER} defines {len(functions)} functions and stands with {', '.join(others)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

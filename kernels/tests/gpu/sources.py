"""Which sources a GPU run vouches for."""

import hashlib
from pathlib import Path

import turboquant_kernels

_PACKAGE = Path(turboquant_kernels.__file__).parent
_NO_KERNEL = ("bench/", "__init__.py", "aot.py", "checkpoint.py", "cli.py", "plans.py", "validation.py")


def digest() -> str:
    """A hash of the kernels, of what they are made from and of their launch configurations."""
    state = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        name = path.relative_to(_PACKAGE).as_posix()
        if path.suffix in (".py", ".json") and not name.startswith(_NO_KERNEL):
            state.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()

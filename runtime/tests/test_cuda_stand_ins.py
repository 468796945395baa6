"""The stand-ins for CUDA libraries are shared objects that the system's own loader accepts."""

import ctypes
import importlib.util
import platform
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="they are made for x86-64 Linux"
)


@pytest.fixture(scope="module")
def stand_ins():
    path = Path(__file__).parents[1] / "cuda_stand_ins.py"
    spec = importlib.util.spec_from_file_location("cuda_stand_ins", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loader_finds_every_function(stand_ins, tmp_path: Path) -> None:
    functions = [f"cublasFunction{index}" for index in range(300)]
    library = tmp_path / "libcarrier.so.1"
    library.write_bytes(stand_ins.shared_object(library.name, functions, []))
    loaded = ctypes.CDLL(str(library))
    for function in functions:
        assert ctypes.cast(getattr(loaded, function), ctypes.c_void_p).value
    with pytest.raises(AttributeError):
        getattr(loaded, "cublasFunction300")  # noqa: B009  a name, not an attribute


def test_needed_libraries_are_loaded_with_it(stand_ins, tmp_path: Path) -> None:
    library = tmp_path / "libcarrier.so.2"
    library.write_bytes(stand_ins.shared_object(library.name, ["ncclFunction"], ["libstandin_absent.so.1"]))
    with pytest.raises(OSError, match=r"libstandin_absent\.so\.1"):
        ctypes.CDLL(str(library))


def test_the_libraries_and_functions_of_a_library_are_read(stand_ins, tmp_path: Path) -> None:
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    strings, _ = stand_ins.needed_and_undefined(library)
    assert "libc.so.6" in strings
    _, undefined = stand_ins.needed_and_undefined(library.with_name("libtorch_python.so"))
    assert "PyObject_Call" in undefined


SYSTEM = {"c", "dl", "gcc_s", "m", "pthread", "rt", "stdc++", "util"}
"""Libraries that every base image has, without `lib` and `.so`."""


def test_every_library_that_pytorch_needs_is_its_own_or_stood_in_for(stand_ins) -> None:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    own = {path.name for path in folder.iterdir()}
    needed = {
        text
        for library in folder.glob("*.so")
        for text in stand_ins.needed_and_undefined(library)[0]
        if re.fullmatch(r"lib[\w+]+\.so\.\d+", text)
    }
    others = {name for name in needed - own if name[3:].partition(".")[0] not in SYSTEM}
    # The CUDA runtime is installed, and the driver's library is opened only where there is a GPU.
    assert {name for name in others if not stand_ins.LIBRARY.fullmatch(name)} <= {
        "libcudart.so.13",
        "libcuda.so.1",
    }

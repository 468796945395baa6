"""Settings of all tests of the kernels.

One thread, since the tests compare bits and matrix products may round differently on more. One seed for each
test, so that a failure can be repeated; tests of what must hold for every input draw their own seeds. No
deadlines, since they fail on a busy machine.

Without a GPU, Triton kernels run in Triton's interpreter. The decorators decide at import, so this stands
before the first import of a kernel; the environment variable is taken back, so that child processes (an
engine, ahead-of-time compilation) find Triton as it is.
"""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]

hypothesis.settings.register_profile("kernels", deadline=None)
hypothesis.settings.load_profile("kernels")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run: the GPU, else Triton's interpreter on CPU tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"

"""One thread, since the tests compare bits and matrix products may round differently on more. One seed for
each test: products of one row and of many round differently too, which moved a stored code in 6 of 150 random
inputs of 80 vectors. No deadlines, since they fail on a busy machine."""

import hypothesis
import pytest
import torch

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

"""The kernels on a GPU: `make test-gpu`. What was found, and for which sources, stands in result.json."""

import json
import random

import pytest
import record
import sanitize
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@pytest.fixture(scope="module")
def found():
    """What was found, written whether or not it is good."""
    found = record.record(seed=random.randrange(1 << 31))
    record.RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return found


def test_random_cases_captured_steps_and_sanitizers(found):
    assert not record.problems(found)


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_sanitizer_ran(tool, found):
    for verdict in found[tool].values():
        if verdict.startswith("skipped"):
            pytest.skip(verdict)

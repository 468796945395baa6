"""The kernels on a GPU: `make test-gpu`. What was found, and for which sources, stands in result.json."""

import datetime
import json
import random
from pathlib import Path

import fuzz
import pytest
import sanitize
import sources
import torch
from cases import decode_variants

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DEVICE = torch.device("cuda")
RESULT = Path(__file__).parent / "result.json"


@pytest.fixture(scope="module")
def found():
    """What the tests of this file found; written if all of them ran, whether or not they passed."""
    found = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "sources": sources.digest(),
    }
    yield found
    if found.keys() >= {"fuzz", "graphs", *sanitize.TOOLS}:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module")
def sweeps():
    """The sanitizer's tools at work beside the tests before theirs, on variants that are compiled already."""
    fuzz.warm(DEVICE)
    return {tool: sanitize.Sweep.start(tool) for tool in sanitize.TOOLS}


def test_random_cases(found, sweeps):
    seed = random.randrange(1 << 31)
    print(f"seed {seed}")
    outcome = fuzz.run(seed=seed, device=DEVICE)
    found["fuzz"] = {
        "seed": seed,
        "cases": outcome.cases,
        "variants": len(outcome.variants),
        "failures": outcome.failures,
        "largest_error": float(f"{outcome.worst_error:.2e}"),
    }
    assert not outcome.failures


def test_captured_steps(found):
    draw = random.Random(0)
    variants = decode_variants()[::4]
    found["graphs"] = {"captured": len(variants), "passed": 0}
    for variant in variants:
        fuzz.check_graph(variant, draw, DEVICE)
        found["graphs"]["passed"] += 1


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_sanitizer(tool, found, sweeps):
    found[tool] = "failed"
    found[tool] = sweeps[tool].verdict()
    if found[tool].startswith("skipped"):
        pytest.skip(found[tool])

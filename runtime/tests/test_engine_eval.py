"""`tq eval` on real engines: the whole command on the CPU, and a cache whose pages are overwritten."""

import json
import os
import subprocess
import sys

import pytest

from turboquant_runtime.eval import engine
from turboquant_runtime.eval.workload import Text

pytestmark = pytest.mark.engine

TQ = "from turboquant_kernels.cli import main; main()"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    from models.texts import TEXTS

    path = tmp_path_factory.mktemp("texts") / "harbour.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


def test_the_command_measures_every_engine(gemma, text_file, tmp_path) -> None:
    command = [sys.executable, "-c", TQ, "eval", str(gemma), "--cache", "tq-k4v4", "--tokens", "256"]
    command += ["--text", str(text_file), "--json", "--plot", str(tmp_path / "kl.svg")]
    result = subprocess.run(
        [*command, "--log", str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ,
    )
    assert result.returncode == 0, result.stderr + (tmp_path / "log").read_text()
    document = json.loads(result.stdout)
    assert document["far_reason"] is None
    assert document["texts"] == [{"name": "harbour.txt", "tokens": 256, "scored": 127}]
    rows = {row["label"]: row for row in document["rows"]}
    assert list(rows) == ["bf16", "bf16, chunk 64", "fp8", "tq-k4v4"]
    floor, compressed = rows["bf16, chunk 64"], rows["tq-k4v4"]
    assert not floor["note"]
    assert floor["kl_mean"] < 0.05 * compressed["kl_mean"]
    assert 0 < compressed["kl_mean"] < 0.3  # .143 over whole texts, docs/fidelity.md
    assert compressed["kl_mean"] < compressed["kl_p99"]
    assert all(value is not None for value in compressed.values())
    assert 0 <= compressed["codes"] <= compressed["codes_planted"] == 12
    assert (tmp_path / "kl.svg").stat().st_size > 1000


def test_overwritten_pages_show(start_engine, gemma, text_file, tmp_path) -> None:
    """With the pages zeroed after each chunk, nothing of earlier chunks can be read but from them."""
    reference, compressed = (
        start_engine(
            gemma,
            cache,
            max_model_len=512,
            max_num_batched_tokens=128,
            kv_cache_memory_bytes=64 << 20,
        )
        for cache in ("auto", "tq-k4v4")
    )
    tokens = reference.llm.get_tokenizer()(text_file.read_text()).input_ids[:320]
    text, path = Text("harbour.txt", tokens), tmp_path / "0.float32"
    engine.write_reference(reference.llm, text, path)
    intact, _ = engine.compare(compressed.llm, text, path)
    model = compressed.runner.model
    compute = model.compute_logits

    def overwrite(*arguments):
        for tensor in compressed.kv_tensors.values():
            tensor.zero_()
        return compute(*arguments)

    model.compute_logits = overwrite
    try:
        zeroed, _ = engine.compare(compressed.llm, text, path)
    finally:
        model.compute_logits = compute
        compressed.forget()
    assert zeroed.mean() > 5 * intact.mean()
    assert zeroed.mean() > 1

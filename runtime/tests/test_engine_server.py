"""The metrics on a real OpenAI server, with its engine core and worker in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from turboquant_kernels.formats import BF16, KVFormat

pytestmark = pytest.mark.engine

MEMORY, BLOCK, MAX_LEN, LAYERS, KV_HEADS, HEAD_DIM = 16 << 20, 128, 4096, 4, 2, 128
RAW_BLOCKS = 4
"""Blocks that a sequence has beyond those of its tokens."""


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read().decode()

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[dict]:
        """The chunks of a streamed completion; closing the iterator cancels the request."""
        body = {
            "model": "dummy",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    def metrics(self) -> dict[str, float]:
        """Every sample without its labels."""
        families = text_string_to_metric_families(self.get("/metrics"))
        return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.fixture(scope="module")
def server(dummy_model, tmp_path_factory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = {
        "model": dummy_model("LLAMA"),
        "served-model-name": "dummy",
        "load-format": "dummy",
        "kv-cache-dtype": "tq-k4v4",
        "kv-cache-memory-bytes": MEMORY,
        "max-model-len": MAX_LEN,
        "max-num-batched-tokens": 512,
        "max-num-seqs": 4,
        "port": port,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        running = Server(port)
        deadline = time.monotonic() + 600
        while True:
            try:
                running.get("/health")
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(1)
        yield running
        process.terminate()


def test_capacity_and_gain_stand_on_the_engines_metrics(server: Server) -> None:
    metrics = server.metrics()
    token = LAYERS * KV_HEADS * KVFormat(4, 4).slot_bytes(HEAD_DIM)
    plain_token = LAYERS * KV_HEADS * BF16.slot_bytes(HEAD_DIM)
    blocks = MEMORY // (token * BLOCK)
    capacity = int(blocks / (MAX_LEN // BLOCK + RAW_BLOCKS) * MAX_LEN)
    baseline = MEMORY // (plain_token * BLOCK) * BLOCK
    assert metrics["turboquant_kv_capacity_tokens"] == capacity
    assert metrics["turboquant_kv_baseline_capacity_tokens"] == baseline
    assert metrics["turboquant_kv_capacity_gain_ratio"] == pytest.approx(capacity / baseline)
    assert metrics["turboquant_kv_bytes_per_token"] == token
    assert metrics["turboquant_kv_usage_ratio"] == 0


def test_used_tokens_follow_a_request_of_known_length(server: Server) -> None:
    prompt = [3 + i % 90 for i in range(100)]
    generated_before = server.metrics()["vllm:generation_tokens_total"]
    chunks = server.stream(prompt, max_tokens=3000)
    for _ in range(3):
        for _ in range(20):
            next(chunks)
        metrics = server.metrics()
        length = len(prompt) + metrics["vllm:generation_tokens_total"] - generated_before
        # The newest token is stored in the next step, whose block vLLM may have taken already.
        possible = {-(-tokens // BLOCK) + RAW_BLOCKS for tokens in (length - 1, length, length + 1)}
        assert used_blocks(metrics) in possible
        capacity = metrics["turboquant_kv_capacity_tokens"]
        assert metrics["turboquant_kv_headroom_tokens"] == capacity - metrics["turboquant_kv_used_tokens"]
    chunks.close()
    for _ in range(30):
        if server.metrics()["turboquant_kv_used_tokens"] == 0:
            return
        time.sleep(1)
    pytest.fail("a cancelled request still holds tokens")


def used_blocks(metrics: dict[str, float]) -> int:
    """Blocks that requests hold. Each counts as its share of the capacity, less than its tokens, since some
    hold no tokens."""
    blocks = MEMORY // (metrics["turboquant_kv_bytes_per_token"] * BLOCK)
    used = metrics["turboquant_kv_used_tokens"] / metrics["turboquant_kv_capacity_tokens"] * blocks
    assert used == pytest.approx(round(used), abs=1e-3)
    return round(used)


@pytest.mark.parametrize("shared", [0, 256], ids=["apart", "shared-prefix"])
def test_used_tokens_are_those_of_all_requests_and_a_shared_prefix_counts_once(
    server: Server, shared: int
) -> None:
    lengths = (290, 404)
    prefix = [5 + i % 70 for i in range(shared)]
    prompts = [prefix + [3 + (n + i * (n % 7 + 2)) % 90 for i in range(shared, n)] for n in lengths]
    before = server.metrics()["vllm:generation_tokens_total"]
    streams = []
    for prompt in prompts:
        streams.append(server.stream(prompt, max_tokens=3000))
        next(streams[-1])  # its prompt is computed, and its blocks can be found
    for _ in range(20):
        for stream in streams:
            next(stream)
    metrics = server.metrics()
    generated = metrics["vllm:generation_tokens_total"] - before
    # Neither crosses a block boundary: 290 and 404 tokens take 3 and 4 blocks up to 384 and 512.
    assert 0 < generated < 90
    assert used_blocks(metrics) == 3 + 4 - shared // BLOCK + 2 * RAW_BLOCKS
    for stream in streams:
        stream.close()

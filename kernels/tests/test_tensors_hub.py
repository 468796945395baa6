"""Key bits of a hub's model: the real client against a small server, which counts what it sends."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save, save_file

from turboquant_kernels.allocation import allocate
from turboquant_kernels.formats import TIERS
from turboquant_kernels.plans import KVPlan
from turboquant_kernels.tensors import Tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 4,
}


def weights() -> dict[str, torch.Tensor]:
    tensors = {"model.embed_tokens.weight": torch.zeros(100_000, 64)}
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn."
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(64)
        tensors[f"{name}q_proj.weight"] = torch.ones(128, 64)
        tensors[f"{name}k_proj.weight"] = torch.ones(64, 64) * (1 + 4 * layer)
    return tensors


class Hub(BaseHTTPRequestHandler):
    """Model information, a listing, and files, whole or in ranges."""

    files: dict[str, bytes]
    sent: dict[str, int]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return self.answer(
                200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
            )
        name = path.rsplit("/", 1)[-1]
        data, status = self.files.get(name), 200
        if data is None:
            return self.answer(404, b"")
        headers = {"ETag": '"x"', "X-Repo-Commit": COMMIT}
        if asked := self.headers.get("range"):
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.sent[name] = self.sent.get(name, 0) + len(data)
        return self.answer(status, data, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": save(weights())}
    handler = type("OneModel", (Hub,), {"files": files, "sent": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tq_allocate(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from turboquant_kernels.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "allocate", *arguments],
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_plan_of_a_hubs_model_is_that_of_its_folder(hub, tmp_path) -> None:
    run = tq_allocate(f"http://127.0.0.1:{hub.server_port}", "org/model", "--tier", "max-capacity", "--json")
    assert run.returncode == 0, run.stderr
    save_file(weights(), tmp_path / "model.safetensors")
    expected = allocate(TIERS["max-capacity"].on("cuda"), Tensors.of_folder(tmp_path), CONFIG)
    assert KVPlan.from_dict(json.loads(run.stdout)) == expected
    sent, whole = hub.RequestHandlerClass.sent["model.safetensors"], len(save(weights()))
    assert sent < whole / 50


def test_a_model_that_is_not_there_is_one_line() -> None:
    run = tq_allocate("http://127.0.0.1:9", "org/model")
    assert run.returncode == 2
    assert run.stderr.startswith("tq allocate: org/model on http://127.0.0.1:9 could not be read")
    assert len(run.stderr.splitlines()) == 1

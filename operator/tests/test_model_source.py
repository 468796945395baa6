"""Models from a hub, through the real client against a small server, and from folders and files."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from turboquant_kernels.checkpoint import Checkpoint
from turboquant_operator.api.spec import Architecture, Model
from turboquant_operator.model_source import facts_of, read_model, unsupported_source
from turboquant_operator.planner import ModelFacts, NoPlan

LLAMA = Path(__file__).parent / "planner" / "configs" / "llama-3.1-8b.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

INDEX = json.dumps({"metadata": {"total_size": 16060522240}, "weight_map": {"a": "model-1.safetensors"}})
MODELS: dict[str, dict[str, Any]] = {
    "org/counted": {
        "files": {"config.json": LLAMA.read_text()},
        "parameters": {"BF16": 1000, "F8_E4M3": 500},
    },
    "org/indexed": {"files": {"config.json": LLAMA.read_text(), "model.safetensors.index.json": INDEX}},
    "org/sized": {"files": {"config.json": LLAMA.read_text()}, "sizes": {"pytorch_model.bin": 4096}},
    "org/empty": {"files": {}},
    "org/broken": {"files": {"config.json": "<html>"}},
}
ERRORS = {
    "org/gated": (403, "GatedRepo"),
    "org/missing": (401, "RepoNotFound"),
    "org/busy": (503, ""),
}
ASK = """
import json, sys
from turboquant_operator.api.spec import Model
from turboquant_operator.model_source import read_public_model
for argument in sys.argv[1:]:
    answer = read_public_model(Model.model_validate_json(argument))
    print(json.dumps(answer if isinstance(answer, dict) else vars(answer)))
"""


class Hub(BaseHTTPRequestHandler):
    """The two endpoints of a hub that reading a model needs: model information and small files."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if path.startswith("api/models/"):
            self.information("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))

    def information(self, name: str, revision: str) -> None:
        if name in ERRORS:
            status, code = ERRORS[name]
            return self.answer(status, b"", {"X-Error-Code": code} if code else {})
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        model = MODELS[name]
        sizes = {file: len(text) for file, text in model["files"].items()} | model.get("sizes", {})
        body: dict[str, Any] = {
            "id": name,
            "sha": COMMIT,
            "siblings": [{"rfilename": file, "size": size} for file, size in sizes.items()],
        }
        if "parameters" in model:
            body["safetensors"] = {
                "parameters": model["parameters"],
                "total": sum(model["parameters"].values()),
            }
        return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, file: str) -> None:
        text = MODELS[name]["files"].get(file)
        if text is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hash(text)}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, text.encode(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(endpoint: str, *models: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """Documents or conditions, from a process of its own: the client reads HF_ENDPOINT when imported."""
    # A machine's own hub settings must not decide what is tested here.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", ASK, *map(json.dumps, models)],
        env={**inherited, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(endpoint: str) -> dict[str, dict[str, Any]]:
    names = [*MODELS, *ERRORS]
    found = ask(endpoint, *({"uri": f"hf://{name}"} for name in names))
    return dict(zip(names, found, strict=True))


def test_parameters_by_dtype_become_bytes(answers):
    assert answers["org/counted"]["weights"] == {"BF16": 2000, "F8_E4M3": 500}


def test_the_commit_is_kept(answers):
    assert answers["org/counted"]["revision"] == COMMIT


def test_the_index_gives_the_size_where_parameters_are_not_counted(answers):
    assert answers["org/indexed"]["weights"] == {"": 16_060_522_240}


def test_file_sizes_are_the_last_resort(answers):
    assert answers["org/sized"]["weights"] == {"": 4096}


def test_the_document_gives_facts(answers):
    found = facts_of(answers["org/indexed"], Architecture())
    assert isinstance(found, ModelFacts)
    assert (found.layers, found.weight_bytes) == (32, 16_060_522_240)


@pytest.mark.parametrize(
    ("name", "kind", "status", "reason", "told"),
    [
        ("org/gated", "Accepted", "False", "ModelAccessDenied", "credentialsSecretRef"),
        ("org/missing", "Accepted", "False", "ModelNotFound", "does not exist, or is private"),
        ("org/empty", "Accepted", "False", "ModelNotFound", "has no config.json"),
        ("org/broken", "Accepted", "False", "InvalidModel", "config.json is not JSON"),
        ("org/busy", "PlanFits", "Unknown", "HubUnreachable", "could not be read"),
    ],
)
def test_what_went_wrong_is_a_condition(answers, name, kind, status, reason, told):
    answer = answers[name]
    assert (answer["type"], answer["status"], answer["reason"]) == (kind, status, reason)
    assert told in answer["message"]


def test_a_revision_that_does_not_exist_is_named(endpoint):
    (answer,) = ask(endpoint, {"uri": "hf://org/counted", "revision": "v9"})
    assert answer["reason"] == "ModelNotFound"
    assert "org/counted@v9" in answer["message"]
    assert "no such revision" in answer["message"]


def test_an_unreachable_hub_names_the_endpoint_and_offline_mode():
    (answer,) = ask("http://127.0.0.1:9", {"uri": "hf://org/counted"})
    assert (answer["status"], answer["reason"]) == ("Unknown", "HubUnreachable")
    assert "http://127.0.0.1:9" in answer["message"]
    assert "HF_ENDPOINT" in answer["message"]


def test_given_facts_stand_in_for_an_unreachable_hub():
    given = {"layers": 2, "attentionHeads": 4, "keyValueHeads": 2, "headDim": 64}
    (answer,) = ask("http://127.0.0.1:9", {"uri": "hf://org/counted", "architecture": given})
    assert answer == {"config": {}, "weights": {}, "revision": ""}
    assert facts_of(answer, Architecture.model_validate(given)).layers == 2


def test_offline_mode_reads_the_cache_and_asks_nobody(tmp_path):
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(LLAMA.read_text())
    refs = tmp_path / "hub" / "models--org--cached" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found, missing = ask(
        "http://127.0.0.1:9", {"uri": "hf://org/cached"}, {"uri": "hf://org/other"}, **offline
    )
    assert found["revision"] == COMMIT
    assert missing["reason"] == "HubUnreachable"
    assert "HF_HUB_OFFLINE is set" in missing["message"]


@pytest.mark.parametrize("uri", ["s3://bucket/model", "oci://registry/image:1"])
def test_sources_that_are_not_served_yet_are_refused(uri):
    answer = unsupported_source(Model(uri=uri).uri)
    assert isinstance(answer, NoPlan)
    assert (answer.type, answer.reason) == ("Accepted", "UnsupportedModelSource")
    assert "hf:// or pvc://" in answer.message


@pytest.mark.parametrize(
    "document", [{}, {"config": 3}, {"config": {}, "weights": []}, {"config": {}, "weights": {"F": "1"}}]
)
def test_a_document_of_another_shape_gives_no_facts(document):
    assert facts_of(document, Architecture()).reason == "InvalidModelFacts"


def test_a_config_under_any_name_is_read(tmp_path):
    path = tmp_path / "llama.json"
    path.write_text(LLAMA.read_text())
    assert read_model(str(path)) == Checkpoint(json.loads(LLAMA.read_text()))


def test_a_folder_and_its_config_are_one_model(tmp_path):
    (tmp_path / "config.json").write_text(LLAMA.read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(10))
    assert read_model(str(tmp_path)) == read_model(str(tmp_path / "config.json"))
    assert read_model(str(tmp_path)).weights == {"": 10}

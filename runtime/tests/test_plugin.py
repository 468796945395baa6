"""Loading: the right adapter for the installed vLLM, none for a version that is not known."""

import sys
from types import ModuleType

import pytest

from turboquant_runtime import plugin


@pytest.fixture
def vllm_version(monkeypatch: pytest.MonkeyPatch):
    def pretend(version: str) -> None:
        module = ModuleType("vllm.version")
        module.__version__ = version
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.version", module)

    return pretend


def test_an_unsupported_version_is_left_alone_with_a_warning(
    vllm_version, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_version("0.32.0")
    monkeypatch.setattr(plugin.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    warnings = []
    monkeypatch.setattr(plugin.logger, "warning", warnings.append)
    plugin.register()
    (warning,) = warnings
    assert "0.32.0" in warning
    assert "0.25.1" in warning


@pytest.mark.parametrize(
    "arguments", [["--kv-cache-dtype", "tq-k4v4"], ["--kv_cache_dtype=tq-k4v4"], ["--kv-cache-dtype=tq-k9"]]
)
def test_an_unsupported_version_refuses_a_compressed_cache_in_one_line(
    vllm_version, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    vllm_version("0.32.0")
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "model", *arguments, "--port", "8000"])
    with pytest.raises(SystemExit) as refusal:
        plugin.register()
    assert "vLLM 0.32.0: it supports 0.25.1" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", ["0.25.1", "0.25.1+cpu", "0.33.0"])
def test_a_version_with_an_adapter_gets_it(
    vllm_version, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    vllm_version(version)
    adapter = ModuleType("adapter")
    calls = []
    adapter.install = lambda: calls.append("installed")
    name = {"0.25.1": "vllm_0_25", "0.33.0": "vllm_0_33"}[version.partition("+")[0]]
    modules = {f"turboquant_runtime.adapters.{name}": adapter}
    monkeypatch.setattr(plugin.importlib, "import_module", modules.__getitem__)
    plugin.register()
    assert calls == ["installed"]

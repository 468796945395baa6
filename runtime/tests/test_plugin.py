"""Loading: our platform and patches on a vLLM that is known, nothing on another."""

import sys
from types import ModuleType

import pytest

from turboquant_runtime import plugin


@pytest.fixture
def vllm_version(monkeypatch: pytest.MonkeyPatch):
    def pretend(version: str) -> None:
        module = ModuleType("vllm.version")
        module.__version__, module.__version_tuple__ = version, tuple(version.split("."))
        monkeypatch.setitem(sys.modules, "vllm.version", module)

    return pretend


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "0.32.1"])
def test_an_unsupported_version_is_left_alone_with_a_warning(
    vllm_version, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    vllm_version(version)
    monkeypatch.setattr(plugin.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    warnings = []
    monkeypatch.setattr(plugin.logger, "warning", warnings.append)
    plugin.register()
    (warning,) = warnings
    assert version in warning
    assert "0.32.0" in warning
    assert plugin.platform() is None


@pytest.mark.parametrize(
    "arguments", [["--kv-cache-dtype", "tq-k4v4"], ["--kv_cache_dtype=tq-k4v4"], ["--kv-cache-dtype=tq-k9"]]
)
def test_an_unsupported_version_refuses_a_compressed_cache_in_one_line(
    vllm_version, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    vllm_version("0.33.0")
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "model", *arguments, "--port", "8000"])
    with pytest.raises(SystemExit) as refusal:
        plugin.register()
    assert "vLLM 0.33.0: it supports 0.32.0" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu"])
def test_a_supported_version_gets_the_patches_and_the_platform(
    vllm_version, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    vllm_version(version)
    patches = ModuleType("patches")
    calls = []
    patches.install = lambda: calls.append("installed")
    monkeypatch.setitem(sys.modules, "turboquant_runtime.adapters.patches", patches)
    plugin.register()
    assert calls == ["installed"]
    assert plugin.platform() in plugin.PLATFORMS.values()


def test_another_platform_refuses_a_compressed_cache_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    class RocmPlatform:
        pass

    monkeypatch.setattr(vllm.platforms, "_current_platform", RocmPlatform())
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "model", "--kv-cache-dtype", "tq-k4v4"])
    with pytest.raises(SystemExit) as refusal:
        plugin.register()
    assert "RocmPlatform" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_builtin_platform_is_ours_or_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    for path, expected in ({"vllm.platforms.rocm.RocmPlatform": None} | plugin.PLATFORMS).items():
        monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", {"one": lambda path=path: path})
        assert plugin.platform() == expected

"""The children's manifests, literally, for the smallest and for the fullest object."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sample import OWNER, PLAN, spec

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_operator.builders.arguments import engine_arguments, model_path
from turboquant_operator.builders.children import (
    cache_claim,
    disruption_budget,
    plan_config_map,
    service,
    stored_document,
)
from turboquant_operator.builders.deployment import PROGRESS_MARGIN_SECONDS, Engine, affinity, deployment
from turboquant_operator.builders.inspection import inspection_pod
from turboquant_operator.builders.metadata import object_of_pod

HERE = Path(__file__).parent
FULLEST: dict[str, Any] = yaml.safe_load((HERE / "fullest_object.yaml").read_text())["spec"]


def literal(name: str) -> dict[str, dict[str, Any]]:
    """Expected manifests by kind."""
    documents = yaml.safe_load_all((HERE / f"{name}_children.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in documents}


def engine(**fields: Any) -> Engine:
    return Engine(**{"plan": PLAN, "image": "registry.test/runtime:1", **fields})


def test_children_of_the_smallest_object() -> None:
    expected, smallest = literal("smallest"), spec()
    assert deployment(OWNER, smallest, engine(revision="abc123")) == expected["Deployment"]
    assert service(OWNER, smallest) == expected["Service"]
    assert disruption_budget(OWNER) == expected["PodDisruptionBudget"]
    assert cache_claim(OWNER, smallest) is None


def test_children_of_the_fullest_object() -> None:
    expected, fullest = literal("fullest"), spec(**FULLEST)
    assert deployment(OWNER, fullest, engine()) == expected["Deployment"]
    assert service(OWNER, fullest) == expected["Service"]
    assert cache_claim(OWNER, fullest) == expected["PersistentVolumeClaim"]
    assert inspection_pod(OWNER, fullest, "registry.test/runtime:1", "source-1") == expected["Pod"]


def arguments(kv_plan: KVPlan | None = None, **fields: Any) -> list[str]:
    return engine_arguments(spec(**fields), "llama", PLAN, "", kv_plan)


def test_cpu_engine_gets_its_cache_in_bytes_and_no_compiler() -> None:
    found = arguments(accelerator={"type": "cpu"}, kvCache={"memory": "1Gi"})
    assert "--kv-cache-memory-bytes=1073741824" in found
    assert "--enforce-eager" in found
    assert not [argument for argument in found if argument.startswith("--gpu-memory")]


def test_models_own_dtype_is_vllms_auto() -> None:
    plan = PLAN.model_copy(update={"format": "bf16"})
    assert "--kv-cache-dtype=auto" in engine_arguments(spec(), "llama", plan, "", None)


def test_kv_plan_reaches_the_engine_beside_its_format() -> None:
    found = arguments(KVPlan.uniform(KVFormat(4, 4), 2))
    layer = '{"key_bits":4,"value_bits":4,"encoding":"mse","anchor":false}'
    document = f'{{"turboquant":{{"version":1,"seed":0,"layers":[{layer},{layer}]}}}}'
    assert f"--additional-config={document}" in found
    assert "--kv-cache-dtype=tq-k5v3" in found


def test_users_arguments_come_last() -> None:
    assert arguments(engine={"args": ["--max-num-seqs=64"]})[-1] == "--max-num-seqs=64"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("hf://org/name", "org/name"),
        ("pvc://claim", "/model"),
        ("pvc://claim/", "/model"),
        ("pvc://claim/a/b", "/model/a/b"),
    ],
)
def test_model_is_called_by_its_place(uri: str, path: str) -> None:
    assert model_path(uri) == path


def test_startup_timeout_is_one_number() -> None:
    manifest = deployment(OWNER, spec(engine={"startupTimeoutSeconds": 3605}), engine())["spec"]
    [container] = manifest["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 3610
    assert {"name": "VLLM_ENGINE_READY_TIMEOUT_S", "value": "3605"} in container["env"]
    assert manifest["progressDeadlineSeconds"] == 3605 + PROGRESS_MARGIN_SECONDS


def test_suspended_object_wants_no_replica() -> None:
    assert deployment(OWNER, spec(replicas=4, suspend=True), engine())["spec"]["replicas"] == 0


@pytest.mark.parametrize(("replicas", "surge"), [(1, 1), (2, 0)])
def test_only_the_only_replica_surges(replicas: int, surge: int) -> None:
    strategy = deployment(OWNER, spec(replicas=replicas), engine())["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": surge, "maxUnavailable": 1 - surge}


def test_replicas_and_service_do_not_touch_the_pod_template() -> None:
    """So that scaling and a new Service port roll nothing."""
    one = deployment(OWNER, spec(replicas=1), engine())["spec"]["template"]
    other = deployment(OWNER, spec(replicas=9, service={"port": 80}), engine())["spec"]["template"]
    assert one == other


def test_own_node_affinity_is_left_alone() -> None:
    own = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}
    assert affinity(own, "nvidia-h100-80gb") == own


def test_other_affinity_is_joined_by_that_to_the_planned_gpu() -> None:
    joined = affinity({"podAntiAffinity": {}}, "nvidia-h100-80gb")
    assert joined is not None
    assert set(joined) == {"podAntiAffinity", "nodeAffinity"}


@pytest.mark.parametrize("accelerator", ["cpu", "nvidia-unheard-of"])
def test_unknown_gpus_and_cpu_need_no_affinity(accelerator: str) -> None:
    assert affinity(None, accelerator) is None


def test_stored_document_is_read_back_for_its_model_alone() -> None:
    document = {"config": {"a": 1}, "weights": {}, "revision": "r"}
    stored = plan_config_map(OWNER, PLAN, None, document, "source-1")
    assert stored_document(stored, "source-1") == document
    assert stored_document(stored, "source-2") is None


def test_document_edited_by_hand_is_not_believed() -> None:
    stored = plan_config_map(OWNER, PLAN, None, {"config": {"num_hidden_layers": 8}}, "source-1")
    stored["data"]["model.json"] = stored["data"]["model.json"].replace("8", "9")
    assert stored_document(stored, "source-1") is None


@pytest.mark.parametrize(
    ("pod", "name"), [("my-llama-6d5f-x2x4z", "my-llama"), ("my-llama-inspect", "my-llama")]
)
def test_object_of_a_pod(pod: str, name: str) -> None:
    assert object_of_pod(pod) == name

"""What the engine is told: (object, plan) to vLLM's command-line arguments and environment."""

import json
from typing import Any

from turboquant_kernels.formats import BF16
from turboquant_kernels.plans import PLAN_KEY, KVPlan
from turboquant_operator.api.schema import parse_quantity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.planner.accelerators import CPU

ENGINE_PORT = 8000
"""The engine's port in its pod. `spec.service.port` is the Service's, which may be one below 1024."""

CACHE_DIRECTORY = "/cache"
"""The writable home of the engine's process: compiled kernels, configuration. Lost with the pod."""
WEIGHTS_DIRECTORY = "/weights"
"""Where a hub model's files are downloaded to; the cache claim where one is named."""
MODEL_DIRECTORY = "/model"
"""Where the claim of a pvc:// model is mounted."""


def claim_and_path(uri: str) -> tuple[str, str]:
    """The claim's name and the path inside it, of a pvc:// URI."""
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path.strip("/")


def model_path(uri: str) -> str:
    """What the engine calls the model: a path in the pod for pvc://, the hub's name for hf://."""
    if uri.startswith("pvc://"):
        return f"{MODEL_DIRECTORY}/{claim_and_path(uri)[1]}".rstrip("/")
    return uri.removeprefix("hf://")


def engine_arguments(
    spec: TurboQuantDeploymentSpec, name: str, plan: Plan, revision: str, kv_plan: KVPlan | None
) -> list[str]:
    """vLLM's arguments. The user's own come last and repeat none of these (a CEL rule sees to it)."""
    arguments = {
        "--model": model_path(spec.model.uri),
        "--served-model-name": spec.model.served_name or name,
        "--port": str(ENGINE_PORT),
        # bf16 stands for the model's own dtype, which vLLM calls auto.
        "--kv-cache-dtype": "auto" if plan.format == BF16.name else plan.format,
        "--max-model-len": str(plan.context_length),
        "--tensor-parallel-size": str(plan.tensor_parallel_size),
        "--pipeline-parallel-size": str(plan.pipeline_parallel_size),
    }
    if revision and spec.model.uri.startswith("hf://"):
        # The commit that the plan was made from: every replica serves the same weights, whenever it starts.
        arguments["--revision"] = revision
    if spec.kv_cache.memory is not None:
        arguments["--kv-cache-memory-bytes"] = str(parse_quantity(spec.kv_cache.memory))
    else:
        arguments["--gpu-memory-utilization"] = f"{spec.engine.gpu_memory_utilization_percent / 100:.2f}"
    if kv_plan is not None:
        arguments["--additional-config"] = json.dumps({PLAN_KEY: kv_plan.to_dict()}, separators=(",", ":"))

    flat = [f"{flag}={value}" for flag, value in arguments.items()]
    if spec.kv_cache.skip_layers:
        flat += ["--kv-cache-dtype-skip-layers", *map(str, spec.kv_cache.skip_layers)]
    if spec.accelerator.type == CPU:
        # The CPU image has no compiler, which graphs would call at start.
        flat.append("--enforce-eager")
    if spec.model.trust_remote_code:
        flat.append("--trust-remote-code")
    return flat + list(spec.engine.args)


def engine_environment(spec: TurboQuantDeploymentSpec) -> list[dict[str, Any]]:
    """The engine's environment. Secrets are named, never read; the user's variables come last."""
    environment: list[dict[str, Any]] = [
        {"name": "HOME", "value": CACHE_DIRECTORY},
        {"name": "VLLM_ENGINE_READY_TIMEOUT_S", "value": str(spec.engine.startup_timeout_seconds)},
    ]
    if not spec.model.uri.startswith("pvc://"):
        environment.append({"name": "HF_HOME", "value": WEIGHTS_DIRECTORY})
    if spec.service.api_key_secret_ref is not None:
        environment.append(_from_secret("VLLM_API_KEY", spec.service.api_key_secret_ref.name, "api-key"))
    environment += credentials(spec)
    environment += [e.model_dump(by_alias=True, exclude_none=True) for e in spec.engine.env]
    return environment


def credentials(spec: TurboQuantDeploymentSpec) -> list[dict[str, Any]]:
    """The hub token, for the engine and for the inspection pod."""
    secret = spec.model.credentials_secret_ref
    return [] if secret is None else [_from_secret("HF_TOKEN", secret.name, "token")]


def _from_secret(variable: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}

"""What the operator itself tells the engine is refused to the user: nothing is given twice."""

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.spec import OWNED_ENV, OWNED_FLAGS, TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.builders.arguments import engine_arguments, engine_environment

SPEC = TurboQuantDeploymentSpec.model_validate(
    {
        "model": {
            "uri": "hf://organisation/name",
            "trustRemoteCode": True,
            "credentialsSecretRef": {"name": "token"},
        },
        "kvCache": {"skipLayers": [0]},
        "service": {"apiKeySecretRef": {"name": "key"}},
    }
)
WITH_MEMORY = SPEC.model_copy(update={"kv_cache": SPEC.kv_cache.model_copy(update={"memory": "1Gi"})})
PLAN = Plan(
    format="tq-k4v4",
    key_bits=4,
    value_bits=4,
    tensor_parallel_size=2,
    gpus_per_replica=2,
    context_length=4096,
    weight_bytes_per_gpu=1,
    kv_bytes_per_token=1,
    baseline_kv_bytes_per_token=4,
    baseline_tokens=1,
    predicted_tokens=4,
    hash="0",
)


def test_every_flag_of_the_operator_is_owned_by_a_field() -> None:
    kv_plan = KVPlan(layers=(KVFormat(4, 4),))
    flags = {
        argument.partition("=")[0]
        for spec in (SPEC, WITH_MEMORY)
        for argument in engine_arguments(spec, "name", PLAN, "main", kv_plan)
        if argument.startswith("-")
    }
    assert flags - OWNED_FLAGS.keys() == set()


def test_every_variable_of_the_operator_is_owned_by_a_field() -> None:
    assert {variable["name"] for variable in engine_environment(SPEC)} - OWNED_ENV.keys() == set()

"""The plan's hash: what rolls the pods and what does not."""

import pytest

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_operator.planner import make_plan


@pytest.fixture
def digest(spec, facts):
    def of(revision="", kv_plan=None, **parts) -> str:
        answer = make_plan(spec(**parts), facts("llama-3.1-8b"), revision=revision, kv_plan=kv_plan)
        return answer.hash

    return of


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": {"contextLength": 4096}},
        {"kvCache": {"format": "tq-k4v4"}},
        {"kvCache": {"skipLayers": [0]}},
        {"kvCache": {"memory": "20Gi"}},
        {"parallelism": {"tensor": 2}},
        {"parallelism": {"pipeline": 2}},
        {"model": {"uri": "hf://organisation/other"}},
        {"model": {"uri": "hf://organisation/name", "revision": "v2"}},
        {"engine": {"args": ["--max-num-seqs=64"]}},
        {"engine": {"image": "registry.example/vllm:2"}},
        {"engine": {"env": [{"name": "A", "value": "b"}]}},
        {"engine": {"gpuMemoryUtilizationPercent": 80}},
        {"accelerator": {"type": "nvidia-h200-141gb"}},
        {"pod": {"nodeSelector": {"zone": "a"}}},
        {"service": {"apiKeySecretRef": {"name": "key"}}},
    ],
    ids=str,
)
def test_what_the_engine_is_started_with_changes_the_hash(digest, change):
    assert digest(**change) != digest()


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 5},
        {"suspend": True},
        {"planOnly": True},
        {"capacity": {"concurrentSequences": 2}},
        {"kvCache": {"quality": "max-capacity"}},
        {"service": {"type": "NodePort"}},
        {"capacity": {"contextLength": 131072}},
    ],
    ids=str,
)
def test_what_leaves_the_engine_as_it_is_keeps_the_hash(digest, change):
    assert digest(**change) == digest()


def test_two_spellings_of_one_memory_size_are_one_hash(digest):
    assert digest(kvCache={"memory": "2Gi"}) == digest(kvCache={"memory": "2048Mi"})


def test_another_commit_changes_the_hash(digest):
    assert digest(revision="a") != digest(revision="b")


def test_another_seed_in_the_kv_plan_changes_the_hash(digest):
    plans = [KVPlan.uniform(KVFormat(4, 4), 32, seed=seed) for seed in (0, 1)]
    assert digest(kv_plan=plans[0]) != digest(kv_plan=plans[1])


def test_the_hash_is_stable_across_releases_of_python_and_pydantic(digest):
    """A changed digest rolls every engine at an operator upgrade: change it knowingly."""
    assert digest() == "e6860221fded499d"

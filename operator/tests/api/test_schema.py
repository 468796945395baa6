"""What the API types share: names on the wire, frozen values, quantities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils import parse_quantity as reference
from pydantic import ValidationError

from turboquant_operator.api.schema import parse_quantity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec

SMALLEST = {"model": {"uri": "hf://organisation/name"}}
UNITS = ["", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"]


@given(st.decimals(0, 10**6, places=3), st.sampled_from(UNITS))
def test_quantity_is_read_as_kubernetes_reads_it(number: object, unit: str) -> None:
    assert parse_quantity(f"{number}{unit}") == int(reference(f"{number}{unit}"))


@pytest.mark.parametrize("text", ["", "Gi", "8GB", "8 Gi", "-1Gi", "1e9", ".5Gi"])
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 8Gi"):
        parse_quantity(text)


def test_fields_are_camel_case_on_the_wire_and_snake_case_in_python() -> None:
    spec = TurboQuantDeploymentSpec.model_validate({**SMALLEST, "kvCache": {"skipLayers": [3]}})
    assert spec.kv_cache.skip_layers == (3,)
    assert spec.model_dump(by_alias=True)["kvCache"]["skipLayers"] == (3,)


def test_values_cannot_be_changed() -> None:
    spec = TurboQuantDeploymentSpec.model_validate(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        spec.replicas = 3


def test_field_of_a_newer_version_is_ignored() -> None:
    assert TurboQuantDeploymentSpec.model_validate({**SMALLEST, "tomorrow": 1}).replicas == 1


@pytest.mark.parametrize(("given", "read"), [("auto", "auto"), (4, 4), ("4", 4)])
def test_tensor_parallel_size_is_auto_or_a_number(given: object, read: object) -> None:
    spec = TurboQuantDeploymentSpec.model_validate({**SMALLEST, "parallelism": {"tensor": given}})
    assert spec.parallelism.tensor == read

"""KV plans: the reader and the JSON schema accept the same documents."""

import copy
import json
from importlib.resources import files

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_kernels.formats import BF16, COMPRESSED_FORMATS, FP8, KVFormat
from turboquant_kernels.plans import DEFAULT_SEED, KVPlan

SCHEMA = json.loads(files("turboquant_kernels").joinpath("kv_plan.schema.json").read_text())

FORMATS = [
    BF16,
    FP8,
    *COMPRESSED_FORMATS,
    *(KVFormat(f.key_bits, f.value_bits, f.encoding, anchor=True) for f in COMPRESSED_FORMATS),
]

VALID = {
    "version": 1,
    "seed": 7,
    "layers": [{"key_bits": 4, "value_bits": 4, "encoding": "mse", "anchor": False}],
}


def schema_accepts(document) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(document)


def reader_accepts(document) -> bool:
    try:
        KVPlan.from_json(json.dumps(document))
    except ValueError:
        return False
    return True


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@given(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=5), st.integers(0, 2**64))
def test_a_written_plan_fits_the_schema_and_reads_back_the_same(layers, seed):
    plan = KVPlan(tuple(layers), seed)
    assert schema_accepts(plan.to_dict())
    assert KVPlan.from_json(json.dumps(plan.to_dict())) == plan


SCRAPS = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 4, 4.0, 4.5, 7, 8, 16, "4", "mse", "prod", "plain", "x", [], {}]
)


@given(st.dictionaries(st.sampled_from(["key_bits", "value_bits", "encoding", "anchor", "bits"]), SCRAPS))
def test_reader_and_schema_agree_on_any_layer(layer):
    document = {"version": 1, "layers": [layer]}
    assert reader_accepts(document) == schema_accepts(document)


@given(
    st.dictionaries(st.sampled_from(["version", "seed", "layers", "name"]), SCRAPS | st.just(VALID["layers"]))
)
def test_reader_and_schema_agree_on_any_document(document):
    assert reader_accepts(document) == schema_accepts(document)


def test_encoding_anchor_and_seed_have_defaults():
    plan = KVPlan.from_dict({"version": 1, "layers": [{"key_bits": 5, "value_bits": 3}]})
    assert plan == KVPlan((KVFormat(5, 3),), DEFAULT_SEED)


def test_a_uniform_plan_repeats_one_format():
    assert KVPlan.uniform(KVFormat(4, 4), 3).layers == (KVFormat(4, 4),) * 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "version is 2, this release reads 1"),
        (["seed"], -1, "seed is -1"),
        (["seed"], True, "seed is True"),
        (["layers"], [], "layers is not a list"),
        (["layers", 0], 4, r"layers\[0\] is 4"),
        (["layers", 0, "key_bits"], 7, r"layers\[0\]: key_bits 7 is not one of"),
        (["layers", 0, "key_bits"], "4", r"layers\[0\]: key_bits is '4', not an integer"),
        (["layers", 0, "encoding"], "zip", r"layers\[0\]: 'zip' is not a valid Encoding"),
        (["layers", 0, "anchor"], "no", r"layers\[0\]: anchor is 'no'"),
        (["layers", 0, "bits"], 4, r"layers\[0\]: unknown field 'bits'"),
        (["seeds"], 4, "unknown field 'seeds'"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    document = copy.deepcopy(VALID)
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        KVPlan.from_dict(document)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 1'])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match="KV plan: "):
        KVPlan.from_json(text)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"layers\[0\]: value_bits is missing"):
        KVPlan.from_dict({"version": 1, "layers": [{"key_bits": 4}]})

"""The engine's defaults and the flags of `engine.args` that change what its cache holds."""

import pytest

from turboquant_operator.planner import NoPlan
from turboquant_operator.planner.accelerators import catalogue
from turboquant_operator.planner.engine import engine_settings

H100 = catalogue()["nvidia-h100-80gb"]
A100 = catalogue()["nvidia-a100-80gb"]
B200 = catalogue()["nvidia-b200-180gb"]
L4 = catalogue()["nvidia-l4-24gb"]


@pytest.mark.parametrize(
    ("gpu", "block", "tokens", "sequences"),
    [
        (None, 128, 2048, 128),
        (B200, 16, 16384, 1024),
        (H100, 16, 8192, 1024),
        (A100, 16, 2048, 256),
        (L4, 16, 2048, 256),
    ],
)
def test_defaults_by_device(gpu, block, tokens, sequences):
    found = engine_settings((), gpu, 131_072)
    assert (found.block_tokens, found.batched_tokens, found.sequences) == (block, tokens, sequences)


@pytest.mark.parametrize(
    "args",
    [
        ["--max-num-batched-tokens=512"],
        ["--max-num-batched-tokens", "512"],
        ["--max_num_batched_tokens=512"],
        ["--max-num-batched=512"],
        ["--enable-prefix-caching", "--max-num-batched-tokens=.5K".replace(".5", "0.5")],
    ],
)
def test_every_spelling_of_a_flag_is_read(args):
    assert engine_settings(args, None, 4096).batched_tokens == 512


def test_the_default_step_is_no_larger_than_all_sequences_together():
    assert engine_settings(["--max-num-seqs=4"], None, 128).batched_tokens == 512
    assert (
        engine_settings(["--max-num-seqs=4", "--max-num-batched-tokens=999"], None, 128).batched_tokens == 999
    )


def test_throughput_mode_doubles_the_defaults():
    found = engine_settings(["--performance-mode=throughput"], None, 4096)
    assert (found.batched_tokens, found.sequences) == (4096, 256)


@pytest.mark.parametrize(
    "args",
    [
        ['--speculative-config={"method": "ngram", "num_speculative_tokens": 3}'],
        ["-sc", '{"model": "draft"}'],
        ["--spec-model=draft"],
        ["--speculative-config.model=draft"],
        ["--enable-lora"],
    ],
)
def test_models_beside_the_served_one_are_noticed(args):
    assert not engine_settings((), None, 4096).extra_models
    assert engine_settings(args, None, 4096).extra_models


def test_dtype_and_eager_are_read():
    found = engine_settings(["--dtype", "half", "--enforce-eager"], H100, 4096)
    assert (found.dtype, found.compiled) == ("float16", False)


def test_steps_overlap_on_gpus_unless_told_not_to():
    assert engine_settings((), H100, 4096).in_flight_tokens(pipeline=1) == 2 * 8192
    assert engine_settings(["--no-async-scheduling"], H100, 4096).in_flight_tokens(pipeline=1) == 8192
    assert engine_settings(["--async-scheduling"], None, 4096).in_flight_tokens(pipeline=1) == 2048


@pytest.mark.parametrize(
    "args", [["--max-num-seqs=many"], ["--block-size"], ["--dtype=int3"], ["--block-size=1.5"]]
)
def test_a_value_that_cannot_be_read_is_refused(args):
    answer = engine_settings(args, None, 4096)
    assert isinstance(answer, NoPlan)
    assert (answer.type, answer.reason) == ("Accepted", "InvalidEngineArgument")
    assert args[0].partition("=")[0] in answer.message


@pytest.mark.parametrize(
    "args",
    [
        ['--limit-mm-per-prompt={"image": 0}'],
        ["--limit-mm-per-prompt", '{"video": 1, "image":0}'],
        ["--limit-mm-per-prompt", "image=0"],
        ["--limit-mm-per-prompt.image=0"],
        ["--language-model-only"],
    ],
)
def test_text_alone_is_recognised(args):
    assert engine_settings((), None, 4096).images
    assert not engine_settings(args, None, 4096).images


def test_a_limit_of_images_is_no_ban():
    assert engine_settings(['--limit-mm-per-prompt={"image": 10}'], None, 4096).images

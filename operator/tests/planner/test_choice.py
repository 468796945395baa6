"""What is chosen, and what is answered where nothing can be."""

from dataclasses import replace
from typing import ClassVar

import pytest

from turboquant_kernels.formats import BF16, FP8, TIER_NAMES, KVFormat, base_format
from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.status import Plan
from turboquant_operator.planner import NoPlan, make_plan
from turboquant_operator.planner.accelerators import NodeGPUs


def planned(spec, facts, **more) -> Plan:
    answer = make_plan(spec, facts, **more)
    assert isinstance(answer, Plan), answer
    return answer


def refusal(spec, facts, **more) -> NoPlan:
    answer = make_plan(spec, facts, **more)
    assert isinstance(answer, NoPlan), answer
    return answer


class TestFormat:
    def test_auto_takes_the_best_tier_where_memory_suffices(self, spec, facts):
        assert planned(spec(), facts("llama-3.1-8b")).format == "tq-near-lossless"

    def test_auto_goes_down_a_tier_before_it_takes_a_second_gpu(self, spec, facts):
        plan = planned(spec(capacity={"concurrentSequences": 12}), facts("llama-3.1-8b"))
        assert (plan.format, plan.tensor_parallel_size) == ("tq-balanced", 1)
        assert any("tq-near-lossless holds 8 such sequences" in reason for reason in plan.reasons)

    def test_auto_takes_a_second_gpu_rather_than_a_tier_below_the_allowed(self, spec, facts):
        plan = planned(spec(capacity={"concurrentSequences": 16}), facts("llama-3.1-8b"))
        assert (plan.format, plan.tensor_parallel_size) == ("tq-near-lossless", 2)

    def test_auto_uses_the_lowest_tier_where_it_is_allowed(self, spec, facts):
        plan = planned(
            spec(capacity={"concurrentSequences": 16}, kvCache={"quality": "max-capacity"}),
            facts("llama-3.1-8b"),
        )
        assert (plan.format, plan.tensor_parallel_size) == ("tq-max-capacity", 1)

    def test_auto_never_goes_below_near_lossless_where_that_is_asked(self, spec, facts):
        plan = planned(
            spec(capacity={"concurrentSequences": 12}, kvCache={"quality": "near-lossless"}),
            facts("llama-3.1-8b"),
        )
        assert (plan.format, plan.tensor_parallel_size) == ("tq-near-lossless", 2)

    @pytest.mark.parametrize("name", ["bf16", "fp8", "tq-k4v4", "tq-k3v4-prod"])
    def test_a_named_format_is_obeyed(self, spec, facts, name):
        fmt = KVFormat.parse(name)
        plan = planned(spec(kvCache={"format": name}), facts("llama-3.1-8b"))
        assert (plan.format, plan.key_bits, plan.value_bits) == (name, fmt.key_bits, fmt.value_bits)

    @pytest.mark.parametrize("name", TIER_NAMES)
    def test_a_named_tier_takes_the_bytes_of_its_mean(self, spec, facts, name):
        plan = planned(spec(kvCache={"format": name}), facts("llama-3.1-8b"))
        fmt = base_format(name)
        assert (plan.format, plan.key_bits, plan.value_bits) == (name, fmt.key_bits, fmt.value_bits)
        assert plan.kv_bytes_per_token == 32 * 8 * fmt.slot_bytes(128)
        assert any(f"{name} stores keys with {fmt.key_bits} bits" in reason for reason in plan.reasons)

    @pytest.mark.parametrize("asked", ["auto", "tq-balanced", "tq-near-lossless"])
    def test_tiers_compress_models_with_a_key_bias_without_a_warning(self, spec, facts, asked):
        plan = planned(spec(kvCache={"format": asked}), facts("qwen2.5-7b"))
        assert plan.format == ("tq-near-lossless" if asked == "auto" else asked)
        assert not any("Warning" in reason for reason in plan.reasons)

    def test_a_format_for_all_layers_of_a_key_bias_model_is_obeyed_with_a_warning(self, spec, facts):
        plan = planned(spec(kvCache={"format": "tq-k4v4"}), facts("qwen2.5-7b"))
        assert plan.format == "tq-k4v4"
        assert any(reason.startswith("Warning:") for reason in plan.reasons)

    @pytest.mark.parametrize(
        ("changes", "args"),
        [
            ({"windows": (None,) * 27 + (4096,)}, []),
            ({"quantization": "modelopt"}, []),
            ({}, ["--load-format=pt"]),
            ({}, ["--load-format", "mistral"]),
        ],
    )
    def test_auto_leaves_a_key_bias_uncompressed_where_bits_cannot_be_dealt(self, spec, facts, changes, args):
        model, engine = replace(facts("qwen2.5-7b"), **changes), {"args": args}
        plan = planned(spec(engine=engine), model)
        assert plan.format == "bf16"
        assert "bias to its keys" in plan.reasons[0]
        named = planned(spec(kvCache={"format": "tq-balanced"}, engine=engine), model)
        assert any(reason.startswith("Warning:") for reason in named.reasons)

    @pytest.mark.parametrize("args", [["--load-format=safetensors"], ["--load-format", "auto"], []])
    @pytest.mark.parametrize("quantization", [None, "awq", "gptq", "fp8"])
    def test_auto_compresses_a_key_bias_where_bits_can_be_dealt(self, spec, facts, args, quantization):
        model = replace(facts("qwen2.5-7b"), quantization=quantization)
        assert planned(spec(engine={"args": args}), model).format == "tq-near-lossless"

    def test_fp8_on_cpu_warns_of_the_cpu_and_needs_heads_that_it_can_store(self, spec, facts):
        cpu = {"accelerator": {"type": "cpu"}, "capacity": {"contextLength": 2048}}
        cpu["kvCache"] = {"memory": "4Gi", "format": "fp8"}
        assert "Warning: the engine starts with fp8" in planned(spec(**cpu), facts("qwen3-0.6b")).reasons[1]
        assert refusal(spec(**cpu), facts("phi-2")).reason == "FormatNotYetSupported"

    def test_no_warning_without_a_key_bias(self, spec, facts):
        plan = planned(spec(kvCache={"format": "tq-k4v4"}), facts("qwen3-8b"))
        assert not any("Warning" in reason for reason in plan.reasons)

    def test_auto_leaves_a_head_dim_without_a_format_uncompressed(self, spec, facts, config):
        from turboquant_operator.planner import read_facts

        odd = read_facts({**config("llama-3.1-8b"), "head_dim": 112}, {"BF16": 16 * 10**9})
        assert planned(spec(), odd).format == "bf16"
        answer = refusal(spec(kvCache={"format": "tq-k4v4"}), odd)
        assert (answer.type, answer.reason) == ("Accepted", "FormatNotYetSupported")

    def test_skipped_layers_stay_in_the_models_dtype(self, spec, facts):
        plan = planned(spec(kvCache={"format": "tq-k4v4", "skipLayers": [0, 31]}), facts("llama-3.1-8b"))
        assert plan.kv_bytes_per_token == 30 * 8 * 132 + 2 * 8 * 512

    def test_a_skipped_layer_that_does_not_exist_is_refused(self, spec, facts):
        answer = refusal(spec(kvCache={"skipLayers": [32]}), facts("llama-3.1-8b"))
        assert (answer.type, answer.reason) == ("Accepted", "UnknownLayer")

    def test_what_layers_of_different_bytes_cost_beside_sliding_windows_is_told(self, spec, facts):
        gemma, own = facts("gemma-3-270m"), {"format": "tq-k4v4"}
        layers = tuple(KVFormat(8, 4) if i % 6 == 5 else KVFormat(4, 4) for i in range(gemma.layers))
        mixed = make_plan(spec(), gemma, kv_plan=KVPlan(layers))
        (told,) = [reason for reason in mixed.reasons if "padding" in reason]
        assert "27% of the cache is padding" in told
        for plan in (
            planned(spec(kvCache=own), gemma),
            planned(spec(kvCache=own | {"skipLayers": [0]}), gemma),
        ):
            assert "padding" not in " ".join(plan.reasons)


class TestImages:
    CPU: ClassVar = {"accelerator": {"type": "cpu"}, "capacity": {"contextLength": 8192}}

    def test_auto_leaves_a_model_with_bidirectional_images_uncompressed(self, spec, facts):
        plan = planned(spec(**self.CPU, kvCache={"memory": "8Gi"}), facts("gemma-3-4b"))
        assert plan.format == "bf16"
        assert "--limit-mm-per-prompt" in plan.reasons[0]

    def test_a_named_format_for_it_is_refused_with_the_way_out(self, spec, facts):
        answer = refusal(
            spec(**self.CPU, kvCache={"memory": "8Gi", "format": "tq-k4v4"}), facts("gemma-3-4b")
        )
        assert (answer.type, answer.reason) == ("Accepted", "UnsupportedAttention")
        assert "--limit-mm-per-prompt" in answer.message

    def test_text_alone_is_compressed(self, spec, facts):
        text = {"args": ['--limit-mm-per-prompt={"image": 0}']}
        plan = planned(spec(**self.CPU, kvCache={"memory": "8Gi"}, engine=text), facts("gemma-3-4b"))
        assert plan.format == "tq-near-lossless"

    def test_the_text_model_is_compressed(self, spec, facts):
        assert (
            planned(spec(**self.CPU, kvCache={"memory": "8Gi"}), facts("gemma-3-1b")).format
            == "tq-near-lossless"
        )


class TestKVPlan:
    def test_layers_of_a_plan_are_counted_one_by_one(self, spec, facts):
        layers = (KVFormat(8, 4),) * 8 + (KVFormat(4, 2),) * 24
        plan = planned(
            spec(kvCache={"planRef": {"name": "bits"}}), facts("llama-3.1-8b"), kv_plan=KVPlan(layers)
        )
        assert plan.kv_bytes_per_token == 8 * (8 * 196 + 24 * 100)
        assert (plan.format, plan.key_bits, plan.value_bits) == ("tq-k4v2", 5, 2)

    def test_a_plan_for_another_model_is_refused(self, spec, facts):
        answer = refusal(spec(), facts("llama-3.1-8b"), kv_plan=KVPlan.uniform(KVFormat(4, 4), 28))
        assert (answer.type, answer.reason) == ("Accepted", "KVPlanMismatch")
        assert "28 layers" in answer.message

    def test_anchors_are_refused_until_they_are_served(self, spec, facts):
        anchored = KVPlan.uniform(KVFormat(4, 4, anchor=True), 32)
        assert refusal(spec(), facts("llama-3.1-8b"), kv_plan=anchored).reason == "FormatNotYetSupported"

    def test_fp8_layers_in_a_plan_are_refused(self, spec, facts):
        mixed = KVPlan((FP8, *(KVFormat(4, 4),) * 31))
        assert refusal(spec(), facts("llama-3.1-8b"), kv_plan=mixed).reason == "FormatNotYetSupported"

    def test_a_plan_that_compresses_nothing_is_refused(self, spec, facts):
        plain = KVPlan.uniform(BF16, 32)
        assert refusal(spec(), facts("llama-3.1-8b"), kv_plan=plain).reason == "InvalidKVPlan"

    def test_layers_in_the_models_dtype_do_not_name_the_plan(self, spec, facts):
        mostly_plain = KVPlan((*(BF16,) * 31, KVFormat(4, 4)))
        assert planned(spec(), facts("llama-3.1-8b"), kv_plan=mostly_plain).format == "tq-k4v4"


class TestTensorParallelism:
    def test_auto_takes_the_fewest_gpus_that_hold_the_weights(self, spec, facts):
        assert planned(spec(), facts("llama-3.1-70b")).tensor_parallel_size == 4

    def test_an_explicit_size_is_obeyed(self, spec, facts):
        plan = planned(spec(parallelism={"tensor": 4}), facts("llama-3.1-8b"))
        assert (plan.tensor_parallel_size, plan.gpus_per_replica) == (4, 4)
        assert plan.weight_bytes_per_gpu == 4_015_130_560

    @pytest.mark.parametrize(
        ("name", "tensor", "why"),
        [
            ("llama-3.1-8b", 3, "32 attention heads"),
            ("qwen2.5-7b", 8, "28 attention heads"),
            ("qwen2.5-7b", 7, "4 KV heads"),
        ],
    )
    def test_a_size_that_does_not_divide_is_refused_with_why(self, spec, facts, name, tensor, why):
        answer = refusal(spec(parallelism={"tensor": tensor}), facts(name))
        assert (answer.type, answer.reason) == ("Accepted", "UnsupportedTensorParallelSize")
        assert why in answer.message

    def test_pipeline_stages_multiply_the_gpus(self, spec, facts):
        plan = planned(spec(parallelism={"tensor": 2, "pipeline": 2}), facts("llama-3.1-70b"))
        assert (plan.gpus_per_replica, plan.pipeline_parallel_size) == (4, 2)

    def test_more_gpus_than_a_node_has_do_not_fit(self, spec, facts):
        answer = refusal(spec(parallelism={"tensor": 16}), facts("llama-3.1-70b"))
        assert (answer.type, answer.reason) == ("PlanFits", "TooFewGPUs")


class TestMemory:
    def test_cpu_holds_what_kv_cache_memory_says(self, spec, facts):
        plan = planned(
            spec(
                accelerator={"type": "cpu"},
                kvCache={"memory": "4Gi", "format": "tq-k4v4"},
                capacity={"contextLength": 8192},
            ),
            facts("llama-3.1-8b"),
        )
        assert (plan.predicted_tokens, plan.baseline_tokens) == (119_506, 32_768)
        assert (plan.gpus_per_replica, plan.accelerator) == (0, "cpu")

    def test_the_raw_block_of_a_sequence_is_counted_and_told(self, spec, facts):
        cpu, cache = {"type": "cpu"}, {"memory": "4Gi", "format": "tq-k4v4"}

        def plan(context):
            asked = spec(accelerator=cpu, kvCache=cache, capacity={"contextLength": context})
            return planned(asked, facts("llama-3.1-8b"))

        # 4 blocks of 128 tokens, 132 bytes, 8 KV heads and 32 layers.
        assert any("each sequence takes 16.5 MiB" in reason for reason in plan(8192).reasons)
        assert plan(32768).predicted_tokens > plan(8192).predicted_tokens > plan(1024).predicted_tokens

    def test_a_tier_on_a_gpu_has_no_raw_block_yet(self, spec, facts):
        plan = planned(spec(kvCache={"format": "tq-balanced"}), facts("llama-3.1-8b"))
        assert plan.kv_bytes_per_token == 32 * 8 * 132
        assert not any("not compressed: each sequence" in reason for reason in plan.reasons)
        cache = {"memory": "16Gi", "format": "tq-balanced"}
        cpu = spec(accelerator={"type": "cpu"}, kvCache=cache)
        assert planned(cpu, facts("llama-3.1-8b")).kv_bytes_per_token == 32 * 8 * 134

    @pytest.mark.parametrize(
        ("accelerator", "size", "unit"), [("cpu", 64, 128), ("nvidia-h100-80gb", 24, 16)]
    )
    def test_blocks_that_a_compressed_cache_cannot_have_are_refused(
        self, spec, facts, accelerator, size, unit
    ):
        def asked(fmt):
            return spec(
                accelerator={"type": accelerator},
                kvCache={"memory": "4Gi", "format": fmt},
                engine={"args": [f"--block-size={size}"]},
                capacity={"contextLength": 8192},
            )

        answer = refusal(asked("tq-k4v4"), facts("llama-3.1-8b"))
        assert answer.reason == "InvalidEngineArgument"
        assert f"--block-size {size} is not a multiple of {unit}" in answer.message
        assert planned(asked("bf16"), facts("llama-3.1-8b"))

    def test_cpu_needs_no_weights(self, spec, facts):
        plan = planned(
            spec(accelerator={"type": "cpu"}, kvCache={"memory": "1Gi"}, capacity={"contextLength": 4096}),
            facts("mixtral-8x7b"),
        )
        assert plan.weight_bytes_per_gpu == 0

    def test_gpu_memory_of_the_cache_overrides_utilization(self, spec, facts):
        plan = planned(
            spec(kvCache={"memory": "16Gi", "format": "bf16"}, capacity={"contextLength": 8192}),
            facts("llama-3.1-8b"),
        )
        assert plan.predicted_tokens == 131_072

    def test_cache_memory_beyond_the_gpu_does_not_fit(self, spec, facts):
        answer = refusal(spec(kvCache={"memory": "70Gi"}, parallelism={"tensor": 1}), facts("llama-3.1-8b"))
        assert (answer.type, answer.reason) == ("PlanFits", "InsufficientMemory")

    def test_lower_utilization_holds_fewer_tokens(self, spec, facts):
        less = planned(spec(engine={"gpuMemoryUtilizationPercent": 60}), facts("llama-3.1-8b"))
        assert less.predicted_tokens < planned(spec(), facts("llama-3.1-8b")).predicted_tokens

    def test_too_much_asked_names_the_nearest_that_fits(self, spec, facts):
        answer = refusal(
            spec(
                accelerator={"type": "cpu"},
                kvCache={"memory": "1Gi", "format": "tq-k4v4"},
                capacity={"contextLength": 8192, "concurrentSequences": 16},
            ),
            facts("llama-3.1-8b"),
        )
        assert (answer.type, answer.status, answer.reason) == ("PlanFits", "False", "InsufficientMemory")
        assert "lower capacity.concurrentSequences to 3" in answer.message
        assert "raise kvCache.memory to 4493Mi" in answer.message

    def test_the_memory_that_is_named_as_way_out_fits(self, spec, facts):
        asked = {"contextLength": 8192, "concurrentSequences": 16}
        cache = {"memory": "4493Mi", "format": "tq-k4v4"}
        cpu = {"type": "cpu"}
        assert planned(spec(accelerator=cpu, kvCache=cache, capacity=asked), facts("llama-3.1-8b"))
        cache["memory"] = "4492Mi"
        assert refusal(spec(accelerator=cpu, kvCache=cache, capacity=asked), facts("llama-3.1-8b"))

    def test_a_lower_tier_that_would_fit_is_named(self, spec, facts):
        answer = refusal(
            spec(
                accelerator={"type": "cpu"},
                kvCache={"memory": "4Gi", "quality": "near-lossless"},
                capacity={"contextLength": 8192, "concurrentSequences": 12},
            ),
            facts("llama-3.1-8b"),
        )
        assert "allow kvCache.quality balanced" in answer.message

    def test_weights_that_do_not_fit_are_named(self, spec, facts):
        answer = refusal(
            spec(accelerator={"type": "nvidia-l4-24gb"}, parallelism={"tensor": 2}), facts("llama-3.1-70b")
        )
        assert answer.reason == "InsufficientMemory"
        assert "weights take 65.71 GiB" in answer.message

    def test_weights_without_files_are_counted_from_the_config_and_said_to_be(self, spec, facts):
        plan = planned(spec(parallelism={"tensor": 1}), facts("mistral-7b-v0.3"))
        assert plan.weight_bytes_per_gpu == 2 * 7_248_023_552
        assert "No weight files were read: 13.50 GiB are counted from the config." in plan.reasons

    def test_unknown_weights_are_asked_for(self, spec, facts):
        answer = refusal(spec(), facts("mixtral-8x7b"))
        assert (answer.status, answer.reason) == ("Unknown", "MissingModelFacts")
        assert "model.architecture.weightBytes" in answer.message


class TestContext:
    def test_the_models_maximum_is_the_default(self, spec, facts):
        assert planned(spec(), facts("llama-3.1-8b")).context_length == 131_072

    def test_more_than_the_models_maximum_is_refused(self, spec, facts):
        answer = refusal(spec(capacity={"contextLength": 200_000}), facts("llama-3.1-8b"))
        assert (answer.type, answer.reason) == ("Accepted", "ContextTooLong")

    def test_the_engines_own_permission_is_respected(self, spec, facts):
        permitted = spec(
            capacity={"contextLength": 200_000},
            engine={"env": [{"name": "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "value": "1"}]},
        )
        assert planned(permitted, facts("llama-3.1-8b")).context_length == 200_000


class TestAccelerator:
    H100 = NodeGPUs("NVIDIA-H100-80GB-HBM3", 8, 81_559)
    L4 = NodeGPUs("NVIDIA-L4", 4, 23_034)

    def test_auto_without_the_right_to_list_nodes_is_unknown(self, spec, facts):
        answer = refusal(spec(accelerator={"type": "auto"}), facts("llama-3.1-8b"))
        assert (answer.type, answer.status, answer.reason) == ("PlanFits", "Unknown", "NodesNotReadable")

    def test_auto_without_labelled_gpus_is_unknown(self, spec, facts):
        answer = refusal(spec(accelerator={"type": "auto"}), facts("llama-3.1-8b"), nodes=[])
        assert answer.reason == "NoAcceleratorFound"

    def test_an_unknown_name_is_unknown_and_near_names_are_told(self, spec, facts):
        answer = refusal(spec(accelerator={"type": "nvidia-h100-80"}), facts("llama-3.1-8b"))
        assert (answer.status, answer.reason) == ("Unknown", "UnknownAccelerator")
        assert "nvidia-h100-80gb" in answer.message

    def test_auto_prefers_fewer_gpus(self, spec, facts):
        asked = spec(accelerator={"type": "auto"}, capacity={"concurrentSequences": 4})
        plan = planned(asked, facts("llama-3.1-8b"), nodes=[self.L4, self.H100])
        assert (plan.accelerator, plan.gpus_per_replica) == ("nvidia-h100-80gb", 1)

    def test_auto_prefers_the_smaller_gpu_at_equal_numbers(self, spec, facts):
        plan = planned(spec(accelerator={"type": "auto"}), facts("gemma-3-270m"), nodes=[self.H100, self.L4])
        assert plan.accelerator == "nvidia-l4-24gb"

    def test_auto_stays_within_the_gpus_of_a_node(self, spec, facts):
        answer = refusal(spec(accelerator={"type": "auto"}), facts("llama-3.1-70b"), nodes=[self.L4])
        assert answer.reason == "InsufficientMemory"
        assert "4 GPUs of nvidia-l4-24gb" in answer.message

    def test_a_gpu_that_the_catalogue_lacks_is_planned_by_its_labels(self, spec, facts):
        plan = planned(
            spec(accelerator={"type": "auto"}),
            facts("llama-3.1-8b"),
            nodes=[NodeGPUs("NVIDIA-Next-192GB", 8, 196_608)],
        )
        assert plan.accelerator == "nvidia-next-192gb"

    V100 = NodeGPUs("Tesla-V100-SXM2-32GB", 8, 32_768, 7)

    @pytest.mark.parametrize("wanted", ["auto", "tq-k4v4"])
    def test_a_gpu_that_cannot_serve_compressed_caches_is_refused(self, spec, facts, wanted):
        asked = spec(accelerator={"type": "auto"}, kvCache={"format": wanted})
        answer = refusal(asked, facts("gemma-3-270m"), nodes=[self.V100])
        assert answer.reason == "UnsupportedAccelerator"
        assert "kvCache.format bf16" in answer.message

    def test_it_serves_uncompressed_ones(self, spec, facts):
        asked = spec(accelerator={"type": "auto"}, kvCache={"format": "bf16"})
        assert planned(asked, facts("gemma-3-270m"), nodes=[self.V100]).accelerator == "tesla-v100-sxm2-32gb"

    def test_beside_it_another_gpu_is_taken(self, spec, facts):
        plan = planned(
            spec(accelerator={"type": "auto"}), facts("gemma-3-270m"), nodes=[self.V100, self.H100]
        )
        assert plan.accelerator == "nvidia-h100-80gb"

    @pytest.mark.parametrize("wanted", ["auto", "tq-k4v4"])
    def test_float32_models_are_not_compressed_on_gpus(self, spec, facts, wanted):
        asked = spec(kvCache={"format": wanted}, engine={"args": ["--dtype=float32"]})
        answer = refusal(asked, facts("gemma-3-270m"))
        assert answer.reason == "InvalidEngineArgument"
        assert "--dtype=bfloat16" in answer.message

    def test_float32_models_are_compressed_on_cpus(self, spec, facts):
        asked = spec(
            accelerator={"type": "cpu"},
            kvCache={"format": "tq-k4v4", "memory": "1Gi"},
            engine={"args": ["--dtype=float32"]},
        )
        assert planned(asked, facts("gemma-3-270m")).format == "tq-k4v4"


class TestReport:
    def test_baseline_is_the_same_memory_in_the_models_dtype(self, spec, facts):
        compressed = planned(spec(kvCache={"format": "tq-k4v4"}), facts("llama-3.1-8b"))
        plain = planned(spec(kvCache={"format": "bf16"}), facts("llama-3.1-8b"))
        assert compressed.baseline_tokens == plain.predicted_tokens
        assert compressed.predicted_tokens / compressed.baseline_tokens == pytest.approx(512 / 132, rel=1e-3)

    def test_alternatives_name_other_formats_and_other_sizes(self, spec, facts):
        plan = planned(spec(), facts("llama-3.1-8b"))
        found = {(other.format, other.tensor_parallel_size) for other in plan.alternatives}
        assert found == {
            ("bf16", 1),
            ("fp8", 1),
            ("tq-balanced", 1),
            ("tq-max-capacity", 1),
            ("tq-near-lossless", 2),
            ("tq-near-lossless", 4),
            ("tq-near-lossless", 8),
        }

    def test_alternatives_say_whether_they_fit(self, spec, facts):
        plan = planned(spec(capacity={"concurrentSequences": 12}), facts("llama-3.1-8b"))
        fits = {other.format: other.fits for other in plan.alternatives if other.tensor_parallel_size == 1}
        assert fits == {"bf16": False, "fp8": False, "tq-near-lossless": False, "tq-max-capacity": True}

    def test_draft_models_are_said_not_to_be_counted(self, spec, facts):
        plan = planned(spec(engine={"args": ["--speculative-config={}"]}), facts("llama-3.1-8b"))
        assert "Memory of draft models and LoRA adapters is not counted." in plan.reasons

"""The CPU attention backend on small tensors, against attention written out over decoded keys and values."""

from types import SimpleNamespace

import pytest
import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_kernels.store.reference import block_mean

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
PLAN = KVPlan((KVFormat(4, 4, anchor=True), KVFormat(8, 2)), seed=5)


@pytest.fixture
def make_impl(monkeypatch: pytest.MonkeyPatch):
    from turboquant_runtime.backends import base, cpu

    config = SimpleNamespace(
        speculative_config=None,
        additional_config={"turboquant": PLAN.to_dict()},
        cache_config=SimpleNamespace(cache_dtype="tq-k4v4"),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: 2,
            get_head_size=lambda: HEAD_DIM,
            dtype=torch.float32,
            is_hybrid=False,
            max_model_len=1024,
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    monkeypatch.setattr(base, "get_current_vllm_config", lambda: config)

    def make(**arguments):
        defaults = {
            "num_heads": HEADS,
            "head_size": HEAD_DIM,
            "scale": HEAD_DIM**-0.5,
            "num_kv_heads": KV_HEADS,
            "kv_cache_dtype": "tq-k4v4",
        }
        return cpu.CompressedCPUImpl(**defaults | arguments)

    return make


def layer(index: int) -> SimpleNamespace:
    return SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn")


class Batch:
    """Sequences with `history` tokens in the cache and `new` ones in this step, in scattered blocks."""

    def __init__(self, history: list[int], new: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.history, self.new = history, new
        self.lens = [h + n for h, n in zip(history, new, strict=True)]
        blocks_each = max(-(-length // BLOCK_TOKENS) for length in self.lens) + 8  # 8 for a raw block
        order = torch.randperm(blocks_each * len(new), generator=generator)
        self.block_table = order.view(len(new), blocks_each).int()
        self.keys = [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in self.lens]
        self.values = [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in self.lens]
        self.queries = [torch.randn(n, HEADS, HEAD_DIM, generator=generator) for n in self.lens]

    def cache(self, fmt: KVFormat) -> torch.Tensor:
        shape = (self.block_table.numel(), KV_HEADS, BLOCK_TOKENS, fmt.token_bytes(HEAD_DIM))
        return torch.randint(255, shape, dtype=torch.uint8)

    def metadata(self, begin: list[int], end: list[int]):
        from turboquant_runtime.backends.cpu import CompressedCPUMetadataBuilder

        lens = torch.tensor([e - b for b, e in zip(begin, end, strict=True)])
        slots = [
            self.block_table[i, p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS
            for i, (b, e) in enumerate(zip(begin, end, strict=True))
            for p in range(b, e)
        ]
        common = SimpleNamespace(
            causal=True,
            num_actual_tokens=int(lens.sum()),
            query_start_loc=torch.cat((torch.zeros(1), lens.cumsum(0))).int(),
            seq_lens=torch.tensor(end).int(),
            block_table_tensor=self.block_table,
            slot_mapping=torch.tensor([*slots, -1, -1, -1]),
        )
        return CompressedCPUMetadataBuilder.build(None, 0, common)

    def run(self, impl, index: int, fmt: KVFormat, *sharing) -> list[torch.Tensor]:
        """One step for the history, then one for the new tokens, with rows of padding: the output of this
        layer, and of those that share its cache, which are given other keys and values."""
        cache, outputs = self.cache(fmt), []
        for begin, end in (([0] * len(self.new), self.history), (self.history, self.lens)):
            metadata, outputs = self.metadata(begin, end), []

            def rows(tensors, begin=begin, end=end):
                parts = [x[b:e] for x, b, e in zip(tensors, begin, end, strict=True)]
                return torch.cat([*parts, torch.full((3, *parts[0].shape[1:]), 1e30)])

            query, key, value = map(rows, (self.queries, self.keys, self.values))
            for one, number in ((impl, index), *sharing):
                output = torch.full_like(query, float("nan"))
                one.forward(layer(number), query, key, value, cache, metadata, output)
                assert output[-3:].isnan().all(), "padding is left alone"
                outputs.append(output[:-3])
                key, value = key + 1, value + 1
        return outputs

    def expected(self, codec: Codec, scale: float, window: int | None, cap: float | None) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v in float64 over the raw own block and what the codec keeps of others."""
        rows = []
        for queries, keys, values, new in zip(self.queries, self.keys, self.values, self.new, strict=True):
            for position in range(len(keys) - new, len(keys)):
                own = position // BLOCK_TOKENS * BLOCK_TOKENS
                blocks = keys[:own].unflatten(0, (-1, BLOCK_TOKENS))
                mean = block_mean(blocks)[:, None].float() if codec.fmt.anchor and own else 0
                stored_keys = (codec.decode_keys(codec.encode_keys(blocks - mean)) + mean).flatten(0, 1)
                stored_values = codec.decode_values(codec.encode_values(values[:own]))
                key = torch.cat((stored_keys, keys[own : position + 1]))
                value = torch.cat((stored_values, values[own : position + 1]))
                seen = slice(max(0, position + 1 - window) if window else 0, None)
                key, value = (x[seen].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
                score = torch.einsum("hd,jhd->hj", queries[position].double(), key) * scale
                if cap:
                    score = cap * torch.tanh(score / cap)
                rows.append(torch.einsum("hj,jhd->hd", score.softmax(-1), value))
        return torch.stack(rows).float()


@pytest.mark.parametrize(
    ("history", "new"),
    [([0], [140]), ([137], [1]), ([133, 0, 264, 127], [1, 20, 133, 2])],
    ids=["prefill", "decode", "mixed"],
)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (17, None), (150, None), (None, 2.0)])
def test_attention_reads_its_own_block_raw_and_others_as_stored(make_impl, history, new, window, cap) -> None:
    batch = Batch(history, new)
    impl = make_impl(sliding_window=window, logits_soft_cap=cap)
    expected = batch.expected(Codec(PLAN.layers[0], HEAD_DIM, PLAN.seed), impl.scale, window, cap)
    (output,) = batch.run(impl, 0, PLAN.layers[0])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_a_window_that_no_sequence_is_longer_than_is_none(make_impl) -> None:
    assert make_impl(sliding_window=1023).sliding_window == 1023
    assert make_impl(sliding_window=1024).sliding_window is None


def test_a_layer_uses_its_own_format_of_the_plan(make_impl) -> None:
    batch, impl = Batch([220], [2]), make_impl()
    expected = batch.expected(Codec(PLAN.layers[1], HEAD_DIM, PLAN.seed), impl.scale, None, None)
    (output,) = batch.run(impl, 1, PLAN.layers[1])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_a_layer_that_shares_a_cache_reads_its_owners_tokens_in_its_format(make_impl) -> None:
    batch, owner = Batch([100], [250]), make_impl()
    impl = make_impl(kv_sharing_target_layer_name=layer(1).layer_name)
    context = owner._config.compilation_config.static_forward_context
    context[layer(1).layer_name] = SimpleNamespace(impl=owner)
    context[layer(0).layer_name] = SimpleNamespace(
        impl=impl, kv_sharing_target_layer_name=layer(1).layer_name
    )
    expected = batch.expected(Codec(PLAN.layers[1], HEAD_DIM, PLAN.seed), impl.scale, None, None)
    for output in batch.run(owner, 1, PLAN.layers[1], (impl, 0)):
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_without_metadata_the_output_is_zero(make_impl) -> None:
    output = torch.full((3, HEADS, HEAD_DIM), float("nan"))
    make_impl().forward(layer(0), output, None, None, torch.empty(0), None, output)
    assert not output.any()


def test_layers_with_one_window_share_the_cut_of_a_batch() -> None:
    metadata = Batch([20], [2]).metadata([20], [22])
    assert metadata.tiles(16) is metadata.tiles(16)
    assert metadata.tiles(16) is not metadata.tiles(None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"alibi_slopes": [0.5] * HEADS}, "ALiBi"), ({"attn_type": "encoder_only"}, "encoder_only")],
)
def test_attention_without_a_compressed_form_is_refused(make_impl, arguments: dict, says: str) -> None:
    from turboquant_runtime.configuration import RefusedConfiguration

    with pytest.raises(RefusedConfiguration, match=says):
        make_impl(**arguments)

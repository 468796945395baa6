"""The CPU attention backend on small tensors, against attention written out over decoded keys and values."""

from types import SimpleNamespace

import pytest
import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 32
PLAN = KVPlan((KVFormat(4, 4), KVFormat(8, 2)), seed=5)


@pytest.fixture
def make_impl(monkeypatch: pytest.MonkeyPatch):
    from turboquant_runtime.backends import base, cpu

    config = SimpleNamespace(
        speculative_config=None,
        additional_config={"turboquant": PLAN.to_dict()},
        cache_config=SimpleNamespace(cache_dtype="tq-k4v4"),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: 2, is_hybrid=False, max_model_len=1024
        ),
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
        self.lens = [h + n for h, n in zip(history, new, strict=True)]
        self.new = new
        blocks_each = max(-(-length // BLOCK) for length in self.lens)
        order = torch.randperm(blocks_each * len(new), generator=generator)
        self.block_table = order.view(len(new), blocks_each).int()
        self.keys = [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in self.lens]
        self.values = [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in self.lens]
        self.query = torch.randn(sum(new), HEADS, HEAD_DIM, generator=generator)

    def slots(self, sequence: int) -> torch.Tensor:
        position = torch.arange(self.lens[sequence])
        return self.block_table[sequence, position // BLOCK].long() * BLOCK + position % BLOCK

    def cache(self, fmt: KVFormat) -> torch.Tensor:
        blocks = self.block_table.numel()
        return torch.randint(255, (blocks, KV_HEADS, BLOCK, fmt.slot_bytes(HEAD_DIM)), dtype=torch.uint8)

    def metadata(self):
        from turboquant_runtime.backends.cpu import CompressedCPUMetadata

        return CompressedCPUMetadata(
            num_actual_tokens=sum(self.new),
            query_start_loc=torch.tensor([0, *self.new]).cumsum(0).int(),
            seq_lens=torch.tensor(self.lens).int(),
            block_table=self.block_table,
        )

    def run(self, impl, index: int, fmt: KVFormat) -> torch.Tensor:
        """Stores everything, with padded slots, and attends; output rows beyond the tokens are NaN before."""
        cache = self.cache(fmt)
        slots = torch.cat([self.slots(i) for i in range(len(self.new))])
        padding = torch.full((3,), -1)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        pad = torch.full((3, KV_HEADS, HEAD_DIM), 1e30)
        impl.do_kv_cache_update(
            layer(index),
            torch.cat([keys, pad]),
            torch.cat([values, pad]),
            cache,
            torch.cat([slots, padding]),
        )
        query = torch.cat([self.query, torch.full((2, HEADS, HEAD_DIM), 1e30)])
        output = torch.full_like(query, float("nan"))
        impl.forward(layer(index), query, None, None, cache, self.metadata(), output)
        return output[: len(self.query)]

    def expected(self, codec: Codec, scale: float, window: int | None, cap: float | None) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v in float64 over what the codec keeps of keys and values."""
        rows, queries = [], list(self.query.double().split(self.new))
        for query, key, value in zip(queries, self.keys, self.values, strict=True):
            key = codec.decode_keys(codec.encode_keys(key)).double()
            value = codec.decode_values(codec.encode_values(value)).double()
            key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
            score = torch.einsum("ihd,jhd->hij", query, key) * scale
            if cap:
                score = cap * torch.tanh(score / cap)
            position = torch.arange(len(key))
            behind = position[-len(query) :, None] - position
            seen = (behind >= 0) & (behind < (window or len(key)))
            weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
            rows.append(torch.einsum("hij,jhd->ihd", weight, value))
        return torch.cat(rows).float()


@pytest.mark.parametrize(
    ("history", "new"),
    [([0], [40]), ([37], [1]), ([33, 0, 64, 5], [1, 20, 33, 1])],
    ids=["prefill", "decode", "mixed"],
)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (17, None), (None, 2.0)])
def test_attention_reads_what_the_format_stores(make_impl, history, new, window, cap) -> None:
    batch = Batch(history, new)
    impl = make_impl(sliding_window=window, logits_soft_cap=cap)
    expected = batch.expected(Codec(PLAN.layers[0], HEAD_DIM, PLAN.seed), impl.scale, window, cap)
    torch.testing.assert_close(batch.run(impl, 0, PLAN.layers[0]), expected, atol=1e-4, rtol=1e-4)


def test_a_window_that_no_sequence_is_longer_than_is_none(make_impl) -> None:
    assert make_impl(sliding_window=1023).sliding_window == 1023
    assert make_impl(sliding_window=1024).sliding_window is None


def test_a_layer_uses_its_own_format_of_the_plan(make_impl) -> None:
    batch, impl = Batch([20], [2]), make_impl()
    expected = batch.expected(Codec(PLAN.layers[1], HEAD_DIM, PLAN.seed), impl.scale, None, None)
    torch.testing.assert_close(batch.run(impl, 1, PLAN.layers[1]), expected, atol=1e-4, rtol=1e-4)


def test_a_layer_that_shares_a_cache_reads_it_in_its_owners_format(make_impl) -> None:
    batch, impl = Batch([20], [2]), make_impl(kv_sharing_target_layer_name=layer(1).layer_name)
    expected = batch.expected(Codec(PLAN.layers[1], HEAD_DIM, PLAN.seed), impl.scale, None, None)
    torch.testing.assert_close(batch.run(impl, 0, PLAN.layers[1]), expected, atol=1e-4, rtol=1e-4)


def test_without_metadata_the_output_is_zero(make_impl) -> None:
    output = torch.full((3, HEADS, HEAD_DIM), float("nan"))
    make_impl().forward(layer(0), output, None, None, torch.empty(0), None, output)
    assert not output.any()


def test_layers_with_one_window_share_the_cut_of_a_batch() -> None:
    metadata = Batch([20], [2]).metadata()
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

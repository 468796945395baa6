"""The CUDA attention backend on small tensors, in Triton's interpreter, against attention over decoded pages.

FlashAttention, which it needs of vLLM, is PyTorch's own attention here. On a GPU the same tests run compiled.
"""

from types import SimpleNamespace

import pytest
import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 32
PLAN = KVPlan((KVFormat(4, 4), KVFormat(8, 2)), seed=5)
MAX_SEQS, MAX_LEN = 4, 256


def torch_attention(
    query, key, value, *, query_starts, key_starts, max_queries, max_keys, scale, causal, left, soft_cap
):
    """`prefill.attention.Attend` in PyTorch."""
    outs, logs = [], []
    for (q0, q1), (k0, k1) in zip(
        query_starts.unfold(0, 2, 1).tolist(), key_starts.unfold(0, 2, 1).tolist(), strict=True
    ):
        k, v = (x[k0:k1].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        score = torch.einsum("qhd,khd->hqk", query[q0:q1], k).float() * scale
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        position = (k1 - k0) - (q1 - q0) + torch.arange(q1 - q0, device=query.device)[:, None]
        keys = torch.arange(k1 - k0, device=query.device)
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device)
        if causal:
            seen &= keys <= position
        if left is not None:
            seen &= keys >= position - left
        score = score.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1).to(value.dtype), v))
        logs.append(score.logsumexp(-1))
    return torch.cat(outs), torch.cat(logs, dim=1)


@pytest.fixture
def make_impl(monkeypatch: pytest.MonkeyPatch):
    from turboquant_runtime.backends import base, cuda

    config = SimpleNamespace(
        speculative_config=None,
        additional_config={"turboquant": PLAN.to_dict()},
        cache_config=SimpleNamespace(cache_dtype="tq-k4v4"),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: 2, is_hybrid=False, max_model_len=MAX_LEN
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    monkeypatch.setattr(base, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(cuda, "flash_attention", lambda head_dim: torch_attention)

    def make(**arguments):
        defaults = {
            "num_heads": HEADS,
            "head_size": HEAD_DIM,
            "scale": HEAD_DIM**-0.5,
            "num_kv_heads": KV_HEADS,
            "kv_cache_dtype": "tq-k4v4",
        }
        return cuda.CompressedCUDAImpl(**defaults | arguments)

    return make


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer(index: int) -> SimpleNamespace:
    return SimpleNamespace(layer_name=f"model.layers.{index}.self_attn.attn")


class Batch:
    """Sequences with `history` tokens in the cache and `new` ones in this step, in scattered blocks."""

    def __init__(self, history: list[int], new: list[int], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lens = [h + n for h, n in zip(history, new, strict=True)]
        self.new, self.device = new, device
        blocks_each = max(-(-length // BLOCK) for length in self.lens)
        order = torch.randperm(blocks_each * len(new), generator=generator)
        self.block_table = order.view(len(new), blocks_each).int().to(device)
        size = (sum(self.lens), KV_HEADS, HEAD_DIM)
        self.key = torch.randn(size, generator=generator).bfloat16().to(device)
        self.value = torch.randn(size, generator=generator).bfloat16().to(device)
        self.query = torch.randn(sum(new), HEADS, HEAD_DIM, generator=generator).bfloat16().to(device)

    def slots(self, sequence: int) -> torch.Tensor:
        position = torch.arange(self.lens[sequence], device=self.device)
        return self.block_table[sequence, position // BLOCK].long() * BLOCK + position % BLOCK

    def description(self) -> SimpleNamespace:
        """What vLLM's runners tell a metadata builder."""
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        return SimpleNamespace(
            causal=True,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(self.lens).int().to(self.device),
            seq_lens_cpu_upper_bound=torch.tensor(self.lens).int(),
            block_table_tensor=self.block_table,
        )

    def run(self, impl, index: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of a step with three rows of padding, and what the reference makes of the same pages."""
        from turboquant_runtime.backends.base import blocks_of
        from turboquant_runtime.backends.step import step_of

        fmt = PLAN.layers[index]
        shape = (self.block_table.numel(), KV_HEADS, BLOCK, fmt.slot_bytes(HEAD_DIM))
        cache = torch.randint(255, shape, dtype=torch.uint8).to(self.device)
        slots = torch.cat([self.slots(i) for i in range(len(self.new))])
        pad = torch.full((3,), -1, device=self.device)
        key, value = (torch.cat([x, x[:3]]) for x in (self.key, self.value))
        impl.do_kv_cache_update(layer(index), key, value, cache, torch.cat([slots, pad]))

        query = torch.cat([self.query, self.query[:3]])
        output = torch.full_like(query, torch.nan)
        metadata = step_of(self.description(), limit, self.device)
        impl.forward(layer(index), query, key, value, cache, metadata, output)
        assert output[-3:].isnan().all(), "padding is left alone"

        expected = paged_attention(
            Codec(fmt, HEAD_DIM, PLAN.seed),
            self.query.cpu().float(),
            blocks_of(cache, impl.layer_codec(layer(index))).cpu(),
            self.block_table.cpu(),
            torch.tensor([0, *self.new]).cumsum(0).int(),
            torch.tensor(self.lens).int(),
            scale=impl.scale,
            window=impl.sliding_window,
            soft_cap=impl.logits_soft_cap,
            sinks=None if impl.sinks is None else impl.sinks.cpu(),
        )
        return output[:-3].cpu().float(), expected


BATCHES = {
    "decode": ([70, 0, 33], [1, 1, 1], 1),
    "prefill": ([0, 40], [50, 21], 1),
    "mixed": ([90, 5, 0, 64], [1, 1, 37, 2], 1),
    "speculative": ([90, 5], [3, 3], 4),
    "speculative of different lengths": ([90, 5, 1], [1, 3, 2], 4),
    "speculative and mixed": ([90, 5, 64], [1, 3, 30], 4),
}


@pytest.mark.parametrize(("batch", "index"), [*((batch, 0) for batch in BATCHES), ("mixed", 1)])
def test_a_step_attends_to_its_pages(make_impl, device, batch: str, index: int) -> None:
    history, new, limit = BATCHES[batch]
    output, expected = Batch(history, new, device).run(make_impl(), index, limit)
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("option", ["sliding_window", "logits_soft_cap", "sinks"])
def test_options_of_a_layer_reach_decode_and_prefill(make_impl, device, option: str) -> None:
    value = {
        "sliding_window": 6,
        "logits_soft_cap": 0.5,
        "sinks": torch.tensor([0.5, 4.0, -1.0, 2.0], device=device),
    }[option]
    batch = Batch([25, 3], [1, 20], device)
    output, expected = batch.run(make_impl(**{option: value}), 0, limit=1)
    torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
    plain, _ = batch.run(make_impl(), 0, limit=1)
    for rows in (slice(0, 1), slice(1, None)):
        assert not torch.allclose(plain[rows], expected[rows], atol=0.02, rtol=0.02)


@pytest.fixture
def schedules(monkeypatch) -> list:
    """The lengths that schedules are made of."""
    from turboquant_kernels.decode.plan import DecodePlan

    made = []
    schedule = DecodePlan.schedule
    monkeypatch.setattr(
        DecodePlan, "schedule", lambda plan, lens: (made.append(lens.tolist()), schedule(plan, lens))
    )
    return made


def join(impls: list, names: list[str]) -> list:
    """Layers of one engine, in the order in which vLLM makes them."""
    layers = [SimpleNamespace(layer_name=name, impl=impl) for impl, name in zip(impls, names, strict=True)]
    impls[0]._config.compilation_config.static_forward_context.update(zip(names, layers, strict=True))
    return layers


def test_the_first_layer_of_a_shape_fills_the_schedule_in_each_pass(make_impl, device, schedules) -> None:
    """A draft model that is handed the target's batch fills it too: its graph is replayed alone."""
    names = [
        "model.layers.0.attn",
        "model.layers.1.attn",
        "draft_model.layers.0.attn",
        "draft_model.layers.1.attn",
    ]
    layers = []
    for name in names:
        # Of one format: the plan's second layer has another.
        impl = make_impl(kv_sharing_target_layer_name=names[0])
        layers += join([impl], [name])
    cache = torch.zeros(
        4, KV_HEADS, BLOCK, PLAN.layers[0].slot_bytes(HEAD_DIM), dtype=torch.uint8, device=device
    )
    query = torch.randn(2, HEADS, HEAD_DIM, device=device).bfloat16()
    for lengths in ([7, 9], [8, 10]):
        step = step_of_lengths(lengths, device)
        for part in (layers[:2], layers[2:], layers[2:]):  # the target, then two steps of the draft model
            for one in part:
                one.impl.forward(one, query, query, query, cache, step, torch.empty_like(query))
    assert schedules == [[7, 9]] * 3 + [[8, 10]] * 3


def test_layers_of_an_engine_share_buffers_and_engines_do_not(make_impl, device) -> None:
    first = make_impl()
    join([first], ["model.layers.0.attn"])
    second = make_impl()
    assert second.decode_plans is first.decode_plans
    first._config.compilation_config.static_forward_context.clear()  # as in another engine's configuration
    assert make_impl().decode_plans is not first.decode_plans


def step_of_lengths(lengths: list[int], device: torch.device):
    """A step of one query token each."""
    from turboquant_runtime.backends.step import step_of

    return step_of(Batch([n - 1 for n in lengths], [1] * len(lengths), device).description(), 1, device)


def test_memory_is_measured_with_prefill_and_decode_in_it(make_impl, device, monkeypatch) -> None:
    """Without cache and metadata a layer runs a step of the largest batch; one of each shape does."""
    from turboquant_kernels.decode.plan import DecodePlan
    from turboquant_runtime.backends import warm_up

    stores, runs = [], []
    monkeypatch.setattr(warm_up, "store", lambda *arguments: stores.append(arguments))
    monkeypatch.setattr(
        DecodePlan,
        "run",
        lambda plan, query, *_, **__: runs.append(("decode", plan.shape.window, len(query))),
    )
    impls = [make_impl(), make_impl(), make_impl(sliding_window=20)]
    layers = []
    for index, impl in enumerate(impls):
        layers.append(layer(0))
        layers[-1].impl = impl
        layers[-1].get_kv_cache_spec = lambda config: SimpleNamespace(block_size=BLOCK)
        impl._config.compilation_config.static_forward_context[str(index)] = layers[-1]
        window = impl.sliding_window
        monkeypatch.setattr(impl, "prefill", lambda *a, w=window: runs.append(("prefill", w, len(a[1]))))
    query = torch.randn(40, HEADS, HEAD_DIM, device=device)
    key = torch.randn(40, KV_HEADS, HEAD_DIM, device=device)
    for impl, one in zip(impls, layers, strict=True):
        output = torch.full_like(query, torch.nan)
        impl.forward(one, query, key, key, torch.tensor([]), None, output)
        assert not output.any()
    assert len(stores) == 2
    assert runs[:2] == [("prefill", None, 40), ("decode", None, MAX_SEQS)]
    assert {window for _, window, _ in runs} == {None, 20}
    assert [run[0] for run in runs].count("prefill") == 2


@pytest.mark.parametrize(("cache_bytes", "warmed"), [(1 << 33, ["0", "2"]), ((1 << 33) - 64, [])])
def test_one_layer_of_each_shape_compiles_what_large_caches_take(
    cache_bytes, warmed, make_impl, device, monkeypatch
) -> None:
    from turboquant_runtime.backends import cuda

    calls = []
    monkeypatch.setattr(
        cuda, "warm_up_decodes", lambda impl, layer, *_, wide_offsets: calls.append((layer, wide_offsets))
    )
    impls = {"0": make_impl(), "1": make_impl(), "2": make_impl(sliding_window=20)}
    layers = {name: SimpleNamespace(**vars(layer(0)), impl=impl) for name, impl in impls.items()}
    builder = object.__new__(cuda.CompressedCUDAMetadataBuilder)
    builder.layer_names, builder.device = list(layers), device
    builder.kv_cache_spec = SimpleNamespace(page_size_bytes=64)
    builder.vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=cache_bytes // 64),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    builder._warm_up_for_large_caches()
    assert calls == [(layers[name], True) for name in warmed]


def test_batches_of_all_sizes_share_memory_and_keep_their_schedules(device) -> None:
    from turboquant_kernels.decode.plan import DecodeShape
    from turboquant_runtime.backends.decode_plans import DecodePlans

    codec, plans = Codec(KVFormat(4, 4), HEAD_DIM), DecodePlans()
    cache = torch.zeros(1, BLOCK, KV_HEADS, codec.fmt.slot_bytes(HEAD_DIM), dtype=torch.uint8, device=device)

    def plan(num_seqs: int, width: int = 4, window: int | None = None):
        table = torch.zeros(num_seqs, width, dtype=torch.int32, device=device)
        shape = DecodeShape.of(codec, cache, table, q_heads=HEADS, query_len=1, window=window)
        return plans.plan(shape, device)

    large, small = plan(9), plan(2)
    assert plan(2) is small
    assert small is not large
    # What a launch depends on besides: how long sequences may be, and the window.
    assert len({id(one) for one in (small, plan(2, width=8), plan(2, window=20))}) == 3


@pytest.mark.parametrize(
    ("fmt", "head_dim", "heads", "window"),
    [("tq-k3v3", 128, 32, 1024), ("tq-k3v3", 128, 64, None), ("tq-k3v3", 256, 16, 1024)],
)
def test_what_any_batch_size_compiles_is_compiled_ahead(fmt, head_dim, heads, window, monkeypatch) -> None:
    """On a GPU of 132 multiprocessors, where tiles and merging change at sizes that are no powers of two."""
    from turboquant_kernels.decode import plan as decode_plan
    from turboquant_kernels.decode.plan import DecodePlan, DecodeShape
    from turboquant_runtime.backends.decode_plans import DecodePlans
    from turboquant_runtime.backends.warm_up import plans_to_compile

    monkeypatch.setattr(decode_plan, "_multiprocessors", lambda _: 132)
    monkeypatch.setattr(decode_plan, "path_of", lambda *_: "hopper")
    codec = Codec(KVFormat.parse(fmt), head_dim)
    cache = torch.zeros(1, 16, 8, codec.fmt.slot_bytes(head_dim), dtype=torch.uint8)
    table = torch.zeros(96, 512, dtype=torch.int32)
    impl = SimpleNamespace(num_heads=heads, sliding_window=window, decode_plans=DecodePlans())

    def kernels(num_seqs: int) -> object:
        shape = DecodeShape.of(codec, cache, table[:num_seqs], q_heads=heads, query_len=1, window=window)
        return DecodePlan(shape, cache.device).kernels

    sizes = [plan.shape.num_seqs for plan in plans_to_compile(impl, codec, cache, table, 1)]
    assert sizes[0] == 96
    assert len(sizes) < 24
    assert {kernels(n) for n in sizes} == {kernels(n) for n in range(1, 97)}
    assert {kernels(1 << i) for i in range(7)} | {kernels(96)} < {kernels(n) for n in sizes}

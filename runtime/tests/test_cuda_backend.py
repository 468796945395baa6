"""The CUDA attention backend on small tensors, in Triton's interpreter, against attention over decoded pages.

FlashAttention, which it needs of vLLM, is PyTorch's own attention here. On a GPU the same tests run compiled.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from triton import cdiv, next_power_of_2

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.reference import paged_attention
from turboquant_kernels.formats import KVFormat
from turboquant_kernels.plans import KVPlan

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 32
PLAN = KVPlan((KVFormat(4, 4), KVFormat(8, 2)), seed=5)
MAX_SEQS, MAX_LEN = 4, 256


def torch_attention(
    query, key, value, *, query_starts, key_starts, max_queries, max_keys, scale, causal, window, soft_cap
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
        if causal:
            position = (k1 - k0) - (q1 - q0) + torch.arange(q1 - q0, device=query.device)[:, None]
            keys = torch.arange(k1 - k0, device=query.device)
            seen = keys <= position
            if window is not None:
                seen &= keys > position - window
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
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2, max_model_len=MAX_LEN),
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
        from turboquant_runtime.backends.step import step_of

        fmt = PLAN.layers[index]
        shape = (self.block_table.numel(), BLOCK, KV_HEADS, fmt.slot_bytes(HEAD_DIM))
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
            cache.cpu(),
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
def test_options_of_a_layer_reach_both_roads(make_impl, device, option: str) -> None:
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


def test_layers_share_a_schedule_within_one_pass_through_a_model(device, monkeypatch) -> None:
    """A draft model that is handed the target's batch makes its own: its graph is replayed alone."""
    from turboquant_kernels.decode.launch import Workspace
    from turboquant_runtime.backends import step

    class Pass:
        """Stands for vLLM's forward context."""

    made, current = [], Pass()
    monkeypatch.setattr(Workspace, "deal_out", lambda workspace, *lengths: made.append(lengths))
    monkeypatch.setattr(step, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(step, "get_forward_context", lambda: current)
    codec = Codec(KVFormat(4, 4), HEAD_DIM)
    cache = torch.zeros(1, BLOCK, KV_HEADS, codec.fmt.slot_bytes(HEAD_DIM), dtype=torch.uint8, device=device)
    decodes = step_of_lengths([7, 9], device).decodes
    for passes in (1, 2):
        for _ in range(3):
            decodes.workspace(codec, cache, HEADS, None)
        assert len(made) == passes
        current = Pass()


def step_of_lengths(lengths: list[int], device: torch.device):
    """A step of one query token each."""
    from turboquant_runtime.backends.step import step_of

    return step_of(Batch([n - 1 for n in lengths], [1] * len(lengths), device).description(), 1, device)


def test_memory_is_measured_with_both_roads_in_it(make_impl, device, monkeypatch) -> None:
    """Without cache and metadata a layer plays a step of the largest batch; one of each shape does."""
    from turboquant_runtime.backends import rehearsal

    stores = []
    monkeypatch.setattr(rehearsal, "store", lambda *arguments: stores.append(arguments))
    roads = []
    impls = [make_impl(), make_impl(), make_impl(sliding_window=20)]
    layers = []
    for index, impl in enumerate(impls):
        layers.append(layer(0))
        layers[-1].impl = impl
        layers[-1].get_kv_cache_spec = lambda config: SimpleNamespace(block_size=BLOCK)
        impl._config.compilation_config.static_forward_context[str(index)] = layers[-1]
        monkeypatch.setattr(impl, "prefill", lambda *a, i=index: roads.append(("prefill", i, len(a[1]))))
        monkeypatch.setattr(impl, "decode", lambda *a, i=index: roads.append(("decode", i, len(a[1]))))
    query = torch.randn(40, HEADS, HEAD_DIM, device=device)
    key = torch.randn(40, KV_HEADS, HEAD_DIM, device=device)
    for impl, one in zip(impls, layers, strict=True):
        output = torch.full_like(query, torch.nan)
        impl.forward(one, query, key, key, torch.tensor([]), None, output)
        assert not output.any()
    assert len(stores) == 2
    assert roads[:2] == [("prefill", 0, 40), ("decode", 0, MAX_SEQS)]
    assert {index for _, index, _ in roads} == {0, 2}


def test_batches_of_all_sizes_share_memory_and_keep_their_schedules(device) -> None:
    from turboquant_runtime.backends.workspaces import workspace_of

    codec = Codec(KVFormat(4, 4), HEAD_DIM)
    cache = torch.zeros(1, BLOCK, KV_HEADS, codec.fmt.slot_bytes(HEAD_DIM), dtype=torch.uint8, device=device)
    tables = [torch.zeros(n, 4, dtype=torch.int32, device=device) for n in (9, 2)]
    large, small = (workspace_of(codec, cache, table, 1, HEADS, None) for table in tables)
    assert small.partial.data_ptr() == large.partial.data_ptr()
    assert small.schedule.items.data_ptr() != large.schedule.items.data_ptr()
    assert workspace_of(codec, cache, tables[1], 1, HEADS, None) is small
    # What a launch depends on besides: how long sequences may be, and the window.
    wider = torch.zeros(2, 8, dtype=torch.int32, device=device)
    for other in (
        workspace_of(codec, cache, wider, 1, HEADS, None),
        workspace_of(codec, cache, tables[1], 1, HEADS, 20),
    ):
        assert other is not small
        assert other.partial.data_ptr() == small.partial.data_ptr()


@pytest.mark.parametrize(
    ("fmt", "head_dim", "heads", "window"),
    [("tq-k3v3", 128, 32, 1024), ("tq-k3v3", 128, 64, None), ("tq-k3v3", 256, 16, 1024)],
)
def test_what_any_batch_size_compiles_is_compiled_ahead(fmt, head_dim, heads, window, monkeypatch) -> None:
    """On a GPU of 132 multiprocessors, where tiles and merging change at sizes that are no powers of two."""
    from turboquant_kernels.decode import launch
    from turboquant_runtime.backends.rehearsal import batch_sizes_to_compile

    monkeypatch.setattr(launch, "_multiprocessors", lambda _: 132)
    monkeypatch.setattr(launch, "path_of", lambda *_: "hopper")
    codec = Codec(KVFormat.parse(fmt), head_dim)
    cache = torch.zeros(1, 16, 8, codec.fmt.slot_bytes(head_dim), dtype=torch.uint8)
    table = torch.zeros(96, 512, dtype=torch.int32)
    allocate = partial(launch.Workspace.allocate, codec, cache, query_len=1, q_heads=heads, window=window)

    def kernels(num_seqs: int) -> tuple[object, ...]:
        own = allocate(table[:num_seqs])
        merged = own.counters is None and min(64, next_power_of_2(cdiv(len(own.schedule.items), num_seqs)))
        return own.launch, merged, next_power_of_2(num_seqs)

    sizes = batch_sizes_to_compile(table, allocate)
    assert sizes[0] == 96
    assert len(sizes) < 24
    assert {kernels(n) for n in sizes} == {kernels(n) for n in range(1, 97)}
    assert {kernels(1 << i) for i in range(7)} | {kernels(96)} < {kernels(n) for n in sizes}

"""Prefill on a GPU at its real tile size, in bf16: longer contexts than the interpreter can read."""

import pytest
import torch
from test_paged_attention import Batch
from test_prefill import on, torch_attend

from turboquant_kernels.formats import KVFormat
from turboquant_kernels.prefill.attention import plan, prefill_attention
from turboquant_kernels.prefill.tiles import plan_tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("fmt", [KVFormat(4, 4), KVFormat(5, 3, anchor=True)])
@pytest.mark.parametrize("capacity", [None, 1024])
def test_bf16_prefill_is_within_its_rounding(fmt, capacity):
    batch = Batch([300, 40], [3000, 700], fmt, 128, q_heads=8, kv_heads=2, block_size=128)
    starts = [0, 300, 340]
    if capacity is None:
        tiles = plan(starts, batch.seq_lens, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=DEVICE)
    else:
        tiles = [tile.to(DEVICE) for tile in plan_tiles(starts, batch.seq_lens, capacity=capacity)]
    query = torch.cat(batch.queries).to(DEVICE, torch.bfloat16)
    batch.queries = list(query.float().cpu().split(batch.query_lens))

    def attend(query, key, value, **options):
        out, log_sum = torch_attend(query.float(), key.float(), value.float(), **options)
        return out.to(query.dtype), log_sum

    cache = on(DEVICE, batch.cache)
    out = prefill_attention(
        batch.codec, query, cache, batch.block_table.to(DEVICE), tiles, attend, scale=128**-0.5
    )
    expected = batch.oracle()
    # Keys, values, turned queries and results are rounded to bf16, 2**-9 each.
    assert (out.double().cpu() - expected).norm() <= 2**-7 * expected.norm()

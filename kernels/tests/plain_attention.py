"""Attention over plain keys and values in PyTorch, as `prefill.attention` takes it: for tests."""

import torch


def torch_attend(
    query,
    key,
    value,
    *,
    query_starts,
    key_starts=None,
    key_lens=None,
    block_table=None,
    max_queries,
    max_keys,
    scale,
    causal,
    left,
    soft_cap,
    out=None,
):
    """`prefill.attention.Attend`, in the dtype that it is given."""
    outputs, lses = [], []
    group = query.shape[1] // key.shape[-2]
    segments = query_starts.unfold(0, 2, 1).tolist()
    if block_table is None:
        keys = [slice(*ends) for ends in key_starts.unfold(0, 2, 1).tolist()]
        keys, values = ([x[segment] for segment in keys] for x in (key, value))
    else:
        keys, values = (read_pages(x, block_table, key_lens) for x in (key, value))
    for (q0, q1), k, v in zip(segments, keys, values, strict=True):
        assert q1 - q0 <= max_queries
        assert len(k) <= max_keys
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", query[q0:q1], k) * scale
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        seen = seen_keys(q1 - q0, len(k), causal, left).to(query.device)
        assert seen.any(-1).all(), "FlashAttention-2 returns a log-sum-exp of +inf for a query without keys"
        score = score.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), v))
        lses.append(score.logsumexp(-1))
    output = torch.cat(outputs)
    return output if out is None else out.copy_(output), torch.cat(lses, dim=1)


def read_pages(pages, block_table, lens):
    """The first rows of each segment's pages."""
    for row, length in zip(block_table, lens.tolist(), strict=True):
        used = row[: -(-length // pages.shape[1])].long()
        yield pages[used].flatten(0, 1)[:length]


def seen_keys(queries, keys, causal, left):
    """Which keys of a segment a query sees: bool [queries, keys]."""
    position = keys - queries + torch.arange(queries)[:, None]
    key = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= key <= position
    if left is not None:
        seen &= key >= position - left
    return seen


def torch_attend_in_float32(query, key, value, *, out=None, **options):
    """The same with float32 arithmetic on tensors of any dtype, as attention kernels have it."""
    output, lse = torch_attend(query.float(), key.float(), value.float(), **options)
    return output.to(query.dtype) if out is None else out.copy_(output), lse

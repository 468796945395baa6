"""Attention over plain keys and values in PyTorch, as `prefill.attention` takes it: for tests."""

import torch


def torch_attend(
    query,
    key,
    value,
    *,
    query_starts,
    key_starts,
    max_queries,
    max_keys,
    scale,
    causal,
    left,
    soft_cap,
):
    """`prefill.attention.Attend`, in the dtype that it is given."""
    outputs, lses = [], []
    group = query.shape[1] // key.shape[1]
    for (q0, q1), (k0, k1) in zip(
        query_starts.unfold(0, 2, 1).tolist(), key_starts.unfold(0, 2, 1).tolist(), strict=True
    ):
        assert q1 - q0 <= max_queries
        assert k1 - k0 <= max_keys
        k, v = (x[k0:k1].repeat_interleave(group, dim=1) for x in (key, value))
        score = torch.einsum("qhd,khd->hqk", query[q0:q1], k) * scale
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        seen = seen_keys(q1 - q0, k1 - k0, causal, left).to(query.device)
        assert seen.any(-1).all(), "FlashAttention-2 returns a log-sum-exp of +inf for a query without keys"
        score = score.masked_fill(~seen, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), v))
        lses.append(score.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, dim=1)


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


def torch_attend_in_float32(query, key, value, **options):
    """The same with float32 arithmetic on tensors of any dtype, as attention kernels have it."""
    output, lse = torch_attend(query.float(), key.float(), value.float(), **options)
    return output.to(query.dtype), lse

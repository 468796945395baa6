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
    window,
    soft_cap,
):
    """`prefill.attention.Attend`, in the dtype that it is given."""
    outs, logs = [], []
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
        if causal:
            position = (k1 - k0) - (q1 - q0) + torch.arange(q1 - q0, device=query.device)[:, None]
            seen = torch.arange(k1 - k0, device=query.device) <= position
            if window is not None:
                seen &= torch.arange(k1 - k0, device=query.device) > position - window
            score = score.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", score.softmax(-1), v))
        logs.append(score.logsumexp(-1))
    return torch.cat(outs), torch.cat(logs, dim=1)


def torch_attend_in_float32(query, key, value, **options):
    """The same with float32 arithmetic on tensors of any dtype, as attention kernels have it."""
    out, log_sum = torch_attend(query.float(), key.float(), value.float(), **options)
    return out.to(query.dtype), log_sum

"""vLLM's FlashAttention as the attention kernel that prefill gives its expanded tiles to."""

import torch
from vllm.v1.attention.backends import fa_utils

from turboquant_kernels.prefill.attention import Attend


def flash_attention(head_dim: int) -> Attend:
    """FlashAttention in the version that vLLM picks for this GPU and head size."""
    version = fa_utils.get_flash_attn_version(head_size=head_dim)

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        max_queries: int,
        max_keys: int,
        scale: float,
        causal: bool,
        window: int | None,
        soft_cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sum = fa_utils.flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=query_starts,
            max_seqlen_q=max_queries,
            cu_seqlens_k=key_starts,
            max_seqlen_k=max_keys,
            softmax_scale=scale,
            causal=causal,
            window_size=[-1, -1] if window is None else [window - 1, 0],
            softcap=soft_cap or 0.0,
            return_softmax_lse=True,
            fa_version=version,
        )
        return output, log_sum

    return attend

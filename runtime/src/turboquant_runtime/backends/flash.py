"""vLLM's FlashAttention as the attention kernel that prefill gives its expanded tiles to."""

from vllm.v1.attention.backends import fa_utils

from turboquant_kernels.prefill.attention import Attend, flash_attend


def flash_attention(head_dim: int) -> Attend:
    """FlashAttention in the version that vLLM picks for this GPU and head size."""
    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    return flash_attend(fa_utils.flash_attn_varlen_func, version)

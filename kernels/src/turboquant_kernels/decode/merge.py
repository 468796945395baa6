"""Combines the splits of each sequence: partial sums and statistics to the attention output, still rotated.

    M = max_i m_i,   out = sum_i 2**(m_i - M) a_i / sum_i 2**(m_i - M) l_i

with m_i the largest logit of split i (base 2), l_i the sum of its weights relative to 2**m_i and a_i their
sum of values. A sink is one more token without a value. Splits are added in order, so results repeat to the
bit.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant_kernels.decode.logits import LOG2_E, NOTHING, SOMETHING
from turboquant_kernels.programmatic_launch import uses_pdl


def merge(
    output: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    splits: torch.Tensor,
    sinks: torch.Tensor | None,
    unit: float,
) -> None:
    """Fills output, float32 [num_seqs * query_len, q_heads, D].

    partial: float32 [items, kv_heads, row_groups, rows, D]; stats: float32 [items, kv_heads, row_groups,
    rows, 2]: m and l. splits: `schedule.Schedule.splits`. `unit` is what the sums of values count in. Row i
    of a KV head's G query heads and n tokens is token i // G, head i % G. Sequences without items become
    zero.
    """
    tokens, q_heads, head_dim = output.shape
    items, kv_heads, row_groups, rows, _ = partial.shape
    num_seqs = splits.shape[0]
    # As many splits at once as a sequence of average length has.
    at_once = min(triton.next_power_of_2(triton.cdiv(items, num_seqs)), 64)
    pdl = uses_pdl(output.device)
    merge_kernel[tokens, q_heads](
        output,
        partial,
        stats,
        splits,
        sinks,
        unit,
        QUERY_LEN=tokens // num_seqs,
        KV_HEADS=kv_heads,
        GROUP=q_heads // kv_heads,
        ROW_GROUPS=row_groups,
        ROWS=rows,
        D=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        SPLITS=at_once,
        PDL=pdl,
        num_warps=num_warps(at_once),
        launch_pdl=pdl,
    )


def num_warps(splits: int) -> int:
    """Warps of a program that reads `splits` splits at a time."""
    return 4 if splits >= 16 else 2


@triton.jit
def merge_kernel(
    output, partial, stats, splits, sinks, unit,
    QUERY_LEN: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROW_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    q_head = tl.program_id(1)
    sequence = token // QUERY_LEN
    row = (token % QUERY_LEN) * GROUP + q_head % GROUP
    head = q_head // GROUP
    # The kernel ahead, which attends, writes neither of these.
    first = tl.load(splits + 2 * sequence)
    count = tl.load(splits + 2 * sequence + 1)
    if sinks is None:
        maximum = NOTHING
        total = 0.0
    else:
        maximum = tl.load(sinks + q_head).to(tl.float32) * LOG2_E
        total = 1.0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    d = tl.arange(0, WIDTH)
    s = tl.arange(0, SPLITS)
    result = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, SPLITS):
        used = start + s < count
        item = (first + start + s).to(tl.int64)
        at = ((item * KV_HEADS + head) * ROW_GROUPS + row // ROWS) * ROWS + row % ROWS
        m = tl.load(stats + 2 * at, mask=used, other=NOTHING)
        part = tl.load(stats + 2 * at + 1, mask=used, other=0.0)
        a = tl.load(partial + at[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(m, axis=0))
        decay = tl.exp2(maximum - new_maximum)
        share = tl.where(m > SOMETHING, tl.exp2(m - new_maximum), 0.0)
        total = total * decay + tl.sum(share * part, axis=0)
        result = result * decay + tl.sum(share[:, None] * a, axis=0)
        maximum = new_maximum
    result = tl.where(total == 0, 0.0, result * unit / total)
    tl.store(output + (token * (KV_HEADS * GROUP) + q_head) * D + d, result, mask=d < D)

"""What the Hopper kernel takes of shared memory while it reads pages."""

from turboquant_kernels.decode.hopper import Launch
from turboquant_kernels.decode.hopper.specialization import blocks_of, ring_rows
from turboquant_kernels.formats import PAGE_TOKENS, KVFormat


def shared_bytes(fmt: KVFormat, head_dim: int, launch: Launch) -> int:
    """The ring, then rows of the queries and of the anchors' logits."""
    page_words = PAGE_TOKENS * fmt.slot_bytes(head_dim) // 4
    row_bytes = 256 * launch.rows
    rows = ring_rows(launch.num_warps, launch.pages, page_words, row_bytes)
    if launch.shared_queries:
        rows += len(blocks_of(head_dim, 128))
    return (rows + fmt.anchor) * row_bytes

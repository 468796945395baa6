"""Hashes of cache blocks as the readable store writes them, for every format: golden_blocks.json.

    python kernels/tests/golden_blocks.py

records them anew, with the version of the layout. Every operation of the store rounds alike everywhere, so
they do not depend on the machine.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from turboquant_kernels.bench.caches import empty_cache
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, COMPRESSED_FORMATS, HEAD_DIMS, KVFormat
from turboquant_kernels.packing import PAGE_LAYOUT_VERSION, anchors_of
from turboquant_kernels.store.reference import store

RECORD = Path(__file__).parent / "golden_blocks.json"

KV_HEADS = 2
ANCHORED = replace(KVFormat(4, 4), anchor=True)


def digests() -> dict[str, str]:
    """By format, a hash of blocks of every head dimension."""
    return {fmt.name + "-anchor" * fmt.anchor: _digest(fmt) for fmt in (*COMPRESSED_FORMATS, ANCHORED)}


def _digest(fmt: KVFormat) -> str:
    state = hashlib.sha256()
    for head_dim in HEAD_DIMS:
        codec, tokens = Codec(fmt, head_dim), BLOCK_TOKENS if fmt.anchor else 32
        cache = empty_cache(codec, 1, tokens, KV_HEADS, torch.device("cpu"))
        memory = cache.as_strided((cache.stride(0),), (1,))
        memory.zero_()
        if fmt.anchor:
            anchors = anchors_of(cache, fmt, head_dim)
            anchors.copy_(_numbers(anchors.shape))
        key, value = _numbers((2, tokens, KV_HEADS, head_dim))
        store(codec, key, value, cache, torch.arange(tokens))
        state.update(memory.numpy().tobytes())
    return state.hexdigest()


def _numbers(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers between -1 and 1 that no library's generator has a part in: float32."""
    count = torch.Size(shape).numel()
    scrambled = torch.arange(1, count + 1) * 2654435761 % (1 << 32)
    return ((scrambled >> 16).float() / (1 << 15) - 1).view(shape)


def main() -> None:
    record = {"version": PAGE_LAYOUT_VERSION, "blocks": digests()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Named mistakes in the codec, each of which a test must catch (`make mutants`).

Every mutation replaces one piece of text in a temporary copy of `kernels/src`; the tests named with it run
against that copy until the first fails. The table says which one did. Exit code 1: a mutation survived, or
its text is no longer in the source exactly once.

Tests run in forks of this process, which has imported torch and pytest already but nothing of the package:
importing them anew would take most of the time.
"""

import importlib.util
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401 (for the forks, like torch)
import pytest
import torch  # noqa: F401
from rich.console import Console
from rich.markup import escape
from rich.table import Table

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
SECONDS = 120
"""A run that takes longer counts as caught: the mutation made it hang."""
AT_ONCE = 2


@dataclass(frozen=True)
class Mutation:
    """One mistake: `before` becomes `after` in `file`, and `tests` (a file, or a test in it) must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: str


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: the test that caught it, or why it counts as survived."""

    mutation: Mutation
    caught_by: str | None
    problem: str = ""


MUTATIONS = [
    # Byte counts and names
    Mutation(
        "scales are not counted",
        "formats.py",
        "// 8 + self.scale_bytes",
        "// 8",
        "test_formats.py::test_bytes_of_a_token_at_head_dim_128",
    ),
    Mutation(
        "prod norm is not counted",
        "formats.py",
        "3 * SCALE_BYTES",
        "2 * SCALE_BYTES",
        "test_formats.py::test_bytes_of_a_token_at_head_dim_128",
    ),
    Mutation(
        "anchors are not charged",
        "formats.py",
        "self.slot_bytes(head_dim) + self.anchor_bytes(head_dim, tokens)",
        "self.slot_bytes(head_dim)",
        "test_formats.py",
    ),
    Mutation(
        "prod keeps all code bits",
        "formats.py",
        "return self.key_bits - 1 if",
        "return self.key_bits if",
        "test_packing.py::test_regions_follow_one_another_in_the_documented_order_and_fill_the_page",
    ),
    # Plans
    Mutation("plan version is not checked", "plans.py", "!= PLAN_VERSION", "is None", "test_plans.py"),
    Mutation(
        "plan seed is dropped",
        "plans.py",
        "for index, entry in enumerate(layers)), seed)",
        "for index, entry in enumerate(layers)))",
        "test_plans.py",
    ),
    Mutation(
        "unknown plan fields pass",
        "plans.py",
        "unknown = entry.keys() - _LAYER_FIELDS",
        "unknown = []",
        "test_plans.py",
    ),
    Mutation(
        "plan takes key bits for both",
        "plans.py",
        'int(entry["value_bits"])',
        'int(entry["key_bits"])',
        "test_plans.py",
    ),
    # Rotation
    Mutation(
        "rotation without signs",
        "rotation.py",
        "x = (vectors * rotation_signs(head_dim, seed))",
        "x = vectors",
        "test_rotation.py",
    ),
    Mutation(
        "signs on the wrong side",
        "rotation.py",
        "hadamard(head_dim) * rotation_signs(head_dim, seed) / ",
        "hadamard(head_dim) * rotation_signs(head_dim, seed)[:, None] / ",
        "test_rotation.py",
    ),
    Mutation(
        "seed is ignored", "rotation.py", "random.Random(seed)\n", "random.Random(0)\n", "test_rotation.py"
    ),
    Mutation(
        "blocks instead of a full matrix",
        "rotation.py",
        "return torch.kron(paley, _sylvester(inner))",
        "return torch.kron(torch.eye(len(paley)) * len(paley) ** 0.5, _sylvester(inner))",
        "test_rotation.py::test_a_hadamard_matrix_has_orthogonal_rows_of_signs",
    ),
    Mutation(
        "butterflies of halves",
        "rotation.py",
        "x[..., 0::2], x[..., 1::2]",
        "x.chunk(2, -1)",
        "test_rotation.py::test_butterflies_compute_the_matrix",
    ),
    Mutation(
        "Paley's sum in another order",
        "rotation.py",
        "for j in range(1, outer):",
        "for j in range(outer - 1, 0, -1):",
        "test_rotation.py::test_butterflies_add_in_the_documented_order",
    ),
    Mutation(
        "Paley's matrix transposed",
        "rotation.py",
        "signs = paley.float()",
        "signs = paley.float().T",
        "test_rotation.py::test_butterflies_compute_the_matrix",
    ),
    Mutation(
        "stored vectors rotate by a matrix product",
        "codec.py",
        "rotated = rotate((vectors / largest).masked_fill_(unusable, 0.0), self.seed)",
        "rotated = self.rotate((vectors / largest).masked_fill_(unusable, 0.0))",
        "test_codec.py::test_stored_codes_come_from_the_elementwise_rotation",
    ),
    Mutation(
        "un-rotation rotates again",
        "codec.py",
        "return rotated.float() @ self._rotation",
        "return rotated.float() @ self._rotation.T",
        "test_rotation.py",
    ),
    # Codebook
    Mutation(
        "boundaries at the levels",
        "codebook.py",
        "(levels[1:] + levels[:-1]) / 2",
        "levels[1:]",
        "test_codebook.py::test_quantize_picks_the_nearest_level",
    ),
    Mutation(
        "levels without the half",
        "codebook.py",
        "levels=torch.from_numpy(step * (grid + 0.5))",
        "levels=torch.from_numpy(step * grid)",
        "test_codebook.py::test_a_code_is_a_magnitude_and_a_sign",
    ),
    Mutation(
        "codes in two's complement below 8 bits",
        "codebook.py",
        "if bits == MAX_BITS else ~positive",
        "if bits else ~positive",
        "test_codebook.py::test_a_code_is_a_magnitude_and_a_sign",
    ),
    Mutation(
        "sign and magnitude at 8 bits",
        "codebook.py",
        "~positive[::-1] if bits == MAX_BITS else ~positive",
        "~positive",
        "test_codebook.py::test_an_eight_bit_code_is_the_int8_itself",
    ),
    Mutation(
        "sign bit at 8 bits",
        "codebook.py",
        "return 0xFF if bits == MAX_BITS else 1 << (bits - 1)",
        "return 1 << (bits - 1)",
        "test_codebook.py::test_quantize_picks_the_nearest_level",
    ),
    Mutation(
        "ties go to the larger level",
        "codebook.py",
        "self.boundaries, out_int32=True",
        "self.boundaries, out_int32=True, right=True",
        "test_codebook.py::test_quantize_is_symmetric_and_rounds_ties_to_the_smaller_level",
    ),
    Mutation(
        "zero is negative",
        "codebook.py",
        "coordinates < 0",
        "coordinates <= 0",
        "test_codebook.py::test_both_zeros_have_the_smallest_positive_level",
    ),
    Mutation(
        "density of another dimension",
        "codebook.py",
        "/ (head_dim - 1)",
        "/ head_dim",
        "test_codebook.py::test_distortion_is_that_of_the_levels",
    ),
    # Packing
    Mutation(
        "coordinates of a byte reversed",
        "packing.py",
        "part << position * width",
        "part << 8 - width - position * width",
        "test_packing.py",
    ),
    Mutation("high bits are lost", "packing.py", "(codes >> shift & 1)", "(codes & 1)", "test_packing.py"),
    Mutation(
        "magnitude and sign of 6 bits exchanged",
        "packing.py",
        "nibbles[0] | nibbles[1] << 4",
        "nibbles[1] | nibbles[0] << 4",
        "test_packing.py::test_unpack_inverts_pack",
    ),
    Mutation(
        "high bits of 3-bit codes in natural order",
        "packing.py",
        "return x_k_s.transpose(1, 2).flatten()",
        "return x_k_s.flatten()",
        "test_packing.py::test_planes_are_those_of_the_plain_packer",
    ),
    Mutation(
        "high bits of 5-bit codes in natural order",
        "packing.py",
        "[group.view(-1, 4).T.flatten() for group",
        "[group for group",
        "test_packing.py::test_planes_are_those_of_the_plain_packer",
    ),
    Mutation(
        "words of 4 bytes in keys of head_dim 80",
        "packing.py",
        "read_bytes=2 if head_dim % 32 else 4",
        "read_bytes=4",
        "test_packing.py::test_planes_are_those_of_the_plain_packer",
    ),
    Mutation(
        "values in the order of keys",
        "packing.py",
        "CodeOrder(fmt.value_bits, head_dim, read_bytes=1)",
        "CodeOrder(fmt.value_bits, head_dim, read_bytes=2)",
        "test_packing.py::test_planes_are_those_of_the_plain_packer",
    ),
    Mutation(
        "second run read one bit off",
        "packing.py",
        "high_words >> 2 & mask",
        "high_words >> 1 & mask",
        "test_packing.py::test_unpack_inverts_pack",
    ),
    Mutation(
        "quads of neighbouring tokens",
        "packing.py",
        ".movedim((-1, -2), (-4, -2))",
        ".movedim((-2, -1), (-4, -2))",
        "test_packing.py::test_each_token_has_its_own_bytes_of_a_region",
    ),
    Mutation(
        "values row by row",
        "packing.py",
        "return Region(start, token_bytes, quads)",
        "return Region(start, token_bytes)",
        "test_store.py::test_pages_hold_what_was_encoded",
    ),
    Mutation(
        "scales of keys and values swapped",
        "packing.py",
        "KEY_SCALE, VALUE_SCALE, KEY_RESIDUAL_NORM = range(3)",
        "VALUE_SCALE, KEY_SCALE, KEY_RESIDUAL_NORM = range(3)",
        "test_store.py::test_pages_read_back_as_the_decoded_vectors",
    ),
    Mutation(
        "scales before residual signs",
        "packing.py",
        "        key_residual_signs=region(head_dim // 8) if fmt.encoding is Encoding.PROD else None,\n"
        "        scales=region(fmt.scale_bytes),\n",
        "        scales=region(fmt.scale_bytes),\n"
        "        key_residual_signs=region(head_dim // 8) if fmt.encoding is Encoding.PROD else None,\n",
        "test_packing.py::test_regions_follow_one_another_in_the_documented_order_and_fill_the_page",
    ),
    Mutation(
        "anchors over the last page",
        "packing.py",
        "kv_cache.storage_offset() + block_size * kv_heads * slot_bytes",
        "kv_cache.storage_offset() + (block_size - 1) * kv_heads * slot_bytes",
        "test_packing.py::test_anchors_follow_the_pages_of_their_block",
    ),
    Mutation(
        "a region per token, not per page",
        "packing.py",
        "end = end, end + PAGE_TOKENS * token_bytes",
        "end = end, end + token_bytes",
        "test_packing.py::test_regions_follow_one_another_in_the_documented_order_and_fill_the_page",
    ),
    # Codec
    Mutation(
        "scale shrinks to least squares",
        "codec.py",
        "_half(rms / overlap)",
        "_half(rms * overlap / row_mean(levels * levels))",
        "test_codec.py::test_the_scale_is_unbiased",
    ),
    Mutation(
        "scale overflows fp16",
        "codec.py",
        "scale.clamp_max(MAX_SCALE).half()",
        "scale.half()",
        "test_codec.py::test_a_vector_beyond_fp16_keeps_its_direction_and_saturates",
    ),
    Mutation(
        "squares overflow float32",
        "codec.py",
        "rotate((vectors / largest).masked_fill_(unusable, 0.0), self.seed)\n"
        "        rms = row_mean(rotated * rotated).sqrt()\n"
        "        return rotated / rms.clamp_min(_TINY), (largest * rms)",
        "rotate(vectors.masked_fill(unusable, 0.0), self.seed)\n"
        "        rms = row_mean(rotated * rotated).sqrt()\n"
        "        return rotated / rms.clamp_min(_TINY), rms",
        "test_codec.py::test_a_vector_beyond_fp16_keeps_its_direction_and_saturates",
    ),
    Mutation(
        "NaN and Inf are encoded",
        "codec.py",
        "unusable = ~((largest >= _TINY) & (largest < torch.inf))",
        "unusable = largest < _TINY",
        "test_codec.py::test_a_vector_without_finite_normal_size_decodes_to_zero",
    ),
    Mutation(
        "sums round as the library likes",
        "codec.py",
        "    head_dim = terms.shape[-1]\n    while",
        "    return terms.mean(-1, keepdim=True)\n    while",
        "test_codec.py::test_means_add_in_the_documented_order",
    ),
    Mutation(
        "values with the bits of keys",
        "codec.py",
        "self._encode(unit[None], rms[None], self.fmt.value_bits)",
        "self._encode(unit[None], rms[None], self.fmt.key_bits)",
        "test_codec.py::test_values_have_the_error_of_their_own_bits",
    ),
    Mutation(
        "key and value bits exchanged in the store",
        "codec.py",
        "self._encode(unit, rms, self.fmt.key_bits, self.fmt.value_bits)",
        "self._encode(unit, rms, self.fmt.value_bits, self.fmt.key_bits)",
        "test_store.py::test_pages_hold_what_was_encoded",
    ),
    Mutation(
        "residual signs inverted",
        "codec.py",
        "self._projection.double().T < 0",
        "self._projection.double().T > 0",
        "test_codec.py::test_prod_corrects_what_its_first_stage_shrinks",
    ),
    Mutation(
        "residual without sqrt(pi/2)",
        "codec.py",
        "math.sqrt(math.pi / 2)",
        "1.0",
        "test_codec.py::test_prod_corrects_what_its_first_stage_shrinks",
    ),
    Mutation(
        "unwritten scales are NaN",
        "codec.py",
        "scales.float().nan_to_num(0.0, 0.0, 0.0)",
        "scales.float()",
        "test_paged_attention.py::test_bytes_that_were_never_written_change_nothing",
    ),
    # Store
    Mutation(
        "padding is written",
        "store/reference.py",
        "slot_mapping >= 0",
        "slot_mapping >= -1",
        "test_store.py::test_slot_minus_one_is_padding",
    ),
    Mutation(
        "slot zero is padding",
        "store/reference.py",
        "slot_mapping >= 0",
        "slot_mapping > 0",
        "test_store.py::test_pages_hold_what_was_encoded",
    ),
    Mutation(
        "page and token exchanged",
        "store/reference.py",
        "offset // PAGE_TOKENS, row_of(offset % PAGE_TOKENS)",
        "offset % (block_size // PAGE_TOKENS), row_of(offset // (block_size // PAGE_TOKENS))",
        "test_store.py::test_pages_hold_what_was_encoded",
    ),
    Mutation(
        "values written over keys",
        "store/reference.py",
        "codec.value_order, values.codes)",
        "codec.value_order, keys.codes)",
        "test_store.py::test_pages_hold_what_was_encoded",
    ),
    Mutation(
        "anchors of a block's first tokens for all",
        "store/reference.py",
        "anchors[block, offset // BLOCK_TOKENS]",
        "anchors[block, offset * 0]",
        "test_store.py::test_with_anchors_the_differences_to_them_are_stored",
    ),
    Mutation(
        "a block is encoded whose last token is not stored",
        "store/block_kernel.py",
        "mask=complete, other=-1) >= 0",
        "mask=complete, other=-1) >= -1",
        "test_store_blocks.py::test_rows_without_a_slot_are_not_stored",
    ),
    Mutation(
        "drafts are not kept where they complete a block",
        "store/block_kernel.py",
        "if (items is None) | (complete == 0):",
        "if complete == 0:",
        "test_store_blocks.py::test_blocks_that_rejected_drafts_completed_are_encoded_again",
    ),
    Mutation(
        "raw tokens begin in the first block behind their own",
        "store/block_kernel.py",
        "tl.where(part > 0, part, RAW.BLOCKS)",
        "1 + part",
        "test_store_blocks.py::test_decodes_around_the_end_of_a_block",
    ),
    Mutation(
        "the mean of keys adds rows of a tile first",
        "store/block_kernel.py",
        "FIRST + TILES * tl.arange(0, SPEC.ROWS)",
        "FIRST * SPEC.ROWS + tl.arange(0, SPEC.ROWS)",
        "test_store_blocks.py::test_the_mean_of_keys_adds_neighbours_first",
    ),
    Mutation(
        "whole blocks are encoded before the begun ones",
        "store/block_kernel.py",
        "(items.indices[: items.begun], items.indices[items.begun :])",
        "(items.indices[items.begun :], items.indices[: items.begun])",
        "test_store_blocks.py::test_chunks_of_several_sequences",
    ),
    # Attention
    Mutation(
        "a query does not see itself",
        "decode/reference.py",
        "position > query_position[:n]\n",
        "position >= query_position[:n]\n",
        "test_paged_attention.py::test_every_head_dim",
    ),
    Mutation(
        "a query sees one token ahead",
        "decode/reference.py",
        "position > query_position[:n]\n",
        "position > query_position[:n] + 1\n",
        "test_paged_attention.py::test_every_head_dim",
    ),
    Mutation(
        "window one too long",
        "decode/reference.py",
        "position <= query_position[:n] - window",
        "position < query_position[:n] - window",
        "test_paged_attention.py::test_a_sliding_window_counts_the_query_itself",
    ),
    Mutation(
        "soft cap without its factor",
        "decode/reference.py",
        "score = soft_cap * torch.tanh(",
        "score = torch.tanh(",
        "test_paged_attention.py::test_logit_soft_cap",
    ),
    Mutation(
        "sinks weigh nothing",
        "decode/reference.py",
        "total.fill_(1.0)",
        "total.fill_(0.0)",
        "test_paged_attention.py::test_attention_sinks_take_weight_and_give_no_value",
    ),
    Mutation(
        "output is not rescaled",
        "decode/reference.py",
        "output[:n] * decay + weight",
        "output[:n] + weight",
        "test_paged_attention.py::test_one_token_far_above_the_rest_is_found",
    ),
    Mutation(
        "stored tokens of a query's own block",
        "decode/portable/kernel.py",
        "last_seen = position // BLOCK_TOKENS * BLOCK_TOKENS - 1",
        "last_seen = position",
        "test_decode_raw_block.py::test_portable[four query tokens]",
    ),
    Mutation(
        "the stored end behind the raw block",
        "decode/schedule.py",
        "tl.maximum(seq_len - 1, 0) // RAW_BLOCK",
        "tl.maximum(seq_len, 0) // RAW_BLOCK",
        "test_schedule.py::test_with_a_raw_block_sequences_end_where_the_last_query_token_finds_its_block",
    ),
    Mutation(
        "raw tokens of the block before",
        "decode/finish.py",
        "(position // BLOCK_TOKENS == block)[:, None]",
        "(position // BLOCK_TOKENS >= block)[:, None]",
        "test_decode_raw_block.py::test_portable[four query tokens]",
    ),
    Mutation(
        "raw blocks begin with the next one",
        "decode/finish.py",
        "tl.where(part > 0, part, RAW_BLOCKS)",
        "part + 1",
        "test_decode_raw_block.py::test_portable[four query tokens]",
    ),
    Mutation(
        "raw values before the window",
        "decode/finish.py",
        "there = (key_position >= first_seen) & (key_position <= last_position)",
        "there = key_position <= last_position",
        "test_decode_raw_block.py::test_portable[window within a block]",
    ),
    Mutation(
        "stored and raw sums of one scale",
        "decode/finish.py",
        "(share * unit)[:, None]",
        "unit",
        "test_decode_raw_block.py::test_portable[four query tokens]",
    ),
    Mutation(
        "first page of a block only",
        "decode/reference.py",
        "page = page % pages_per_block",
        "page = page * 0",
        "test_paged_attention.py::test_block_sizes",
    ),
    Mutation(
        "anchors are not rotated",
        "decode/reference.py",
        "self.codec.rotate(anchor)",
        "anchor.float()",
        "test_paged_attention.py::test_anchors_are_added_to_the_keys_of_their_128_tokens",
    ),
    Mutation(
        "anchors of a block's first tokens for all keys",
        "decode/reference.py",
        "page * PAGE_TOKENS // BLOCK_TOKENS",
        "page * 0",
        "test_paged_attention.py::test_anchors_are_added_to_the_keys_of_their_128_tokens",
    ),
    Mutation(
        "query heads grouped the other way",
        "decode/reference.py",
        "query.unflatten(2, (cache.kv_heads, group)).permute(0, 2, 3, 1, 4)",
        "query.unflatten(2, (group, cache.kv_heads)).permute(0, 3, 2, 1, 4)",
        "test_paged_attention.py::test_grouped_query_heads",
    ),
    Mutation(
        "later tiles stand at the first position",
        "decode/tiles.py",
        "position = torch.maximum(begin, start[sequence])",
        "position = start[sequence]",
        "test_paged_attention.py::test_query_lengths_around_a_tile",
    ),
    # The raw block
    Mutation(
        "the own block is read as stored too",
        "decode/tiles.py",
        "end=position // BLOCK_TOKENS * BLOCK_TOKENS if raw_block",
        "end=position + count if raw_block",
        "test_raw_block.py::test_what_a_query_sees_does_not_depend_on_chunks",
    ),
    Mutation(
        "the stored part is not un-rotated",
        "decode/reference.py",
        "softmax.output = cache.codec.unrotate(softmax.output)",
        "softmax.output = softmax.output",
        "test_raw_block.py::test_what_a_query_sees_does_not_depend_on_chunks",
    ),
    Mutation(
        "a raw block begins where the last one lies",
        "raw_block.py",
        "torch.where(part > 0, part, self.blocks)",
        "1 + part",
        "test_raw_block.py::test_rejected_drafts_leave_no_trace",
    ),
    Mutation(
        "tokens of completed blocks are not kept for drafts",
        "raw_block.py",
        "return is_open | (self.query_lens <= most_drafts)[sequence]",
        "return is_open",
        "test_raw_block.py::test_rejected_drafts_leave_no_trace",
    ),
    Mutation(
        "earlier tokens of the own block are not read",
        "raw_block.py",
        "is_new = (since_start >= 0)",
        "is_new = (since_start >= -1)",
        "test_raw_block.py::test_what_a_query_sees_does_not_depend_on_chunks",
    ),
    Mutation(
        "what follows a sequence's last token is read",
        "raw_block.py",
        ".masked_fill_(absent, 0)",
        "",
        "test_raw_block.py::test_no_fault_of_one_sequence_reaches_another",
    ),
    Mutation(
        "rows without a slot are stored",
        "raw_block.py",
        "self.slot_mapping[: len(row)] >= 0",
        "self.slot_mapping[: len(row)] >= -1",
        "test_raw_block.py::test_a_row_without_a_slot_is_not_stored",
    ),
    Mutation(
        "the anchor is the first key",
        "store/reference.py",
        "= block_mean(key)",
        "= key[:, 0].bfloat16()",
        "test_raw_block.py::test_what_a_query_sees_does_not_depend_on_chunks",
    ),
    Mutation(
        "a mean that is not finite is kept",
        "store/reference.py",
        ".bfloat16().nan_to_num(0.0, 0.0, 0.0)",
        ".bfloat16()",
        "test_raw_block.py::test_block_mean_is_finite",
    ),
    Mutation(
        "raw blocks are counted without rounding up",
        "formats.py",
        "return ceil(BLOCK_TOKENS / (BLOCK_TOKENS * self.token_bytes(head_dim) // raw_bytes))",
        "return BLOCK_TOKENS // (BLOCK_TOKENS * self.token_bytes(head_dim) // raw_bytes)",
        "test_raw_block.py::test_neighbouring_raw_blocks_share_no_bytes",
    ),
    Mutation(
        "a bias counts whole beside anchors",
        "allocation.py",
        "        if anchor:\n",
        "        if False:\n",
        "test_allocation.py::TestAnchors",
    ),
    Mutation(
        "window context cut at the last query",
        "decode/tiles.py",
        "(position - window + 1)",
        "(position + width - window)",
        "test_paged_attention.py::test_a_sliding_window_counts_the_query_itself",
    ),
    Mutation(
        "shape follows the longest neighbour",
        "decode/tiles.py",
        "_smallest_that_holds(context, CHUNK_TOKENS)",
        "_smallest_that_holds(context.max().expand_as(context), CHUNK_TOKENS)",
        "test_paged_attention.py::test_the_shape_of_a_tile_is_its_own_sequences",
    ),
    # Prefill
    Mutation(
        "one bound on the left without padding",
        "prefill/pieces.py",
        "end - piece.position, end_query - end, first",
        "end - piece.position, 0, first",
        "test_prefill_pieces.py::test_a_query_sees_each_stored_key_of_its_window_once",
    ),
    Mutation(
        "a begun block's first tokens from their own entry",
        "prefill/begun.py",
        "tl.where(part > 0, part, RAW_BLOCKS)",
        "part",
        "test_prefill_raw_block.py::test_raw_keys_of_begun_blocks_are_the_models_own",
    ),
    Mutation(
        "a merged sum keeps its larger part",
        "prefill/merge.py",
        "larger + tl.log(total)",
        "larger",
        "test_prefill_raw_block.py::test_sequences_together",
    ),
]


class Run:
    """The tests of one mutation, running in a fork on a mutated copy of the source."""

    def __init__(self, mutation: Mutation) -> None:
        self.mutation = mutation
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        shutil.copytree(KERNELS / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
        file = root / "src" / "turboquant_kernels" / mutation.file
        self.source = file.read_text()
        file.write_text(self.source.replace(mutation.before, mutation.after))
        self.process = multiprocessing.get_context("fork").Process(target=_test, args=(root, mutation.tests))
        self.process.start()

    def outcome(self) -> Outcome:
        """Waits for the end."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return Outcome(self.mutation, f"a run of more than {SECONDS} s")
        output = Path(self.folder.name, "output").read_text()
        self.folder.cleanup()
        times = self.source.count(self.mutation.before)
        if times != 1:
            return Outcome(self.mutation, None, f"its text stands {times} times in {self.mutation.file}")
        if self.process.exitcode == 0:
            return Outcome(self.mutation, None, f"{self.mutation.tests} passes")
        failed = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py(?:::\S+)?)", output, re.MULTILINE)
        if self.process.exitcode != 1 or not failed:
            problem = f"pytest ended with {self.process.exitcode}: {output[-300:]}"
            return Outcome(self.mutation, None, problem)
        return Outcome(self.mutation, failed[1])


def _test(root: Path, tests: str) -> None:
    """In the fork: pytest on the copy in `root`, its output in a file there."""
    output = os.open(root / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    sys.path.insert(0, str(root / "src"))
    os.environ["PYTHONPATH"] = str(root / "src")
    package = importlib.util.find_spec("turboquant_kernels")
    if package is None or not str(package.origin).startswith(str(root)):
        sys.exit(f"the package under test is {package}, not the mutated copy")
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    code = pytest.main([*options, str(KERNELS / "tests" / tests)])
    sys.stdout.flush()  # _exit, which spares us torch's own end, does not
    os._exit(code)


def outcomes(mutations: list[Mutation]) -> Iterator[Outcome]:
    """`AT_ONCE` at a time, in the order of the list."""
    running: list[Run] = []
    for mutation in mutations:
        running.append(Run(mutation))
        if len(running) == AT_ONCE:
            yield running.pop(0).outcome()
    for run in running:
        yield run.outcome()


def main(names: list[str]) -> int:
    """Runs the mutations whose names contain one of `names`, or all."""
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    console = Console()
    done = []
    for outcome in outcomes(chosen):
        done.append(outcome)
        console.print(f"{len(done):2}/{len(chosen)} {outcome.mutation.name}", highlight=False)
    table = Table(title="Mutations of kernels/src")
    for header in ("mutation", "caught by"):
        table.add_column(header, overflow="fold")
    for outcome in done:
        table.add_row(outcome.mutation.name, escape(outcome.caught_by or f"SURVIVED: {outcome.problem}"))
    console.print(table)
    survived = sum(outcome.caught_by is None for outcome in done)
    console.print(f"{len(done) - survived} of {len(done)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

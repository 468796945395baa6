"""Packing in plain Python, bit by bit from the description in `packing`'s docstring: the oracle of the tests.

Shares no code with the package but the names of formats.
"""

from turboquant_kernels.formats import Encoding

WIDTHS = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 1, 1], 8: [8]}


def bit_places(i, bits, head_dim, keys):
    """(plane, bit of the token's row in it) of each bit of coordinate i's code, lowest first."""
    first = WIDTHS[bits][0]
    places = [(0, i * first + b) for b in range(first)]
    if bits == 3:
        p = 4 if not keys else 16 if head_dim % 32 == 0 else 8
        group, d = divmod(i, 2 * p)
        x, d = divmod(d, p)
        k, s = divmod(d, 2)
        places.append((1, group * 2 * p + 4 * k + 2 * x + s))
    if bits in (5, 6):
        start = i // 32 * 32
        g = min(32, head_dim - start)
        r, b = divmod(i - start, 4)
        places += [(plane, start + g // 4 * b + r) for plane in range(1, bits - 3)]
    return places


def plain_pack(codes, bits, keys):
    """The planes of one vector: list of ints -> list of lists of bytes."""
    planes = [[0] * (len(codes) * width // 8) for width in WIDTHS[bits]]
    for i, code in enumerate(codes):
        for b, (plane, at) in enumerate(bit_places(i, bits, len(codes), keys)):
            planes[plane][at // 8] |= (code >> b & 1) << at % 8
    return planes


def plain_unpack(planes, bits, keys):
    """The inverse of `plain_pack`."""
    head_dim = len(planes[0]) * 8 // WIDTHS[bits][0]
    return [
        sum(
            (planes[plane][at // 8] >> at % 8 & 1) << b
            for b, (plane, at) in enumerate(bit_places(i, bits, head_dim, keys))
        )
        for i in range(head_dim)
    ]


def regions(fmt, head_dim):
    """(bytes of a token, whether in quads) of each region of a page, in the order of the regions."""
    keys = [(head_dim * width // 8, False) for width in WIDTHS[fmt.key_code_bits]]
    values = [(head_dim * width // 8, True) for width in WIDTHS[fmt.value_bits]]
    rest = [(head_dim // 8, False), (6, False)] if fmt.encoding is Encoding.PROD else [(4, False)]
    return keys + values + rest


def row_places(token, width, quads):
    """Places of the bytes of a token's row in a region."""
    if not quads:
        return [token * width + j for j in range(width)]
    t, b = token % 8 // 2, token // 8 + 2 * (token % 2)
    return [(t * width + j) * 4 + b for j in range(width)]


def slot_rows(fmt, head_dim, cache, slot, head):
    """The bytes of one token: its row of each region, lists of ints.

    cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes], contiguous.
    """
    _, block_size, kv_heads, slot_bytes = cache.shape
    block, offset = divmod(slot, block_size)
    page, token = divmod(offset, 16)
    begin = ((block * block_size // 16 + page) * kv_heads + head) * 16 * slot_bytes
    rows, flat = [], cache.flatten()
    for width, quads in regions(fmt, head_dim):
        region = flat[begin : begin + 16 * width].tolist()
        rows.append([region[at] for at in row_places(token, width, quads)])
        begin += 16 * width
    return rows

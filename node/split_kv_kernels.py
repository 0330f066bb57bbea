"""Triton kernels of attention: what comes before it, split-KV (flash-decoding), and merging.

Imported only where Triton is.
"""

import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]


@triton.jit(do_not_specialize=["layer"])
def attend_splits(
    query,  # (num_rows, NUM_HEADS, HEAD_DIM)
    anchor,  # a tensor of the arenas' dtype; keys and values are addressed from it
    tiles,  # (num_tiles, 5), int64: key offset, value offset, layer stride, first split, number of splits
    tile_rows,  # (num_tiles, ROWS), int64: row of the query, -1 for none
    tile_lengths,  # (num_tiles, ROWS), int64: how many keys that row sees, 0 for none
    partial_out,  # (num_rows, NUM_HEADS, NUM_SPLITS, HEAD_DIM), float32
    partial_lse,  # (num_rows, NUM_HEADS, NUM_SPLITS), float32, base 2
    layer,
    scale,  # includes log2(e)
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a power of 2, at least 16 and ROWS * group
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of 2, at least 16 and HEAD_DIM
    PRECISION: tl.constexpr,
):
    """One tile of rows (with all query heads of a K/V head) against one split of the keys that the tile sees."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    table = tiles + tile * 5
    num_splits = tl.load(table + 4)
    if split >= num_splits:
        return
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_tile = m < ROWS * GROUP
    row = tl.load(tile_rows + tile * ROWS + m // GROUP, mask=in_tile, other=-1)
    is_row = row >= 0
    length = tl.load(tile_lengths + tile * ROWS + m // GROUP, mask=in_tile, other=0)
    longest = tl.max(length, 0)
    per_split = tl.cdiv(tl.cdiv(longest, num_splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, longest)

    head = kv_head * GROUP + m % GROUP
    q_place = (row * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(query + q_place, mask=is_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0)

    # Rows are whole multiples of 16 bytes apart, which the compiler cannot see in a loaded number.
    stride = tl.multiple_of(tl.load(table + 2), 8)
    keys = anchor + tl.multiple_of(tl.load(table), 8) + stride * layer + kv_head * HEAD_DIM
    values = anchor + tl.multiple_of(tl.load(table + 1), 8) + stride * layer + kv_head * HEAD_DIM

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        at = first + n
        place = at[:, None] * (NUM_KV_HEADS * HEAD_DIM) + d[None, :]
        is_there = (at < stop)[:, None] if BLOCK_D == HEAD_DIM else (at < stop)[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(keys + place, mask=is_there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        is_seen = (at[None, :] < length[:, None]) & (at < stop)[None, :]
        scores = tl.where(is_seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(values + place, mask=is_there, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = new_best

    slot = (row * NUM_HEADS + head) * NUM_SPLITS + tl.load(table + 3) + split
    lse = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(partial_lse + slot, lse, mask=is_row)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_place = slot[:, None] * HEAD_DIM + d[None, :]
    tl.store(partial_out + out_place, out, mask=is_row[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def put_rotated(
    qkv,  # (num_rows, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM), contiguous
    bias,  # (NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
    query_norm,  # (HEAD_DIM,)
    key_norm,
    cos,  # (num_rows, HEAD_DIM)
    sin,
    query,  # (num_rows, NUM_HEADS, HEAD_DIM)
    keys,  # (capacity, NUM_KV_HEADS, HEAD_DIM), contiguous: row `places[i]` is written from row i
    values,
    places,  # (num_rows,), int64
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the bias, normalise and rotate one head of one row, and write it where it belongs."""
    row, head = tl.program_id(0), tl.program_id(1)
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    d = tl.arange(0, BLOCK_D)
    is_there = d < HEAD_DIM
    is_first = d < HEAD_DIM // 2
    other_d = tl.where(is_first, d + HEAD_DIM // 2, d - HEAD_DIM // 2)  # what d is rotated with
    place = (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * HEAD_DIM
    x = tl.load(qkv + place + d, mask=is_there, other=0.0).to(tl.float32)
    other = tl.load(qkv + place + other_d, mask=is_there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + head * HEAD_DIM + d, mask=is_there, other=0.0).to(tl.float32)
        other += tl.load(bias + head * HEAD_DIM + other_d, mask=is_there, other=0.0).to(tl.float32)
    if is_value:
        out = values + (tl.load(places + row) * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * HEAD_DIM
        tl.store(out + d, x.to(values.dtype.element_ty), mask=is_there)
        return
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)
        norm = query_norm
        if not is_query:
            norm = key_norm
        x *= scale * tl.load(norm + d, mask=is_there, other=0.0).to(tl.float32)
        other *= scale * tl.load(norm + other_d, mask=is_there, other=0.0).to(tl.float32)
    c = tl.load(cos + row * HEAD_DIM + d, mask=is_there, other=0.0).to(tl.float32)
    s = tl.load(sin + row * HEAD_DIM + d, mask=is_there, other=0.0).to(tl.float32)
    rotated = x * c + tl.where(is_first, -other, other) * s
    if is_query:
        out = query + (row * NUM_HEADS + head) * HEAD_DIM
        tl.store(out + d, rotated.to(query.dtype.element_ty), mask=is_there)
    else:
        out = keys + (tl.load(places + row) * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM
        tl.store(out + d, rotated.to(keys.dtype.element_ty), mask=is_there)


@triton.jit
def merge_splits(
    partial_out,
    partial_lse,
    out,  # (num_rows, num_heads, HEAD_DIM)
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,  # part of the head that one program merges
):
    """Merge the splits of one row and head by their log-sum-exps; nothing seen at all gives zeros."""
    place = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, NUM_SPLITS, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        lse = tl.load(partial_lse + place * NUM_SPLITS + split, mask=split < NUM_SPLITS, other=float("-inf"))
        new_best = tl.maximum(best, tl.max(lse, 0))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(lse - base)
        decay = tl.exp2(best - base)
        is_seen = (lse > float("-inf"))[:, None] & (d < HEAD_DIM)[None, :]
        part_place = (place * NUM_SPLITS + split)[:, None] * HEAD_DIM + d[None, :]
        part = tl.load(partial_out + part_place, mask=is_seen, other=0.0)
        acc = acc * decay + tl.sum(part * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        best = new_best
    merged = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + place * HEAD_DIM + d, merged.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def merge_partials(
    outs,  # tuple of (kv_heads, GROUP, n, HEAD_DIM) by their strides, the last one 1
    lses,  # tuple of (kv_heads, GROUP, n), float32
    out_strides,  # of the first three axes, one partial after the other
    lse_strides,
    merged,  # (n, kv_heads * GROUP, HEAD_DIM)
    n,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge partial results of one query head and a block of tokens by their log-sum-exps."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    kv_head, member = head // GROUP, head % GROUP
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    is_row = row < n
    is_there = is_row[:, None] & (d < HEAD_DIM)[None, :]
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for i in tl.static_range(NUM):
        place = kv_head * lse_strides[3 * i] + member * lse_strides[3 * i + 1] + row * lse_strides[3 * i + 2]
        best = tl.maximum(best, tl.load(lses[i] + place, mask=is_row, other=float("-inf")))
    base = tl.where(best == float("-inf"), 0.0, best)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in tl.static_range(NUM):
        place = kv_head * lse_strides[3 * i] + member * lse_strides[3 * i + 1] + row * lse_strides[3 * i + 2]
        weight = tl.exp(tl.load(lses[i] + place, mask=is_row, other=float("-inf")) - base)
        part_place = kv_head * out_strides[3 * i] + member * out_strides[3 * i + 1] + row * out_strides[3 * i + 2]
        part = tl.load(outs[i] + part_place[:, None] + d[None, :], mask=is_there, other=0.0)
        acc += part.to(tl.float32) * weight[:, None]
        total += weight
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = (row * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(merged + place, acc.to(merged.dtype.element_ty), mask=is_there)

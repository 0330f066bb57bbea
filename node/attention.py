"""Attention over K/V segments, merged by log-sum-exp.

A query attends to each segment by itself, and the partial results are merged with the weights that their
log-sum-exps give (the merge of FlashAttention and of FlashInfer's cascade attention). So a long past is read
where it lies: no q x kv mask is built, and K and V are never repeated across the query heads.

Shapes: queries (batch, heads, q_len, head_dim) as the layers hand them over; inside, the query heads of one
K/V head form a group: (batch, kv_heads, group, q_len, head_dim). Segments are (kv_len, kv_heads, head_dim).
"""

import importlib
import logging
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

LONG_QUERY = 1024  # new tokens from which on attention over the past takes longer than anything else
# Of a past, the longest first: length, and how many are one call, so that they fill a card to the end. A kernel takes
# a quarter of a second to be built for each.
PIECES = ((8192, 4), (8192, 2), (8192, 1), (2048, 2), (2048, 1))
_TILE = 128  # queries that such a kernel takes at a time in any case
MAX_PARTIALS = 6  # kept of a past by pieces, each as large as the queries; more are merged on the way

_aten = torch.ops.aten


class Partial(NamedTuple):
    """Attention over one segment."""

    out: Tensor  # (batch, kv_heads, group, q_len, head_dim)
    lse: Tensor  # (batch, kv_heads, group, q_len), float32


def grouped(query: Tensor, num_kv_heads: int) -> Tensor:
    """View (batch, heads, q_len, head_dim) as (batch, kv_heads, group, q_len, head_dim)."""
    return query.unflatten(1, (num_kv_heads, -1))


def attend_shared(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Partial:
    """Attend from every row of the batch to one segment that is visible as a whole.

    query (batch, kv_heads, group, q_len, head_dim); key, value (kv_len, kv_heads, head_dim), kv_len > 0.
    Batch, group and q_len are folded into one query length, so the segment is read once for all of them.
    """
    batch, _, group, q_len, _ = query.shape
    folded = query.permute(1, 2, 0, 3, 4).flatten(1, 3)[None]  # (1, kv_heads, group*batch*q_len, head_dim)
    out, lse = _kernel(folded)(folded, key.transpose(0, 1)[None], value.transpose(0, 1)[None], False, scale)
    out = out[0].unflatten(1, (group, batch, q_len)).permute(2, 0, 1, 3, 4)
    return Partial(out, lse[0].unflatten(1, (group, batch, q_len)).permute(2, 0, 1, 3))


def attend_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Partial:
    """Attend from each row of the batch to its own new tokens, causally.

    query (batch, kv_heads, group, n, head_dim); key, value (batch, kv_heads, n, head_dim).
    """
    batch, num_kv_heads, group = query.shape[:3]
    query = query.flatten(0, 1)
    # One stride-0 axis stands for the group: the kernel reads each K/V head `group` times, nothing is copied.
    key, value = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value))
    out, lse = _kernel(query)(query, key, value, True, scale)
    shape = (batch, num_kv_heads)
    return Partial(out.unflatten(0, shape), lse.unflatten(0, shape))


def attend_recent(query: Tensor, key: Tensor, value: Tensor, scale: float, *, n_varies: bool = False) -> list[Partial]:
    """Attend from the newest tokens of a segment to all of it: they see what was before them, and each other causally.

    query (1, kv_heads, group, n, head_dim); key, value (kv_len, kv_heads, head_dim), the last n of them the new
    tokens' own. As many partials as the kernel has it. With `n_varies` no kernel is used that is built for each n.
    """
    _, num_kv_heads, group, n, head_dim = query.shape
    if n >= LONG_QUERY and not n_varies:
        kernel = long_kernel(query.device, query.dtype, num_kv_heads, group, head_dim)
        if kernel is not None:
            return _attend_by_pieces(kernel, query, key, value, scale)
    num_past = key.shape[0] - n
    if _kernel(query) is _flash_cuda and _flash_reads_recent(query.device, query.dtype):
        return [_attend_grouped(_flash_cuda, query, key, value, True, scale)]
    own_key, own_value = key[num_past:].transpose(0, 1)[None], value[num_past:].transpose(0, 1)[None]
    partials = [attend_causal(query, own_key, own_value, scale)]
    if num_past:
        partials.append(attend_shared(query, key[:num_past], value[:num_past], scale))
    return partials


def _attend_by_pieces(kernel: "Kernel", query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[Partial]:
    """`attend_recent` by a kernel that is built anew for each length: it is given the past, and n, in few lengths."""
    n = query.shape[3]
    first, num_past, partials = 0, key.shape[0] - n, []
    own_key, own_value = (F.pad(x[num_past:], (0, 0, 0, 0, 0, -n % _TILE)) for x in (key, value))
    query = F.pad(query, (0, 0, 0, -n % _TILE))
    _build_pieces(kernel, query.device, query.dtype, query.shape)
    for length, num in PIECES:
        while num_past - first >= length * num:
            some = slice(first, first + length * num)
            keys, values = key[some].unflatten(0, (num, length)), value[some].unflatten(0, (num, length))
            partials += _attend_pieces(kernel, query, keys, values, False, scale)
            first = some.stop
            if len(partials) >= MAX_PARTIALS:
                partials = [_joined(partials)]
    if first < num_past:
        partials.append(attend_shared(query, key[first:num_past], value[first:num_past], scale))
    partials.append(_attend_grouped(kernel, query, own_key, own_value, True, scale))
    return [Partial(out[..., :n, :], lse[..., :n]) for out, lse in partials]


@cache
def _build_pieces(kernel: "Kernel", device: torch.device, dtype: torch.dtype, shape: torch.Size) -> None:
    """Have all pieces of a past built for queries of one shape at once, and not one by one while a past grows."""
    began = time.monotonic()
    query = torch.zeros(shape, device=device, dtype=dtype)
    key = torch.zeros(max(length * num for length, num in PIECES), shape[1], shape[-1], device=device, dtype=dtype)
    for length, num in PIECES:
        keys = key[: length * num].unflatten(0, (num, length))
        _attend_pieces(kernel, query, keys, keys, False, 1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    logger.info("attention of %d tokens to their past was built in %.1f s", shape[3], time.monotonic() - began)


def _attend_pieces(
    kernel: "Kernel", query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> list[Partial]:
    """Attend to each of some pieces, all in one call of a kernel that shares K/V heads among query heads.

    query as in `attend_recent`; key, value (pieces, length, kv_heads, head_dim).
    """
    num, heads = len(key), query.shape[1:3]
    rows = query.flatten(1, 2)
    if num > 1:
        rows = rows.repeat(num, 1, 1, 1)
    out, lse = kernel(rows, key.transpose(1, 2), value.transpose(1, 2), causal, scale)
    return [Partial(out[i : i + 1].unflatten(1, heads), lse[i : i + 1].unflatten(1, heads)) for i in range(num)]


def _joined(partials: list[Partial]) -> Partial:
    """Partials over disjoint segments, of a batch of one, as one over all of them."""
    lse = torch.stack([partial.lse for partial in partials]).logsumexp(0)
    return Partial(grouped(merge(partials).transpose(1, 2), lse.shape[1]), lse)


def _attend_grouped(kernel: "Kernel", query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Partial:
    """Attend to one segment by such a kernel; shapes as in `attend_recent`."""
    return _attend_pieces(kernel, query, key[None], value[None], causal, scale)[0]


def attend_ragged(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float) -> Partial:
    """Attend from each row of the batch to its own few tokens, of which the first `lengths[row]` are visible.

    query (batch, kv_heads, group, q_len, head_dim); key, value (batch, kv_len, kv_heads, head_dim);
    lengths (batch,), each at least 1. Computed in float32.
    """
    scores = torch.einsum("bhgqd,bkhd->bhgqk", query.float(), key.float()) * scale
    hidden = torch.arange(key.shape[1], device=key.device) >= lengths[:, None]
    scores = scores.masked_fill(hidden[:, None, None, None], float("-inf"))
    # Rows that were never written may hold NaN, and 0 * NaN is NaN.
    value = value.masked_fill(hidden[:, :, None, None], 0)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhgqk,bkhd->bhgqd", (scores - lse[..., None]).exp(), value.float())
    return Partial(out.to(query.dtype), lse)


def merge(partials: list[Partial]) -> Tensor:
    """Merge partials over disjoint segments into (batch, q_len, heads, head_dim)."""
    if len(partials) == 1:
        out = partials[0].out
    elif len(partials[0].out) == 1 and _has_merge_kernel(partials[0].out.device):
        return _merged_by_kernel(partials)
    else:
        out = _merged(partials)
    return out.flatten(1, 2).transpose(1, 2)


def _merged(partials: list[Partial]) -> Tensor:
    lse = torch.stack([partial.lse for partial in partials])
    weights = (lse - lse.logsumexp(0)).exp()[..., None]
    out = sum(weight * partial.out for weight, partial in zip(weights, partials, strict=True))
    assert isinstance(out, Tensor)
    return out.to(partials[0].out.dtype)


def _merged_by_kernel(partials: list[Partial]) -> Tensor:
    """As `merge` for a batch of one, each partial read once."""
    kernels: Any = importlib.import_module(".split_kv_kernels", __package__)
    outs, lses = (tuple(part[0] for part in parts) for parts in zip(*partials, strict=True))
    num_kv_heads, group, n, head_dim = outs[0].shape
    merged = outs[0].new_empty(1, n, num_kv_heads * group, head_dim)
    block_n = 16
    kernels.merge_partials[(-(-n // block_n), num_kv_heads * group)](
        outs,
        lses,
        tuple(stride for out in outs for stride in out.stride()[:3]),
        tuple(stride for lse in lses for stride in lse.stride()),
        merged,
        n,
        GROUP=group,
        HEAD_DIM=head_dim,
        NUM=len(partials),
        BLOCK_N=block_n,
        BLOCK_D=1 << (head_dim - 1).bit_length(),
        num_warps=4,
    )
    return merged


@cache
def _has_merge_kernel(device: torch.device) -> bool:
    """Whether partials can be merged by a kernel of our own there; tried once, and in the log if not."""
    if device.type != "cuda":
        return False
    partials = [
        Partial(torch.randn(1, 2, 3, 5, 24, device=device), torch.randn(1, 2, 3, 5, device=device)) for _ in range(3)
    ]
    wanted = _merged(partials).flatten(1, 2).transpose(1, 2)
    try:
        return bool(((_merged_by_kernel(partials) - wanted).abs() <= 1e-5).all())
    except Exception:  # a missing Triton, or a compiler's failure
        logger.warning("partial attention is merged by several kernels", exc_info=True)
        return False


Kernel = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


def _kernel(query: Tensor) -> Kernel:
    """The fused attention of this device and dtype that also returns the log-sum-exp."""
    if query.device.type == "cpu":
        return _flash_cpu
    if query.shape[-1] % 8:
        return _unfused
    if query.dtype in (torch.float16, torch.bfloat16) and _has_flash(query.device):
        return _flash_cuda
    return _efficient_cuda


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _flash_reads_recent(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device's flash attention is as `attend_recent` wants it; tried once, and in the log if not."""
    try:
        is_so = reads_recent(_flash_cuda, device, dtype)
    except RuntimeError:
        logger.warning("flash attention over past and new tokens fails", exc_info=True)
        is_so = False
    if not is_so:
        logger.warning("past and new tokens are attended to one after the other, which takes longer")
    return is_so


def reads_recent(kernel: "Kernel", device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel shares K/V heads among query heads, and counts causality from the end.

    Two tokens that like three keys equally well: the first should see two of them, the second all.
    """
    query = torch.zeros(1, 2, 2, 64, device=device, dtype=dtype)
    key = torch.zeros(1, 1, 3, 64, device=device, dtype=dtype)
    value = torch.tensor([0.0, 3.0, 3.0], device=device, dtype=dtype)[:, None].expand(3, 64).contiguous()[None, None]
    out, lse = kernel(query, key, value, True, 1.0)
    rows = zip((1.5, 2.0), (math.log(2), math.log(3)), strict=True)
    return all(
        bool(((out[:, :, i].float() - mean).abs() <= 0.02).all() and ((lse[:, :, i] - total).abs() <= 0.02).all())
        for i, (mean, total) in enumerate(rows)
    )


@cache
def long_kernel(
    device: torch.device, dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int
) -> "Kernel | None":
    """The kernel that is fastest where many tokens attend to a long past; None: the usual one.

    Measured at the first call: some cards have none but the usual one, and on some it is the faster one.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or not _has_flash(device):
        return None
    query, key, value = (
        torch.randn(1, heads, length, head_dim, device=device, dtype=dtype)
        for heads, length in ((num_kv_heads * group, 2048), (num_kv_heads, 8192), (num_kv_heads, 8192))
    )

    def seconds(kernel: "Kernel") -> float:
        best = math.inf
        for _ in range(4):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            kernel(query, key, value, False, head_dim**-0.5)
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        return best

    try:
        pairs = zip(
            *(kernel(query, key, value, False, head_dim**-0.5) for kernel in (_cudnn, _flash_cuda)), strict=True
        )
        gap = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
        times = {kernel: seconds(kernel) for kernel in (_cudnn, _flash_cuda)}
    except RuntimeError:
        logger.info("cuDNN has no attention for this model here", exc_info=True)
        return None
    is_chosen = gap <= 0.02 and times[_cudnn] < times[_flash_cuda]
    figures = [1e3 * times[kernel] for kernel in (_cudnn, _flash_cuda)]
    chosen = "cuDNN" if is_chosen else "flash"
    logger.info("attention over a long past: cuDNN %.2f ms, flash %.2f ms, apart by %g: %s", *figures, gap, chosen)
    return _cudnn if is_chosen else None


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _efficient_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # the kernel pads it to a multiple of 32


def _unfused(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if causal:
        n = q.shape[2]
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


class MemoryPass:
    """One forward pass through the language model: what it writes, and what it may see."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend from new tokens; query (batch, heads, n, head_dim), key, value (batch, kv_heads, n, head_dim).

        Keys come rotated. Returns (batch, n, heads, head_dim).
        """
        raise NotImplementedError

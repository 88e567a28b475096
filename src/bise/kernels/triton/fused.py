"""Row-wise kernels: norm with residual, gate of the feed-forward part, sum over the experts of a row."""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels.triton import EXACT


@triton.jit
def _norm(x, y, weight, out, width, eps, HAS_Y: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row): x += y; out = x / sqrt(mean(x^2) + eps) * weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0)
    if HAS_Y:
        values += tl.load(y + row * width + column, mask=inside, other=0.0)
        tl.store(x + row * width + column, values, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    weights = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(left, right, out, width, BLOCK: tl.constexpr):
    """Program (row, piece): out = silu(left) * right."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(left + row * width + column, mask=inside, other=0.0)
    up = tl.load(right + row * width + column, mask=inside, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mix(parts, shares, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, piece): out = the sum over ranks of share x part, best expert first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(TOP_K):
        slot = row * TOP_K + rank
        total += tl.load(shares + slot) * tl.load(parts + slot * width + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, total, mask=inside)


def norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Add y to x [T, E] in place (both float32) and return the norm of the sum in `dtype`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = x.shape[1]
    dummy = x if y is None else y
    _norm[(len(x),)](
        x, dummy, weight, out, width, eps, HAS_Y=y is not None, WIDTH=triton.next_power_of_2(width), **EXACT
    )
    return out


def gate(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return silu(left) * right [T, F] in `dtype` of float32 [T, F] each."""
    rows, width = left.shape
    out = torch.empty((rows, width), dtype=dtype, device=left.device)
    _gate[(rows, -(-width // 1024))](left, right, out, width, BLOCK=1024, **EXACT)
    return out


def mix(parts: Tensor, shares: Tensor) -> Tensor:
    """Return the sum [T, E] over ranks of shares [T, top_k] times parts [T * top_k, E], best first."""
    rows, top_k = shares.shape
    width = parts.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32, device=parts.device)
    _mix[(rows, -(-width // 1024))](parts, shares, out, width, TOP_K=top_k, BLOCK=1024, **EXACT)
    return out

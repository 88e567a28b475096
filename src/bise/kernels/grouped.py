"""Packed panels on a torch device: codes and one scale (and minimum) per group of columns.

The values are those of the panels of the cpu backend (docs/formats.md), taken apart once while a model
loads, on the device itself: what crosses the bus are the packed bytes. All formats end in one form, so
kernels know bits per code, columns per group, and whether there is a minimum; nothing of file formats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bise.kernels.dequant import IQ4_VALUES
from bise.kernels.panels import (
    BLOCK_COLUMNS,
    PANEL_FORMATS,
    PANEL_ROWS,
    SUPER_COLUMNS,
    WORDS,
    PanelFormat,
)

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Grouped:
    """A quantised matrix [N, K] on a device; K counts whole groups of 32 columns, padding has value 0.

    value[n, k] = scale[n, k / group] x level(code[n, k]) - minimum[n, k / group], where level(c) is
    c - `zero`, or the c-th value of `IQ4_VALUES`.
    """

    codes: Tensor
    """uint8 [N, K], or [N, K / 2] with two 4-bit codes in a byte: byte j of a 32-column block holds columns j
    (low half) and 16 + j."""
    scale: Tensor
    """[N, K / group], float16 where it is stored so, else float32; int32 words [N, 4 x K / 256] of `nested`
    ones."""
    minimum: Tensor | None
    """As `scale`; None where there is none, or where the words hold it."""
    bits: int
    group: int
    zero: int
    codebook: bool
    num_columns: int
    """K of the matrix without padding."""
    nested: str = ""
    """`u7`, `u6` or `s8`: scales below scales. Each word holds the fields of two groups in its low bits,
    scale (and zero point or minimum) of 7, 6 or 8 bits each; the top bits of four make up the half (`u6`:
    halves) that 256 columns share."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix."""
        return self.codes.shape[0], self.num_columns

    @property
    def size_bytes(self) -> int:
        """Memory on the device."""
        tensors = (self.codes, self.scale, self.minimum)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def rows(self, index: Tensor) -> Grouped:
        """Return the matrix of some of the rows [R]."""
        minimum = None if self.minimum is None else self.minimum[index]
        return replace(self, codes=self.codes[index], scale=self.scale[index], minimum=minimum)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the values [N, K]: formed in float32 with one rounding per operation, then cast to
        `dtype`.
        """
        codes = self.codes
        if self.bits == 4:
            blocks = codes.view(codes.shape[0], -1, 1, BLOCK_COLUMNS // 2)
            codes = torch.cat((blocks & 15, blocks >> 4), 2).flatten(1)
        if self.codebook:
            levels = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)[codes.int()]
        else:
            levels = codes.float() - self.zero
        scale, minimum = self._scales()
        grouped = levels.view(codes.shape[0], -1, self.group) * scale[..., None]
        if minimum is not None:
            grouped = grouped - minimum[..., None]
        return grouped.flatten(1)[:, : self.num_columns].to(dtype)

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        """Return scales and minimums [N, K / group] in float32."""
        if not self.nested:
            return self.scale.float(), None if self.minimum is None else self.minimum.float()
        groups = self.codes.shape[1] * 8 // self.bits // self.group
        words = self.scale.view(len(self.scale), -1, WORDS)
        width, count = {"u7": (7, 4), "u6": (6, 4), "s8": (8, 2)}[self.nested]
        fields = [words >> width * i & ((1 << width) - 1) for i in range(count)]
        low = torch.stack(fields, 3).flatten(2).float()  # [N, K / 256, fields of 256 columns]
        if self.nested == "u6":
            tops = words >> 24 & 255
            first, second = (_half(tops[..., i] | tops[..., i + 1] << 8)[..., None] for i in (0, 2))
            scale, minimum = first * low[..., ::2], second * low[..., 1::2]
            return scale.flatten(1)[:, :groups], minimum.flatten(1)[:, :groups]
        tops = words >> 28 & 15
        top = _half(_joined(tops, 4))[..., None]
        if self.nested == "s8":
            signed = torch.where(low > 127, low - 256, low)
            return (top * signed).flatten(1)[:, :groups], None
        unit = top / 1024 * low[..., ::2]
        minimum = unit * (128 - low[..., 1::2])  # eight units a step, 128 - z the minimum
        return (8 * unit).flatten(1)[:, :groups], minimum.flatten(1)[:, :groups]


def unpack_floats(packed_format: str, num_rows: int, num_columns: int, memory: Tensor) -> Tensor:
    """Return the matrix [N, K] in float panels, bytes uint8 [...], as f32, f16 or bf16."""
    panels = memory.view(FLOATS[packed_format]).view(-1, num_columns, PANEL_ROWS)
    return panels.transpose(1, 2).reshape(-1, num_columns)[:num_rows].contiguous()


def unpack_panels(packed_format: str, num_rows: int, num_columns: int, memory: Tensor) -> Grouped:
    """Return the matrix [N, K] in quantised panels, bytes uint8 [...] on any device."""
    layout = PANEL_FORMATS[packed_format]
    panels = -(-num_rows // PANEL_ROWS)
    blocks = -(-num_columns // BLOCK_COLUMNS)
    body, header = _split_headers(memory.view(panels, -1), layout, blocks)
    low = body[..., : 64 * layout.low_bits]
    high = body[..., 64 * layout.low_bits : 64 * (layout.low_bits + layout.high_bits)]
    tail = body[..., 64 * (layout.low_bits + layout.high_bits) :]
    if layout.stored_bits == 4:
        # Bytes [g][row][c] hold columns 4g + c and 16 + 4g + c: already the pairs that are wanted.
        codes = low.reshape(panels, blocks, 4, PANEL_ROWS, 4).permute(0, 3, 1, 2, 4)
    else:
        codes = _plane(low, layout.low_bits, panels, blocks)
        if layout.high_bits:
            codes = codes | _plane(high, layout.high_bits, panels, blocks) << layout.low_bits
        codes = codes.permute(0, 4, 1, 2, 3, 5)
    if layout.nested:
        assert header is not None
        scale, minimum = _words(layout, tail, header), None
    else:
        scale, minimum = _scales(layout, tail, header, blocks)
    return Grouped(
        codes=codes.reshape(panels * PANEL_ROWS, -1)[:num_rows].contiguous(),
        scale=_by_row(scale, num_rows),
        minimum=None if minimum is None else _by_row(minimum, num_rows),
        bits=layout.stored_bits,
        group=layout.group,
        zero=layout.zero,
        codebook=layout.codebook,
        num_columns=num_columns,
        nested=layout.nested,
    )


def _split_headers(panels: Tensor, layout: PanelFormat, blocks: int) -> tuple[Tensor, Tensor | None]:
    """Return the blocks [P, B, bytes] and the headers [P, B / 8 rounded up, bytes] of panels [P, bytes]."""
    if not layout.header_bytes:
        return panels.view(len(panels), blocks, layout.block_bytes), None
    per_super = SUPER_COLUMNS // BLOCK_COLUMNS
    full = blocks // per_super * (layout.header_bytes + per_super * layout.block_bytes)
    headers: list[Tensor] = []
    bodies: list[Tensor] = []
    for part, count in (
        (panels[:, :full], blocks // per_super),
        (panels[:, full:], 1),
    ):  # the last may be short
        if part.shape[1]:
            supers = part.reshape(len(panels), count, -1)
            headers.append(supers[..., : layout.header_bytes])
            bodies.append(supers[..., layout.header_bytes :].reshape(len(panels), -1, layout.block_bytes))
    return torch.cat(bodies, 1), torch.cat(headers, 1)


def _plane(plane: Tensor, bits: int, panels: int, blocks: int) -> Tensor:
    """Return the codes of a bit plane as [P, B, upper, g, row, c]: column = 32 / upper x upper + 4g + c."""
    groups = plane.reshape(panels, blocks, bits, PANEL_ROWS, 4)
    parts = 8 // bits
    shifted = [groups >> (part * bits) & ((1 << bits) - 1) for part in range(parts)]
    stacked = torch.stack(shifted, 2)  # [P, B, part, stored group, row, c]
    if bits == 2:  # a stored group is 16 columns, its parts follow one another
        stacked = stacked.transpose(2, 3)
    return stacked.reshape(panels, blocks, 1, 8, PANEL_ROWS, 4)


def _halves(raw: Tensor) -> Tensor:
    """Return bytes [..., 32] as halves [..., 16]."""
    return raw.contiguous().view(torch.float16)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """Return integers put together from parts [..., n] of so many bits each, the lowest first, as int32."""
    return (parts << bits * torch.arange(parts.shape[-1], device=parts.device)).sum(-1).int()


def _half(bits: Tensor) -> Tensor:
    """Return the float16 numbers with these 16 bits each, in float32."""
    return torch.where(bits > 32767, bits - 65536, bits).to(torch.int16).view(torch.float16).float()


def _scales(
    layout: PanelFormat, tail: Tensor, header: Tensor | None, blocks: int
) -> tuple[Tensor, Tensor | None]:
    """Return scales and minimums as [P, groups, row]."""
    if header is None:
        scale = _halves(tail[..., :32])
        return scale, _halves(tail[..., 32:64]) if layout.has_min else None
    per_super = SUPER_COLUMNS // layout.group
    scale = _halves(header[..., :32]).float().repeat_interleave(per_super, 1)
    minimum = _halves(header[..., 32:64]).float().repeat_interleave(per_super, 1) if layout.has_min else None
    if layout.sub == "u6 in header":
        assert minimum is not None
        fields = _six_bits(header)
        return (scale * fields[:, ::2].float())[:, :blocks], (minimum * fields[:, 1::2].float())[:, :blocks]
    sub = tail.reshape(len(tail), -1, PANEL_ROWS)  # s8: [P, B, row]; x2: [P, 2B, row]
    if layout.sub == "u4 x2":
        assert minimum is not None
        return scale * (sub & 15).float(), minimum * (sub >> 4).float()
    return scale * sub.view(torch.int8).float(), None


def _words(layout: PanelFormat, tail: Tensor, header: Tensor) -> Tensor:
    """Return the words of nested scales as [P, 4 x K / 256, row]; see `Grouped.nested`."""
    panels, supers = header.shape[:2]
    if layout.nested == "u7":  # lies so in the header
        return header.contiguous().view(torch.int32).view(panels, supers * WORDS, PANEL_ROWS)
    first = _bits(header[..., :32])
    if layout.nested == "s8":
        signed = tail.reshape(panels, -1, PANEL_ROWS).int()
        signed = functional.pad(signed, (0, 0, 0, 8 * supers - signed.shape[1]))
        pairs = signed.view(panels, supers, WORDS, 2, PANEL_ROWS)
        words = [
            pairs[:, :, i, 0] | pairs[:, :, i, 1] << 8 | (first >> 4 * i & 15) << 28 for i in range(WORDS)
        ]
    else:
        tops = (first, first >> 8, _bits(header[..., 32:64]), _bits(header[..., 32:64]) >> 8)
        fields = _six_bits(header).view(panels, supers, WORDS, 4, PANEL_ROWS)
        low = _joined(fields.transpose(3, 4), 6)
        words = [low[:, :, i] | (tops[i] & 255) << 24 for i in range(WORDS)]
    return torch.stack(words, 2).flatten(1, 2)


def _bits(raw: Tensor) -> Tensor:
    """Return the 16-bit numbers in bytes [..., 32] as int32 [..., 16], from 0 to 65535."""
    return raw.contiguous().view(torch.int16).int() & 0xFFFF


def _six_bits(header: Tensor) -> Tensor:
    """Return the six-bit fields [P, 16 S, row] of headers [P, S, bytes]: scale and minimum of block after
    block.
    """
    words = header[..., 4 * PANEL_ROWS :].contiguous().view(torch.int32)
    first, second, third = words.view(*header.shape[:2], 3, PANEL_ROWS).unbind(2)
    fields = [word >> shift & 63 for word in (first, second, third) for shift in range(0, 30, 6)]
    fields.append((first >> 30 & 3) | (second >> 30 & 3) << 2 | (third >> 30 & 3) << 4)
    return torch.stack(fields, 2).flatten(1, 2)


def _by_row(scales: Tensor, num_rows: int) -> Tensor:
    """Return [P, groups, row] as [N, groups]."""
    return scales.transpose(1, 2).reshape(-1, scales.shape[1])[:num_rows].contiguous()

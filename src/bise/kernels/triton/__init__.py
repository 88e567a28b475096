"""The Triton backend: the hot ops of `kernels/torch.py` as kernels for one GPU (docs/gpu.md)."""

from triton import knobs  # pyright: ignore[reportMissingTypeStubs]

EXACT = {} if knobs.runtime.interpret else {"enable_fp_fusion": False}
"""Launch options of every kernel: products and sums are rounded one by one, so that a row has the same bits
in two kernels that the compiler would fuse differently. (The interpreter knows no such option, and never
fuses.)
"""

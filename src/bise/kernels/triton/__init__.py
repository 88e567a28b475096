"""The Triton backend: the hot ops of `kernels/torch.py` as kernels for one GPU (docs/gpu.md)."""

import torch
from triton import knobs  # pyright: ignore[reportMissingTypeStubs]

EXACT = {} if knobs.runtime.interpret else {"enable_fp_fusion": False}
"""Launch options of every kernel: products and sums are rounded one by one, so that a row has the same bits
in two kernels that the compiler would fuse differently. (The interpreter knows no such option, and never
fuses.)
"""


def compute_on(device: torch.device) -> None:
    """Make a device this thread's own: Triton launches there, wherever the memory lies that it is given."""
    is_named = device.index is not None  # pyright: ignore[reportUnnecessaryComparison]
    if device.type == "cuda" and is_named:
        torch.cuda.set_device(device)

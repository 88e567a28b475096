"""The Triton backend: the hot ops of `kernels/torch.py` as kernels for one GPU (docs/gpu.md)."""

import torch
from triton import knobs  # pyright: ignore[reportMissingTypeStubs]

from bise.errors import ConfigError

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


def require_launcher() -> None:
    """Raise ConfigError where Triton cannot start a kernel: for its first one on a machine it compiles a
    piece of C, which it keeps in its folder.
    """
    from triton import runtime  # pyright: ignore[reportMissingTypeStubs]

    try:
        runtime.driver.active.get_current_device()  # pyright: ignore
    except Exception as error:  # whatever a compiler, a linker or a disk may say
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(
            f"Triton cannot start kernels here: {reason}; it needs a C compiler, Python's headers (Debian: "
            "apt-get install gcc python3-dev) and a folder to write to (~/.triton or TRITON_CACHE_DIR); or "
            "use --device cpu",
            field="device",
        ) from error

"""The corpus of malformed model directories: each has one fault and must be refused in one clean line.

Every case is a function that fills an empty directory; the base is a sound model of two layers.
"""

from __future__ import annotations

from bad_configs import CONFIG, NATIVE
from bad_folders import INDEXES, SPECIAL
from bad_safetensors import SAFETENSORS, TENSORS
from sound_models import SOUND, Case

BAD: list[Case] = [*SAFETENSORS, *CONFIG, *TENSORS, *INDEXES, *SPECIAL, *NATIVE]

__all__ = ["BAD", "SOUND", "Case"]

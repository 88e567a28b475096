"""What a model's author suggests for sampling: the temperature in `generation_config.json`."""

from __future__ import annotations

from pathlib import Path

from bise.diskfile import resolve_inside
from bise.errors import ModelFileError
from bise.jsonfile import read_json_object, shown

FILE = "generation_config.json"
PLAIN_TEMPERATURE = 0.7
"""Where the author suggests none; what Mistral's own API took for its 7B."""
_HIGHEST = 5.0


def suggested_temperature(path: Path) -> float:
    """Return the temperature to use when a caller names none, for the model at `path`.

    Example: Mistral Small 3.2 ships `{"temperature": 0.15, ...}`. A .gguf file and a directory without the
    file or the field give 0.7. Raises ModelFileError for a value that is no number from 0 to 5.
    """
    if not (path / FILE).exists():
        return PLAIN_TEMPERATURE
    file = resolve_inside(path, FILE)
    value = read_json_object(file).get("temperature")
    if value is None:
        return PLAIN_TEMPERATURE
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _HIGHEST:
        raise ModelFileError(
            f"{path / FILE}: temperature must be a number from 0 to 5, got {shown(value)}",
            field="temperature",
        )
    return float(value)

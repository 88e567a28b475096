"""The temperature that a model's author suggests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bise.errors import ModelFileError
from bise.model.generation import suggested_temperature


def write(directory: Path, content: object) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(content), "utf-8")
    return directory


def test_the_authors_temperature_counts(tmp_path: Path) -> None:
    assert suggested_temperature(write(tmp_path, {"temperature": 0.15, "top_p": 1})) == 0.15


@pytest.mark.parametrize("content", [{}, {"temperature": None}, {"eos_token_id": 2}])
def test_without_a_suggestion_it_is_mistrals_own_default(tmp_path: Path, content: object) -> None:
    assert suggested_temperature(write(tmp_path, content)) == 0.7


def test_a_file_or_directory_without_generation_config_suggests_nothing(tmp_path: Path) -> None:
    assert suggested_temperature(tmp_path) == 0.7
    assert suggested_temperature(tmp_path / "model.gguf") == 0.7


@pytest.mark.parametrize("value", [-0.1, 5.5, "warm", True, [0.3], 1e300])
def test_a_bad_suggestion_is_refused_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(ModelFileError, match=r"generation_config\.json: temperature must be a number"):
        suggested_temperature(write(tmp_path, {"temperature": value}))

"""What `open_model` tells about a directory; what it refuses is in tests/robustness."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from bise.errors import ModelFileError
from bise.model.checkpoint import open_model

sys.path.insert(0, str(Path(__file__).parents[1] / "robustness"))
tiny = importlib.import_module("sound_models")


def test_a_hugging_face_directory_is_preferred_and_says_so(tmp_path: Path) -> None:
    tiny.write_native(tmp_path)
    assert open_model(tmp_path).kind == "mistral"
    tiny.write_model(tmp_path)
    assert open_model(tmp_path).kind == "safetensors"


def test_metadata_is_the_configuration_as_written(tmp_path: Path) -> None:
    tiny.write_model(tmp_path, {"my_field": "x"})
    source = open_model(tmp_path)
    assert source.metadata == tiny.base_config() | {"my_field": "x"}
    assert (source.path, source.name) == (tmp_path, tmp_path.name)


def test_a_tied_model_has_no_output_matrix(tmp_path: Path) -> None:
    tiny.write_config(tmp_path, {"tie_word_embeddings": True})
    shapes = {name: shape for name, shape in tiny.base_shapes().items() if name != "lm_head.weight"}
    tiny.write_file(tmp_path / "model.safetensors", *tiny.header_of(shapes))
    source = open_model(tmp_path)
    assert source.config.tied_embeddings
    assert "output" not in source.tensors


def test_a_stored_head_of_a_tied_model_is_used_not_ignored(tmp_path: Path) -> None:
    tiny.write_model(tmp_path, {"tie_word_embeddings": True})
    source = open_model(tmp_path)
    assert not source.config.tied_embeddings
    assert "output" in source.tensors


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Title\n", "apache-2.0"),
        ("---\ntags:\n- x\nlicense: 'mit'\n---\n", "mit"),
        ("---\nlicense:\n- cc-by-4.0\n---\n", "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: mrl\n---\n", "mrl"),
        ("# No front matter\nlicense: mit\n", None),
        ("---\nname: x\n---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_comes_from_the_front_matter(tmp_path: Path, readme: str, licence: str | None) -> None:
    tiny.write_model(tmp_path)
    (tmp_path / "README.md").write_text(readme)
    assert open_model(tmp_path).licence == licence


def test_the_licence_file_is_recognised_when_the_readme_says_nothing(tmp_path: Path) -> None:
    tiny.write_model(tmp_path)
    (tmp_path / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    assert open_model(tmp_path).licence == "apache-2.0"


def test_a_hub_cache_gives_the_repository_as_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--tiny-model" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    tiny.write_model(snapshot)
    assert open_model(snapshot).name == "owner/tiny-model"


def test_a_missing_path_a_file_and_a_pickle_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        open_model(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="give the model's directory"):
        open_model(tmp_path / "model.safetensors")
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(ModelFileError, match="pickle, which can run any code"):
        open_model(tmp_path / "model.pth")


def test_a_directory_with_one_gguf_file_opens_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("bise.model.gguf.open_gguf", opened.append)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    open_model(tmp_path)
    open_model(tmp_path / "model-q4.gguf")
    assert opened == [tmp_path / "model-q4.gguf"] * 2


def test_the_root_of_a_hub_cache_points_to_its_snapshots(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(ModelFileError, match="give one of its snapshots"):
        open_model(tmp_path)

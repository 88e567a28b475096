from __future__ import annotations

import pytest

from bise.errors import UserError
from bise.hub.registry import gigabytes, known_models, resolve


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("alias", "total", "active"),
    [  # as published (DESIGN.md's companion FEATURES.md, D1 and D2, and the models' own pages)
        ("mistral-7b", 7_248_023_552, 7_248_023_552),
        ("mistral-7b-v0.1", 7_241_732_096, 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("mistral-nemo", 12_247_782_400, 12_247_782_400),
        ("llama-2-13b", 13_015_864_320, 13_015_864_320),
    ],
)
def test_parameter_counts_are_the_published_ones(alias, total, active):
    model = next(model for model in known_models() if model.alias == alias)
    assert (model.config.num_params, model.config.num_active_params) == (total, active)


def test_only_the_first_mistral_7b_has_a_window():
    windowed = {model.alias for model in known_models() if model.config.windows[0] is not None}
    assert windowed == {"mistral-7b-v0.1", "mistral-7b-v0.1-base"}


def test_aliases_and_repositories_are_unique():
    models = known_models()
    assert len({m.alias for m in models}) == len({m.repo for m in models}) == len(models)


def test_a_path_wins_over_an_alias(tmp_path, monkeypatch):
    (tmp_path / "mistral-7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("mistral-7b").absolute() == tmp_path / "mistral-7b"


@pytest.mark.parametrize("name", ["mistral-7b", "mistral-7b.gguf"])
def test_an_alias_is_found_under_bise_home(home, name):
    target = home / "models" / name
    target.parent.mkdir(parents=True)
    target.touch()
    assert resolve("mistral-7b") == target


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", "licence Apache-2.0"),
        ("some/where", "no such file or directory"),
        ("model.gguf", "no such file or directory"),
        ("nothing-like-it", "bise models"),
        ("a" * 300, "cannot be looked up"),
        ("", "MODEL is empty"),
    ],
)
def test_what_is_not_here_is_refused_with_the_way_out(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text):
        resolve(name)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (2_500_000, "2.5 MB"),
        (14_496_047_104, "14.5 GB"),
        (281e9, "281 GB"),
    ],
)
def test_sizes_are_told_in_decimal_units(size, text):
    assert gigabytes(size) == text

"""Folder, hub, preset: which one answers a name, and what is said where none can."""

from __future__ import annotations

import pytest

from tests.model.refused_name import refused
from tests.support.tiny_checkpoints import make
from turbofit.model.source import resolve_model


def test_a_folder_wins_over_everything_where_it_has_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "internvl2-8b").mkdir()
    assert resolve_model("internvl2-8b").source.kind == "preset"
    assert "config.json" in refused("./internvl2-8b").message
    make(tmp_path / "internvl2-8b")
    model = resolve_model("internvl2-8b")
    assert (model.source.kind, model.architecture) == ("folder", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", ""), ("  ", ""), ("./gone", ""), ("/gone", ""), ("~/gone", ""), ("..", ""),
        ("a\0b", ""), ("./a\0b", ""), ("x" * 10_000, ""), ("internvl2-9b", "internvl2-8b"),
    ],
)  # fmt: skip
def test_names_of_nothing(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(name)
    assert hint in error.hint
    assert len(error.message) < 200

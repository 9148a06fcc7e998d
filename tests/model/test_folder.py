"""Folders of the hubs' caches: where they are, which revision counts, which cache is first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.checkpoints import make_internvl2, make_text
from tests.support.hubs import COMMIT
from turbofit.core.errors import UsageError
from turbofit.model.folder import hub_cache, modelscope_folders, uses_modelscope
from turbofit.model.source import resolve_model


def cache_of(tmp_path, hub_id, commit=COMMIT, ref="main"):
    """The folder of a snapshot in the local hub cache."""
    base = tmp_path / "hf" / "hub" / f"models--{hub_id.replace('/', '--')}"
    folder = base / "snapshots" / commit
    folder.mkdir(parents=True)
    if ref:
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / ref).write_text(commit)
    return folder


def test_the_cache_answers_a_hub_id_and_an_alias(tmp_path):
    hub_id = "OpenGVLab/InternVL2-8B"
    folder = make_internvl2(cache_of(tmp_path, hub_id))
    for name in (hub_id, "internvl2-8b"):
        model = resolve_model(name)
        assert (model.source.kind, model.source.where) == ("hub_cache", str(folder))
        assert (model.source.checkpoint, model.source.sizes) == (str(folder), "file")
        assert (model.name, model.hub_id) == ("InternVL2-8B", hub_id)
    # A snapshot that is half downloaded is not the model, but its config is still the best known.
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model("internvl2-8b").source.kind == "preset"
    model = resolve_model(hub_id)
    source = (model.source.kind, model.source.sizes, model.source.checkpoint)
    assert source == ("hub_cache", "formula", None)
    assert "not in the local hub cache" in model.warnings[0]


def test_revisions_in_the_cache(tmp_path):
    make_text(cache_of(tmp_path, "org/tiny", commit="b" * 40, ref="v1"))
    assert resolve_model("org/tiny", revision="v1").source.kind == "hub_cache"
    assert resolve_model("org/tiny", revision="b" * 40).source.kind == "hub_cache"
    for revision in (None, "v2", "../../v1", "\0", "b" * 39):
        with pytest.raises(UsageError):
            resolve_model("org/tiny", revision=revision)


NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "given",
    [
        {}, {"XDG_CACHE_HOME": "/x"}, {"XDG_CACHE_HOME": "x"}, {"HF_HOME": "~/hf"},
        {"HF_HOME": "$HOME/hf", "XDG_CACHE_HOME": "/x"}, {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"},
    ],
)  # fmt: skip
def test_it_is_where_the_hub_downloads_to(given: dict[str, str]) -> None:
    pytest.importorskip("huggingface_hub")
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    environ = {k: v for k, v in os.environ.items() if k not in NAMES} | given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert hub_cache(given) == done.stdout.rstrip("\n")


@pytest.mark.parametrize(
    "layout",
    [
        "models/Qwen--Qwen2.5-7B/snapshots/master", "models/Qwen--Qwen2.5-7B/snapshots/main",
        "models/Qwen/Qwen2___5-7B", "hub/models/Qwen/Qwen2___5-7B", "hub/Qwen/Qwen2___5-7B",
        "hub/Qwen/Qwen2.5-7B", "Qwen/Qwen2___5-7B", "Qwen/Qwen2.5-7B",
    ],
)  # fmt: skip
def test_every_layout_of_the_cache_is_found(tmp_path, layout):
    folder = make_text(tmp_path / "ms" / layout)
    model = resolve_model("Qwen/Qwen2.5-7B")
    assert (model.source.kind, model.source.checkpoint) == ("hub_cache", str(folder))
    assert (model.name, model.hub_id) == ("Qwen2.5-7B", "Qwen/Qwen2.5-7B")


@pytest.mark.parametrize("wanted", ["False", "1", "", "true", "True"])
def test_the_hub_in_use_has_the_first_cache(tmp_path, monkeypatch, wanted):
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", wanted)
    snapshot = make_text(cache_of(tmp_path, "org/tiny"))
    folder = make_text(tmp_path / "ms" / "org" / "tiny")
    first = folder if wanted.lower() == "true" else snapshot
    assert uses_modelscope() is (first is folder)
    assert resolve_model("org/tiny").source.checkpoint == str(first)


def test_revisions_of_the_folders(tmp_path, monkeypatch):
    flat = make_text(tmp_path / "ms" / "org" / "tiny")
    base = tmp_path / "ms" / "models" / "org--tiny"
    newer = make_text(base / "snapshots" / "v2")
    make_text(base)

    def found(hub_id, revision=None):
        return list(modelscope_folders(hub_id, revision))

    assert (found("org/tiny", "v2"), found("org/tiny", "v1.0")) == ([str(newer)], [])
    assert found("org/tiny") == [str(flat)]
    # None of them leaves the cache, and what is not an id is not looked up.
    for revision in ("..", "../v2", "a/../b", ".", "\0", "a\nb"):
        assert found("org/tiny", revision) == []
    for hub_id in ("tiny", "a/b/c", "../tiny", "org/..", "org/", "/tiny", "a\0/b"):
        assert found(hub_id) == []
    # The usual place is in the home.
    monkeypatch.delenv("MODELSCOPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = make_text(tmp_path / ".cache" / "modelscope" / "hub" / "models" / "org" / "tiny")
    assert found("org/tiny") == [str(usual)]

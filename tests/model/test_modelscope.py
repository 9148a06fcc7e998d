"""ModelScope's folders, and its hub over a local stand-in for it."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import make_text
from tests.support.hubs import MODELSCOPE_API, ModelScope
from tests.support.tiny_checkpoints import make
from turbofit.core.errors import UsageError
from turbofit.model.caches import modelscope_folders, uses_modelscope
from turbofit.model.source import resolve_model


@pytest.fixture
def online(tmp_path, monkeypatch):
    """ModelScope with one model, ``org/tiny``, and its store of large files elsewhere."""
    root = tmp_path / "site"
    make(root / "org" / "tiny")
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ModelScope(root) as site, ModelScope(root) as site.other:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", site.url)
        yield site


# --- the folders -------------------------------------------------------------------------------

LAYOUTS = [
    "models/Qwen--Qwen2.5-7B/snapshots/master",
    "models/Qwen--Qwen2.5-7B/snapshots/main",
    "models/Qwen/Qwen2___5-7B",
    "hub/models/Qwen/Qwen2___5-7B",
    "hub/Qwen/Qwen2___5-7B",
    "hub/Qwen/Qwen2.5-7B",
    "Qwen/Qwen2___5-7B",
    "Qwen/Qwen2.5-7B",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_cache_is_found(tmp_path, layout):
    folder = make_text(tmp_path / "ms" / layout)
    model = resolve_model("Qwen/Qwen2.5-7B")
    assert (model.source.kind, model.source.checkpoint) == ("hub_cache", str(folder))
    assert (model.name, model.hub_id) == ("Qwen2.5-7B", "Qwen/Qwen2.5-7B")


def test_the_usual_place_is_in_the_home(tmp_path, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_text(tmp_path / ".cache" / "modelscope" / "hub" / "models" / "org" / "tiny")
    assert list(modelscope_folders("org/tiny", None)) == [str(folder)]


@pytest.mark.parametrize("wanted", ["False", "1", "", "true", "True"])
def test_the_hub_in_use_has_the_first_cache(tmp_path, monkeypatch, wanted):
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", wanted)
    base = tmp_path / "hf" / "hub" / "models--org--tiny"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("a" * 40)
    snapshot = make_text(base / "snapshots" / ("a" * 40))
    folder = make_text(tmp_path / "ms" / "org" / "tiny")
    first = folder if wanted.lower() == "true" else snapshot
    assert uses_modelscope() is (first is folder)
    assert resolve_model("org/tiny").source.checkpoint == str(first)


def test_revisions_of_the_folders(tmp_path):
    flat = make_text(tmp_path / "ms" / "org" / "tiny")
    newer = make_text(tmp_path / "ms" / "models" / "org--tiny" / "snapshots" / "v2")
    assert list(modelscope_folders("org/tiny", "v2")) == [str(newer)]
    assert list(modelscope_folders("org/tiny", "v1.0")) == []
    (flat / ".mv").write_text("Revision:v1.0,CreatedAt:1719000000")
    assert list(modelscope_folders("org/tiny", "v1.0")) == [str(flat)]
    assert list(modelscope_folders("org/tiny", None)) == [str(flat)]


@pytest.mark.parametrize("revision", ["..", "../x", "a/../b", ".", "\0", "a\nb"])
def test_a_revision_does_not_leave_the_cache(tmp_path, revision):
    make_text(tmp_path / "ms" / "models" / "org--tiny")
    make_text(tmp_path / "ms" / "models" / "org--tiny" / "snapshots" / "x")
    assert list(modelscope_folders("org/tiny", revision)) == []


@pytest.mark.parametrize("hub_id", ["tiny", "a/b/c", "../tiny", "org/..", "org/", "/tiny", "a\0/b"])
def test_what_is_not_an_id_is_not_looked_up(tmp_path, hub_id):
    make_text(tmp_path / "ms")
    assert list(modelscope_folders(hub_id, None)) == []


# --- the hub -----------------------------------------------------------------------------------


def test_modelscope_answers_instead_of_the_hub(online, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    model = resolve_model("org/tiny")
    assert (model.source.kind, model.source.sizes, model.source.checkpoint) == ("hub", "file", None)
    assert model.source.where == f"{online.url.removeprefix('http://')}/org/tiny@master"
    assert model.weight_bytes == 2 * model.parameters
    assert model.warnings == ()
    assert (
        online.seen[0][0] == f"{MODELSCOPE_API}org/tiny/repo/files?Revision=master&Recursive=False"
    )
    ranges = [wanted for path, _, wanted in online.other.seen]
    assert ranges
    assert all(wanted and wanted.startswith("bytes=0-") for wanted in ranges)


def test_the_token_goes_to_modelscope_and_not_where_it_redirects(online, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "se cret\n")
    assert resolve_model("org/tiny").source.sizes == "file"
    assert {cookie for _, cookie, _ in online.seen} == {"m_session_id=se%20cret"}
    assert {cookie for _, cookie, _ in online.other.seen} == {None}


@pytest.mark.parametrize("trick", ["", "says"])
def test_unknown_repositories_and_revisions(online, trick):
    online.trick = trick
    with pytest.raises(UsageError, match="no model org/nothing at master") as error:
        resolve_model("org/nothing")
    assert "LMDEPLOY_USE_MODELSCOPE" in error.value.hint
    with pytest.raises(UsageError, match="v9"):
        resolve_model("org/tiny", revision="v9")


@pytest.mark.parametrize(("trick", "said"), [("private", "HTTP 403"), ("html", "not JSON")])
def test_a_site_that_fails_is_one_line(online, trick, said):
    online.trick = trick
    with pytest.raises(UsageError, match=said) as error:
        resolve_model("org/tiny")
    assert "\n" not in error.value.message
    assert "MODELSCOPE" in error.value.hint


def test_a_preset_stands_in_under_the_id_that_was_asked_for(online):
    model = resolve_model("LLM-Research/Meta-Llama-3.1-8B-Instruct")
    assert (model.source.kind, model.source.where) == ("preset", "llama-3.1-8b")
    assert model.hub_id == "LLM-Research/Meta-Llama-3.1-8B-Instruct"
    assert "no model" in model.warnings[0]


def test_a_wrong_endpoint_is_named(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "true")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "nonsense")
    with pytest.raises(UsageError, match="MODELSCOPE_ENDPOINT"):
        resolve_model("org/tiny")

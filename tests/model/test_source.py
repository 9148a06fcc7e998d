"""Folder, hub cache, hub, preset: which one answers, and what it says when the others could not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.checkpoints import make_internvl2, make_text, write_safetensors
from tests.support.hubs import COMMIT, Hub
from tests.support.tiny_checkpoints import llama_tensors, make
from turbofit.core.errors import UsageError
from turbofit.model import hub
from turbofit.model.caches import hub_cache
from turbofit.model.source import resolve_model


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A hub with one model, ``org/tiny``."""
    root = tmp_path / "hub"
    make(root / "org" / "tiny")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Hub(root) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def cache_of(tmp_path, hub_id, commit=COMMIT, ref="main"):
    """The folder of a snapshot in the local hub cache."""
    base = tmp_path / "hf" / "hub" / f"models--{hub_id.replace('/', '--')}"
    folder = base / "snapshots" / commit
    folder.mkdir(parents=True)
    if ref:
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / ref).write_text(commit)
    return folder


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_wins_over_everything(tmp_path, monkeypatch):
    make(tmp_path / "internvl2-8b")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("internvl2-8b").source.kind == "folder"
    assert resolve_model("internvl2-8b").architecture == "LlamaForCausalLM"


def test_a_folder_without_config_does_not_hide_a_preset(tmp_path, monkeypatch):
    (tmp_path / "internvl2-8b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("internvl2-8b").source.kind == "preset"
    with pytest.raises(UsageError, match=r"config\.json"):
        resolve_model("./internvl2-8b")


@pytest.mark.parametrize("config", ["", '{"architectures": ["LlavaLlamaForCausalLM"]}'])
def test_an_adapter_is_not_a_model(tmp_path, config):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    if config:
        (tmp_path / "lora" / "config.json").write_text(config)
    with pytest.raises(UsageError) as error:
        resolve_model(str(tmp_path / "lora"))
    assert "turbofit merge BASE ADAPTER OUT" in error.value.hint


@pytest.mark.parametrize("name", ["", "  ", "./gone", "/gone", "~/gone", "..", "a\0b", "./a\0b"])
def test_paths_that_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        resolve_model(name)


def test_a_folder_of_the_hub_cache_that_is_not_here_names_its_model() -> None:
    with pytest.raises(UsageError) as error:
        resolve_model("/gone/models--OpenGVLab--InternVL2-8B/snapshots/x")
    assert "the hub calls it OpenGVLab/InternVL2-8B" in error.value.hint


def test_unknown_names_give_the_nearest():
    with pytest.raises(UsageError) as error:
        resolve_model("internvl2-9b")
    assert "internvl2-8b" in error.value.hint
    with pytest.raises(UsageError) as error:
        resolve_model("x" * 10_000)
    assert len(error.value.message) < 200


# --- the hub cache -----------------------------------------------------------------------------


def test_the_cache_answers_a_hub_id_and_an_alias(tmp_path):
    folder = make_internvl2(cache_of(tmp_path, "OpenGVLab/InternVL2-8B"))
    for name in ("OpenGVLab/InternVL2-8B", "internvl2-8b"):
        model = resolve_model(name)
        assert (model.source.kind, model.source.where) == ("hub_cache", str(folder))
        assert (model.source.checkpoint, model.source.sizes) == (str(folder), "file")
        assert (model.name, model.hub_id) == ("InternVL2-8B", "OpenGVLab/InternVL2-8B")


def test_a_half_downloaded_snapshot_is_not_the_model(tmp_path):
    folder = make_internvl2(cache_of(tmp_path, "OpenGVLab/InternVL2-8B"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert resolve_model("internvl2-8b").source.kind == "preset"
    model = resolve_model("OpenGVLab/InternVL2-8B")  # its config is still the best known
    assert (model.source.kind, model.source.sizes, model.source.checkpoint) == (
        "hub_cache", "formula", None,
    )  # fmt: skip
    assert "not in the local hub cache" in model.warnings[0]


def test_revisions_in_the_cache(tmp_path):
    make_text(cache_of(tmp_path, "org/tiny", commit="b" * 40, ref="v1"))
    assert resolve_model("org/tiny", revision="v1").source.kind == "hub_cache"
    assert resolve_model("org/tiny", revision="b" * 40).source.kind == "hub_cache"
    for revision in (None, "v2", "../../v1", "\0", "b" * 39):
        with pytest.raises(UsageError):
            resolve_model("org/tiny", revision=revision)


@pytest.mark.parametrize("key", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"])
def test_where_the_cache_is(tmp_path, monkeypatch, key):
    make_text(cache_of(tmp_path, "org/tiny"))
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(key, str(tmp_path / "hf" / ("" if key == "HF_HOME" else "hub")))
    assert resolve_model("org/tiny").source.kind == "hub_cache"


# --- the hub -----------------------------------------------------------------------------------


def test_the_hub_answers(online):
    model = resolve_model("org/tiny")
    assert (model.source.kind, model.source.sizes, model.source.checkpoint) == ("hub", "file", None)
    assert model.source.where.endswith(f"org/tiny@{COMMIT}")
    assert model.weight_bytes == 2 * model.parameters
    assert model.warnings == ()
    ranges = [wanted for path, _, wanted in online.seen if path.endswith(".safetensors")]
    assert ranges
    assert all(wanted and wanted.startswith("bytes=0-") for wanted in ranges)


def test_a_long_header_takes_a_second_request(online, monkeypatch):
    monkeypatch.setattr(hub, "_FIRST_BYTES", 100)
    assert resolve_model("org/tiny").weight_bytes == 2 * resolve_model("org/tiny").parameters


def test_shards_on_the_hub(online):
    folder = online.root / "org" / "tiny"
    (folder / "model.safetensors").unlink()
    tensors = llama_tensors()
    where = {name: f"model-{i % 12}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        write_safetensors(folder / file, {n: tensors[n] for n in tensors if where[n] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert resolve_model("org/tiny").weight_bytes == 2 * resolve_model("org/tiny").parameters
    (folder / "model-3.safetensors").unlink()
    with pytest.raises(UsageError, match="model-3"):
        resolve_model("org/tiny")


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(online, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Hub(online.root) as other:
        online.other, online.trick = other, "elsewhere"
        assert resolve_model("org/tiny").source.sizes == "file"
    assert {token for _, token, _ in online.seen} == {"Bearer secret"}
    assert other.seen
    assert {token for _, token, _ in other.seen} == {None}


def test_the_log_tells_each_file_and_no_secret(online, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with caplog.at_level(logging.DEBUG, logger="turbofit"):
        resolve_model("org/tiny")
    told = [one.getMessage() for one in caplog.records]
    assert any("/org/tiny/resolve/main/config.json: 200" in text for text in told)
    assert told[-1].startswith("model org/tiny: ")
    assert told[-1].endswith("sizes by file")
    assert "secret" not in caplog.text


@pytest.mark.parametrize("trick", ["gated", "broken", "loop", "scheme", "endless"])
def test_a_hub_that_fails_is_one_line(online, trick):
    online.trick = trick
    with pytest.raises(UsageError) as error:
        resolve_model("org/tiny")
    assert "\n" not in error.value.message
    assert "/etc/passwd" not in error.value.message


def test_a_hub_that_lies_is_an_error(online):
    online.trick = "lies"
    with pytest.raises(UsageError, match="safetensors"):
        resolve_model("org/tiny")


def test_a_hub_without_ranges_still_gives_headers(online):
    online.trick = "no_ranges"
    assert resolve_model("org/tiny").source.sizes == "file"


def test_a_dripping_hub_meets_the_deadline(online, monkeypatch):
    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: online.now))
    online.trick = "drip"
    with pytest.raises(UsageError, match="more than 30 s"):
        resolve_model("org/tiny")
    assert online.now > 30


def test_unknown_repositories_and_revisions(online):
    with pytest.raises(UsageError) as error:
        resolve_model("org/nothing")
    assert "org/nothing" in error.value.message
    with pytest.raises(UsageError, match="v9"):
        resolve_model("org/tiny", revision="v9")


# --- presets behind the hub --------------------------------------------------------------------


def test_a_preset_stands_in_for_a_hub_that_is_out_of_reach(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    model = resolve_model("OpenGVLab/InternVL2-8B")
    assert model.source.kind == "preset"
    assert "127.0.0.1:9 cannot be reached" in model.warnings[0]
    assert "preset internvl2-8b" in model.warnings[0]
    with pytest.raises(UsageError, match="cannot be reached"):
        resolve_model("org/tiny")


def test_offline_is_said(monkeypatch):
    assert "forbids the network" in resolve_model("Qwen/Qwen2-VL-7B-Instruct").warnings[0]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "yes")
    assert "forbids the network" in resolve_model("Qwen/Qwen2-VL-7B-Instruct").warnings[0]


def test_an_alias_never_asks_the_network(online):
    assert resolve_model("internvl2-8b").warnings == ()
    assert online.seen == []


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://x", "http://", "http://[bad"])
def test_a_wrong_endpoint(monkeypatch, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UsageError):
        resolve_model("org/tiny")


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

"""Weights: downloads, with a module that stands in for the hub's client."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.support.plans import plausible_plan
from turbofit.core.errors import LaunchError
from turbofit.core.model import ModelSource
from turbofit.core.plan import Plan
from turbofit.core.process.progress import Step, listened
from turbofit.planning.examine.scene import Sources
from turbofit.serving import weights
from turbofit.serving.weights import fetched


def hub_plan() -> Plan:
    plan = plausible_plan(gpus=1, tp=1)
    source = ModelSource(kind="hub", where="hub", sizes="file")
    model = msgspec.structs.replace(
        plan.model, hub_id="org/name", revision="abc", source=source, weight_bytes=1 << 20
    )
    return msgspec.structs.replace(plan, model=model)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LMDEPLOY_USE_MODELSCOPE", raising=False)
    monkeypatch.setattr(weights, "_FOLDERS", {})

    def install(body: str, module: str = "huggingface_hub") -> None:
        package = tmp_path / "hub"
        package.mkdir(exist_ok=True)
        (package / f"{module}.py").write_text(
            f"def snapshot_download(name, revision=None, ignore_patterns=()):\n    {body}\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(package))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    return install


def test_the_folder_that_came_is_fetched_once(hub, tmp_path: Path) -> None:
    hub(f"assert (name, revision) == ('org/name', 'abc'); return {str(tmp_path)!r}")
    said: list[str] = []
    for _ in range(2):
        model = fetched(hub_plan().model, said.append)
        assert model.source.checkpoint == str(tmp_path)
    assert said == ["phase: download (org/name, 1.0 MiB)"]
    # What is on disk is not asked for.
    assert fetched(model, said.append) is model
    assert len(said) == 1


def test_torchs_own_files_come_where_there_are_no_safetensors(hub, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    write = f"open({str(asked)!r}, 'a').write(f'{{\"*.bin\" in ignore_patterns}} ')"
    hub(f"{write}; return {str(tmp_path)!r}")
    fetched(hub_plan().model, lambda _: None)
    assert asked.read_text() == "True False "
    (tmp_path / "model.safetensors").write_text("")
    weights._FOLDERS.clear()  # as in another process
    fetched(hub_plan().model, lambda _: None)
    assert asked.read_text() == "True False True "


@pytest.mark.parametrize(
    ("key", "below"), [("HUGGINGFACE_HUB_CACHE", ""), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_what_is_there_is_looked_for_where_the_hub_puts_it(hub, tmp_path, monkeypatch, key, below):
    hub("pass")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(key, str(tmp_path / "other"))
    blobs = tmp_path / "other" / below / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"x" * 7)
    assert weights._here("org/name") == 7


def test_how_far_it_is(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told to who listens, and said where nobody does; it ends once it was told of.

    What an earlier download left is done from the start: the bar of a resumed one gets to its end.
    """
    monkeypatch.setattr(weights, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(weights, "_SAY_SECONDS", 0.0)
    gate, blobs = tmp_path / "gate", tmp_path / "home/hub/models--org--name/blobs"
    os.mkfifo(gate)
    blobs.mkdir(parents=True)
    (blobs / "earlier").write_bytes(bytes(3 << 18))
    hub(
        f"open({str(blobs / 'new.incomplete')!r}, 'wb').write(bytes(1 << 18)); "
        f"open({str(gate)!r}).close(); return {str(tmp_path)!r}"
    )
    heard: list[Step | None] = []
    said: list[str] = []

    def hear(step: Step | None) -> None:
        heard.append(step)
        if step is not None and step.done == 1 << 20:
            gate.write_text("")

    def say(line: str) -> None:
        said.append(line)
        if line == "downloading org/name: 1.0 MiB of 1.0 MiB":
            gate.write_text("")

    with listened(hear):
        fetched(hub_plan().model, said.append)
    assert heard[0] == Step("downloading org/name")
    assert heard[1] == Step("downloading org/name", 3 << 18, 1 << 20, "bytes")
    assert Step("downloading org/name", 1 << 20, 1 << 20, "bytes") in heard
    assert heard[-1] is None
    assert len(said) == 1
    (blobs / "new.incomplete").unlink()
    weights._FOLDERS.clear()  # as in another process
    fetched(hub_plan().model, say)
    assert said[-1] == "downloading org/name: 1.0 MiB of 1.0 MiB"


def test_what_goes_wrong(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(cause: str) -> None:
        with pytest.raises(LaunchError, match=cause):
            fetched(hub_plan().model, print)

    hub("raise RuntimeError('401 Client Error')")
    refused("RuntimeError: 401 Client Error")
    hub("return '/no/such/folder'")
    refused("cannot be downloaded")
    hub(f"return {str(tmp_path)!r}")
    monkeypatch.setattr(Sources, "disk_free", lambda *_: ((1 << 30) + (1 << 18), True))
    refused("the missing weights take")
    # What came before needs no room.
    blobs = tmp_path / "home/hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / "one.incomplete").write_bytes(bytes(3 << 18))
    assert fetched(hub_plan().model, print).source.checkpoint == str(tmp_path)


def test_modelscope_where_lmdeploy_would_ask_it(hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LMDEPLOY_USE_MODELSCOPE", "True")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    hub("raise ModuleNotFoundError(\"No module named 'modelscope'\")", "modelscope")
    with pytest.raises(LaunchError, match="No module named 'modelscope'") as error:
        fetched(hub_plan().model, print)
    assert "install modelscope" in error.value.hint
    hub("raise AssertionError")
    hub(f"print('Downloading'); return {str(tmp_path)!r}", "modelscope")
    assert fetched(hub_plan().model, print).source.checkpoint == str(tmp_path)
    weights._FOLDERS.clear()  # as in another process
    monkeypatch.setattr(Sources, "disk_free", lambda *_: (1 << 20, True))
    with pytest.raises(LaunchError, match="ms has") as error:
        fetched(hub_plan().model, print)
    assert "MODELSCOPE_CACHE" in error.value.hint


def test_a_download_that_sigkill_does_not_end_holds_nobody(hub, tmp_path, monkeypatch) -> None:
    """A process in a file system that is silent stays until that answers."""
    held: list[int] = []
    monkeypatch.setattr("os.killpg", lambda pid, _: held.append(pid))
    for name, seconds in (("_LOOK_SECONDS", 0.05), ("_SAY_SECONDS", 0.0), ("_LAST_SECONDS", 0.0)):
        monkeypatch.setattr(weights, name, seconds)
    gate = tmp_path / "go"
    gate.touch()
    hub(f"import os, time\n    while os.path.exists({str(gate)!r}): time.sleep(0.01)")

    def interrupt(text: str) -> None:
        if text.startswith("downloading"):
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            fetched(hub_plan().model, interrupt)
        assert len(held) == 1
    finally:
        gate.unlink()

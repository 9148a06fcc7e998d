"""Paths that are there and are no checkpoint: what they lack, and never a word of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.core.errors import UsageError
from turbofit.model.source import resolve_model


def refused(name: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve_model(name)
    assert "cannot be reached" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([], "has no config.json: the folder is empty", "Hugging Face's format"),
        (["README.md"], "has no config.json", "Hugging Face's format"),
        (["model-Q4_K_M.gguf"], "GGUF", "safetensors checkpoint that it was made of"),
        (["consolidated.00.pth", "params.json"], "original format of Llama", "safetensors"),
        (["pytorch_model.bin"], "holds weights, but no config.json", "put config.json"),
        (["model.safetensors"], "holds weights, but no config.json", "put config.json"),
        (["final/config.json"], "but final in it has", "/final"),
        (["snapshots/abc/config.json"], "but snapshots/abc in it has", "snapshots/abc"),
    ],
)
@pytest.mark.parametrize("name", ["{path}", "org/name", "name"])
def test_a_folder(
    name: str, files: list[str], message: str, hint: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Named by its whole path, as a hub id is written, and by one word."""
    root = tmp_path / "org"
    folder = root / "name"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    monkeypatch.chdir(root if name == "name" else tmp_path)
    error = refused(name.format(path=folder))
    assert message in error.message
    assert str(folder) in error.message
    assert hint in error.hint


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("a.gguf", "models/a.gguf", "models/pytorch_model.bin"):
        (tmp_path / name).write_text("")
    assert "is GGUF" in refused("a.gguf").message
    assert "is GGUF" in refused("models/a.gguf").message
    assert "is GGUF" in refused("./models/a.gguf").message
    error = refused("models/pytorch_model.bin")
    assert "is a file, not a checkpoint's folder" in error.message
    (tmp_path / "models" / "config.json").write_text("{}")
    assert refused("models/pytorch_model.bin").hint == f"name its folder: {tmp_path / 'models'}"


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "is here" in refused(str(tmp_path / "nothing")).message

from __future__ import annotations

import os
from pathlib import Path

import pytest

from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec
from turbofit.batch.folder_source import FolderSource
from turbofit.batch.jsonl_source import JsonlSource
from turbofit.batch.table_source import TableSource
from turbofit.core.errors import UsageError


def test_the_kind_is_seen(tmp_path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text("")
        assert isinstance(open_input(tmp_path / name, BatchSpec()), JsonlSource)
    (tmp_path / "a.CSV").write_text("prompt\n")
    assert isinstance(open_input(tmp_path / "a.CSV", BatchSpec()), TableSource)
    (tmp_path / "a.png").write_text("")
    assert isinstance(open_input(tmp_path, BatchSpec(prompt="x")), FolderSource)


def test_a_prompt_may_be_a_file(tmp_path) -> None:
    (tmp_path / "a.png").write_text("")
    (tmp_path / "p.txt").write_text("two\nlines\n")
    source = open_input(tmp_path, BatchSpec(prompt_file=str(tmp_path / "p.txt")))
    (item,) = source.items()
    assert item.body["messages"][0]["content"][1]["text"] == "two\nlines"
    with pytest.raises(UsageError, match="cannot be read"):
        open_input(tmp_path, BatchSpec(prompt_file=str(tmp_path / "none")))


def test_what_cannot_be_an_input_is_said(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_input(tmp_path / "none", BatchSpec())
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        open_input(tmp_path / ("a" * 300), BatchSpec())
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UsageError, match="--prompt does not fit"):
        open_input(tmp_path / "a.jsonl", BatchSpec(prompt="x"))
    (tmp_path / "a.png").write_text("")
    with pytest.raises(UsageError, match="--image-column does not fit"):
        open_input(tmp_path, BatchSpec(prompt="x", image_column=("y",)))
    with pytest.raises(UsageError, match="no file that can be read twice"):
        open_input(Path(os.devnull), BatchSpec())

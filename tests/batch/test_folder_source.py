from __future__ import annotations

import os

import pytest

from turbofit.batch.folder_source import FolderSource
from turbofit.core.errors import UsageError


def test_images_by_name_and_folder_by_folder(tmp_path) -> None:
    for name in ("b.PNG", "a/2.jpeg", "a/1.webp", "c.txt", ".hidden.png", ".d/x.png", "z.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = FolderSource(tmp_path, "{stem}: what is {path}, {name}?", None)
    found = list(source.items())
    assert [one.custom_id for one in found] == ["a/1.webp", "a/2.jpeg", "b.PNG", "z.gif"]
    assert [one.number for one in found] == [1, 2, 3, 4]
    assert list(source.digests()) == [one.digest for one in found]
    image, text = found[0].body["messages"][0]["content"]
    assert image["image_url"]["url"] == str(tmp_path / "a" / "1.webp")
    assert text["text"] == "1: what is a/1.webp, 1.webp?"
    assert source.max_tokens == 512


def test_a_name_that_is_no_utf8_has_one_that_is(tmp_path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (item,) = FolderSource(tmp_path, "{name}", None).items()
    assert item.custom_id == "\\xff.png"
    assert os.path.exists(item.body["messages"][0]["content"][0]["image_url"]["url"])


def test_no_prompt_and_no_image_are_said(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no image"):
        FolderSource(tmp_path, "x", None)
    with pytest.raises(UsageError, match="nothing says what to ask"):
        FolderSource(tmp_path, None, None)


def test_another_prompt_is_another_input(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert list(FolderSource(tmp_path, "x", None).digests()) != list(
        FolderSource(tmp_path, "y", None).digests()
    )

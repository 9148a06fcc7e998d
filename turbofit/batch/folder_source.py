"""A folder of images, each of which is asked the same."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from turbofit.batch.batch_spec import ANSWER_TOKENS
from turbofit.batch.item import BatchItem, digest_of
from turbofit.batch.template import PromptTemplate
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from turbofit.core.json_types import JsonObject

__all__ = ["FolderSource", "chat_body"]

_IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def chat_body(prompt: str, images: list[str]) -> JsonObject:
    """A chat request with images before its prompt."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content = [*pictures, {"type": "text", "text": prompt}] if pictures else prompt
    return {"messages": [{"role": "user", "content": content}]}


class FolderSource:
    """All images of a folder and the folders in it, by name; hidden ones are left out.

    ``custom_id`` is the path below the folder.

    Args:
        path: the folder.
        prompt: with placeholders.
        max_tokens: of an answer.

    Raises:
        UsageError: no prompt, or no image.
    """

    def __init__(self, path: Path, prompt: str | None, max_tokens: int | None) -> None:
        if prompt is None:
            raise UsageError(
                f"{path} is a folder of images, and nothing says what to ask",
                hint='add --prompt "Describe the image." or --prompt-file FILE',
            )
        self._template = PromptTemplate(prompt, ("name", "stem", "path"))
        self._folder = str(path)
        self.base = ""
        self.max_tokens: int | None = max_tokens or ANSWER_TOKENS
        if next(_images(self._folder, ""), None) is None:
            raise UsageError(
                f"{path} holds no image ({', '.join(_IMAGES)})", hint="name another folder"
            )

    def items(self) -> Iterator[BatchItem]:
        """See `BatchInput`."""
        for number, (name, path) in enumerate(_images(self._folder, ""), 1):
            custom_id = _text(name)
            prompt = self._prompt(custom_id)
            yield BatchItem(
                number=number, digest=_digest(custom_id, prompt), custom_id=custom_id,
                body=chat_body(prompt, [path]),
            )  # fmt: skip

    def digests(self) -> Iterator[int]:
        """See `BatchInput`."""
        for name, _ in _images(self._folder, ""):
            custom_id = _text(name)
            yield _digest(custom_id, self._prompt(custom_id))

    def _prompt(self, path: str) -> str:
        name = path.rpartition("/")[2]
        return self._template.fill({"name": name, "stem": name.rpartition(".")[0], "path": path})


def _digest(custom_id: str, prompt: str) -> int:
    return digest_of(f"{custom_id}\0{prompt}".encode(errors="surrogateescape"))


def _text(name: str) -> str:
    """A file's name as text; bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _images(folder: str, below: str) -> Iterator[tuple[str, str]]:
    """Path below the input and whole path of each image; memory is that of one folder's names."""
    try:
        with os.scandir(folder) as found:
            names = sorted((one.name, one.is_dir(follow_symlinks=False)) for one in found)
    except OSError as exc:
        raise UsageError(
            f"{folder} cannot be read: {exc.strerror or exc}", hint="allow it, or move it away"
        ) from None
    for name, is_folder in names:
        if name.startswith("."):
            continue
        if is_folder:
            yield from _images(os.path.join(folder, name), f"{below}{name}/")
        elif name.lower().endswith(_IMAGES):
            yield f"{below}{name}", os.path.join(folder, name)

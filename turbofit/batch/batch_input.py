"""An input: which kind it is, and what every kind answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.batch.item import BatchItem

__all__ = ["BatchInput", "open_input"]

_TABLES: Final = (".csv", ".parquet")


class BatchInput(Protocol):
    """Items, as often as they are asked for, in the same order."""

    #: The folder that relative paths of images begin in.
    base: str
    #: Tokens of an answer, for items that state none.
    max_tokens: int | None

    def items(self) -> Iterator[BatchItem]:
        """All items."""

    def digests(self) -> Iterator[int]:
        """The digest of each number, from 1 on; 0 where there is no item."""


def open_input(path: Path, spec: BatchSpec) -> BatchInput:
    """The input of this path.

    Raises:
        UsageError: it is not there, cannot be read, or the options are for another kind.
        PackageError: a Parquet file without pyarrow.
    """
    _check_readable(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        from turbofit.batch.folder_source import FolderSource

        _refuse(spec, "image_column", "a folder has no columns")
        return FolderSource(path, _prompt(spec), spec.max_tokens)
    if suffix in _TABLES:
        from turbofit.batch.table_source import csv_source, parquet_source

        made = csv_source if suffix == ".csv" else parquet_source
        return made(path, _prompt(spec), spec.image_column, spec.max_tokens)
    from turbofit.batch.jsonl_source import JsonlSource

    for name in ("prompt", "prompt_file", "image_column"):
        _refuse(spec, name, "a JSONL file has whole requests")
    return JsonlSource(path, spec.max_tokens)


def _check_readable(path: Path) -> None:
    # `Path.exists` raises for a folder of others and for a name that is too long, these do not.
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise UsageError(
            f"{path} is no file that can be read twice", hint="write it into a file first"
        )
    try:
        if os.path.isdir(path):
            next(path.iterdir(), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="name a JSONL, CSV or Parquet file, or a folder of images",
        ) from None


def _refuse(spec: BatchSpec, name: str, why: str) -> None:
    if getattr(spec, name):
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} does not fit this input: {why}", hint=f"leave {option} out")


def _prompt(spec: BatchSpec) -> str | None:
    if spec.prompt_file is None:
        return spec.prompt
    try:
        return Path(spec.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"{spec.prompt_file} cannot be read: {getattr(exc, 'strerror', None) or exc}",
            hint="name a text file in UTF-8 with the prompt",
        ) from None

"""Rows of a CSV or Parquet file, or images of a folder: each is a prompt with its images."""

from __future__ import annotations

import csv
import os
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final

from turbofit.batch.batch_spec import ANSWER_TOKENS, IMAGE_COLUMN
from turbofit.batch.item import (
    BatchInput,
    BatchItem,
    ItemError,
    PromptTemplate,
    chat_body,
    digest_of,
)
from turbofit.core.errors import PackageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from turbofit.core.json_types import JsonObject

    #: A row by its columns, or why there is none.
    Row = Mapping[str, Any] | ItemError
    #: All rows with at least the columns that it is given, anew at each call.
    Rows = Callable[[Sequence[str]], Iterator[Row]]

__all__ = ["open_table"]

_ID: Final = "custom_id"
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_PROMPT: Final = "{prompt}"
#: Bytes of a cell, which may be an image in base64.
_LARGEST_CELL: Final = 1 << 28
#: Rows of a Parquet file that are decoded at a time: some megabytes each where they hold images.
_ROWS: Final = 16
#: What pyarrow raises for a value that Python has no type for, or that is no UTF-8.
_NO_VALUE: Final = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)


def open_table(
    path: Path, prompt: str | None, images: tuple[str, ...], max_tokens: int | None
) -> BatchInput:
    """A row is an item, its number is the row's, its name in the column ``custom_id``.

    Args:
        path: of the file, whose name ends in ``.csv`` or ``.parquet``, or of a folder of images.
        prompt: with columns as placeholders; None is the column ``prompt``.
        images: the columns with images; none is the column ``image``, where there is one.
        max_tokens: of an answer.

    Raises:
        PackageError: pyarrow is not installed.
        UsageError: it is no table, or a column is not there.
    """
    is_folder = path.is_dir()
    read = _folder if is_folder else _csv if path.suffix.lower() == ".csv" else _parquet
    columns, rows = read(path)
    if missing := [name for name in images if name not in columns]:
        raise UsageError(
            f"there is no column {missing[0]!r}", hint=f"there are {', '.join(columns)}"
        )
    # Rows of a folder have a name and an image, too, which no prompt can use.
    known = {*columns, *((_ID, IMAGE_COLUMN) if is_folder else ())}
    images = images or tuple({IMAGE_COLUMN} & known)
    if prompt is None and "prompt" not in columns:
        what = "a folder has no prompts" if is_folder else "there is no column 'prompt'"
        raise UsageError(
            f"{what}, and no --prompt says what to ask",
            hint=f'add --prompt "…", where {{COLUMN}} is one of {", ".join(columns)}',
        )
    template = PromptTemplate(_PROMPT if prompt is None else prompt, columns)
    named = {_ID} & known

    def items() -> Iterator[BatchItem]:
        for number, row in enumerate(rows(sorted({*named, *images, *template.used})), 1):
            name, fault = f"row-{number}", row if isinstance(row, ItemError) else None
            body: JsonObject = {}
            if not isinstance(row, ItemError):
                name = (named and _readable(_text(row[_ID]))) or name
                text = template.fill({key: _text(row[key]) for key in template.used})
                body = chat_body(text, [url for key in images if (url := _image(row[key]))])
            # Text that is no UTF-8 has a digest, too; its body cannot be sent.
            digest = digest_of(repr((name, body, str(fault))).encode())
            yield BatchItem(number=number, digest=digest, custom_id=name, body=body, fault=fault)

    base = path if is_folder else path.parent
    return BatchInput(str(base), max_tokens or ANSWER_TOKENS, items)


def _readable(text: str) -> str:
    """Bytes that are no UTF-8 as escapes."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _text(value: Any) -> str:
    """A cell in a prompt; an image's bytes have no place there."""
    return "" if value is None or isinstance(value, bytes | dict) else str(value)


def _image(value: Any) -> str:
    """A cell as an address, a path or a ``data:`` URL; datasets keep ``{bytes, path}``."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"data:image/unknown;base64,{b64encode(value).decode()}"
    return _text(value).strip()


def _folder(path: Path) -> tuple[Sequence[str], Rows]:
    """The images of a folder and the folders in it; ``custom_id`` is the path below it."""
    if next(_images(str(path), ""), None) is None:
        raise UsageError(
            f"{path} holds no image ({', '.join(_IMAGES)})", hint="name another folder"
        )

    def rows(_used: Sequence[str]) -> Iterator[Row]:
        for below in _images(str(path), ""):
            shown = _readable(below)
            name = shown.rpartition("/")[2]
            stem = name.rpartition(".")[0]
            yield {_ID: shown, "path": shown, "name": name, "stem": stem, "image": f"./{below}"}

    return ("name", "stem", "path"), rows


def _images(folder: str, below: str) -> Iterator[str]:
    """Paths below the folder, by name, hidden ones left out; memory is that of one folder."""
    try:
        with os.scandir(os.path.join(folder, below)) as found:
            names = sorted((one.name, one.is_dir(follow_symlinks=False)) for one in found)
    except OSError as exc:
        raise UsageError(
            f"{os.path.join(folder, below)} cannot be read: {exc.strerror or exc}",
            hint="allow it, or move it away",
        ) from None
    for name, is_folder in names:
        if is_folder and not name.startswith("."):
            yield from _images(folder, f"{below}{name}/")
        elif name.lower().endswith(_IMAGES) and not name.startswith("."):
            yield f"{below}{name}"


def _csv(path: Path) -> tuple[Sequence[str], Rows]:
    """Columns and rows of a CSV file with a line of column names."""
    csv.field_size_limit(_LARGEST_CELL)
    columns = next(_csv_lines(path), None)
    if not columns or isinstance(columns, ItemError) or len(set(columns)) < len(columns):
        raise UsageError(
            f"{path} does not begin with the names of its columns",
            hint="its first line must name each column once, e.g. custom_id,image,prompt",
        )

    def rows(_used: Sequence[str]) -> Iterator[Row]:
        lines = _csv_lines(path)
        next(lines)
        for number, cells in enumerate((cells for cells in lines if cells != []), 1):
            if isinstance(cells, ItemError):
                yield cells
            elif len(cells) != len(columns):
                yield ItemError(
                    "bad_line", f"row {number} has {len(cells)} cells, the first {len(columns)}"
                )
            else:
                yield dict(zip(columns, cells, strict=True))

    return columns, rows


def _csv_lines(path: Path) -> Iterator[list[str] | ItemError]:
    """Rows as lists of cells; bytes that are no UTF-8 become surrogates, which no JSON takes."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        while True:
            try:
                yield next(reader)
            except StopIteration:  # noqa: PERF203 - after an error the next row may be whole
                return
            except csv.Error as exc:
                yield ItemError("bad_line", f"line {reader.line_num} is no CSV: {exc}")


def _parquet(path: Path) -> tuple[Sequence[str], Rows]:
    """Columns and rows of a Parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        from turbofit.core.installation import install_command

        raise PackageError(
            f"{path} is a Parquet file, and pyarrow is not installed",
            hint=f"install it with {install_command('parquet')}, or write a CSV or JSONL file",
        ) from None
    try:
        columns = [str(name) for name in ParquetFile(path).schema_arrow.names]
    except (ArrowException, OSError) as exc:
        raise UsageError(f"{path} is no Parquet file: {exc}", hint="name another file") from None

    def rows(used: Sequence[str]) -> Iterator[Row]:
        try:
            for batch in ParquetFile(path).iter_batches(batch_size=_ROWS, columns=used):
                yield from _rows_of(batch)
        except (ArrowException, OSError) as exc:
            raise UsageError(f"{path} is damaged: {exc}", hint="write it again") from None

    return columns, rows


def _rows_of(batch: Any) -> Iterator[Row]:
    """The rows of a ``pyarrow.RecordBatch``; one whose values cannot be read fails alone."""
    try:
        yield from batch.to_pylist()
    except _NO_VALUE as exc:
        if batch.num_rows == 1:
            yield ItemError("bad_line", f"the row cannot be read: {exc}")
            return
        for at in range(batch.num_rows):
            yield from _rows_of(batch.slice(at, 1))

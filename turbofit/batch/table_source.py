"""Rows of a CSV or Parquet file, each of which is a prompt with images or without."""

from __future__ import annotations

import csv
from base64 import b64encode
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.batch.batch_spec import ANSWER_TOKENS, IMAGE_COLUMN
from turbofit.batch.folder_source import chat_body
from turbofit.batch.item import BatchItem, ItemError, digest_of
from turbofit.batch.template import PromptTemplate
from turbofit.core.errors import PackageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    #: A row by its columns, or why there is none.
    Row = Mapping[str, Any] | ItemError

__all__ = ["TableSource", "csv_source", "parquet_source"]

_ID: Final = "custom_id"
_PROMPT: Final = "{prompt}"
#: Bytes of a cell, which may be an image in base64.
_LARGEST_CELL: Final = 1 << 28
#: Rows of a Parquet file that are decoded at a time: some megabytes each where they hold images.
_ROWS: Final = 16
#: What pyarrow raises for a value that Python has no type for, or that is no UTF-8.
_NO_VALUE: Final = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)


class TableSource:
    """A row is an item, and its number is the row's.

    The column ``custom_id`` names it; without one it is ``row-NUMBER``.

    Args:
        base: the folder that paths begin in.
        columns: their names.
        rows: all rows with at least the columns that it is given, anew at each call.
        prompt: with placeholders.
        images: the columns with images; of none those that are usual.
        max_tokens: of an answer.

    Raises:
        UsageError: a column is not there.
    """

    def __init__(
        self,
        base: str,
        columns: Sequence[str],
        rows: Callable[[Sequence[str]], Iterator[Row]],
        *,
        prompt: str | None,
        images: tuple[str, ...],
        max_tokens: int | None,
    ) -> None:
        self.base, self._rows = base, rows
        self.max_tokens: int | None = max_tokens or ANSWER_TOKENS
        self._named = _ID in columns
        missing = [name for name in images if name not in columns]
        if missing:
            raise UsageError(
                f"there is no column {missing[0]!r}", hint=f"there are {', '.join(columns)}"
            )
        self._images = images or tuple(name for name in (IMAGE_COLUMN,) if name in columns)
        if prompt is None and "prompt" not in columns:
            raise UsageError(
                "there is no column 'prompt', and no --prompt",
                hint=f'add --prompt "…", where {{COLUMN}} is one of {", ".join(columns)}',
            )
        self._template = PromptTemplate(_PROMPT if prompt is None else prompt, columns)
        named = (_ID,) if self._named else ()
        self._used = sorted({*named, *self._images, *self._template.used})

    def items(self) -> Iterator[BatchItem]:
        """See `BatchInput`."""
        for number, row in enumerate(self._rows(self._used), 1):
            yield self._item(number, row)

    def digests(self) -> Iterator[int]:
        """See `BatchInput`."""
        for item in self.items():
            yield item.digest

    def _item(self, number: int, row: Row) -> BatchItem:
        custom_id = f"row-{number}"
        if isinstance(row, ItemError):
            return BatchItem(
                number=number,
                digest=digest_of(row.message.encode()),
                custom_id=custom_id,
                fault=row,
            )
        try:
            if self._named:
                custom_id = _text(row[_ID]) or custom_id
            prompt = self._template.fill({name: _text(row[name]) for name in self._template.used})
            images = [url for name in self._images if (url := _image(row[name]))]
            body = chat_body(prompt, images)
            digest = digest_of(msgspec.json.encode((custom_id, body)))
        except UnicodeEncodeError:
            fault = ItemError("bad_line", f"row {number} is not in UTF-8")
            digest = digest_of(repr(row).encode(errors="surrogateescape"))
            return BatchItem(number=number, digest=digest, custom_id=f"row-{number}", fault=fault)
        return BatchItem(number=number, digest=digest, custom_id=custom_id, body=body)


def _text(value: Any) -> str:
    """A cell in a prompt; an image's bytes have no place there."""
    if value is None or isinstance(value, bytes | dict):
        return ""
    return value if isinstance(value, str) else str(value)


def _image(value: Any) -> str:
    """A cell as an address, a path or a ``data:`` URL; datasets keep ``{bytes, path}``."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"data:image/unknown;base64,{b64encode(value).decode()}"
    return _text(value).strip()


def csv_source(
    path: Path, prompt: str | None, images: tuple[str, ...], max_tokens: int | None
) -> TableSource:
    """A CSV file with a line of column names.

    Raises:
        UsageError: no column names, or a column is not there.
    """
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
        for number, cells in enumerate((one for one in lines if one != []), 1):
            if isinstance(cells, ItemError):
                yield cells
            elif len(cells) != len(columns):
                yield ItemError(
                    "bad_line", f"row {number} has {len(cells)} cells, the first {len(columns)}"
                )
            else:
                yield dict(zip(columns, cells, strict=True))

    return TableSource(
        str(path.parent), columns, rows, prompt=prompt, images=images, max_tokens=max_tokens
    )


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


def parquet_source(
    path: Path, prompt: str | None, images: tuple[str, ...], max_tokens: int | None
) -> TableSource:
    """A Parquet file.

    Raises:
        PackageError: pyarrow is not installed.
        UsageError: it is none, or a column is not there.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        from turbofit.core.installation import install_command

        how = install_command("parquet")
        raise PackageError(
            f"{path} is a Parquet file, and pyarrow is not installed",
            hint=f"install it with {how}, or write a CSV or JSONL file",
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

    return TableSource(
        str(path.parent), columns, rows, prompt=prompt, images=images, max_tokens=max_tokens
    )


def _rows_of(batch: Any) -> Iterator[Row]:
    """The rows of a ``pyarrow.RecordBatch``; one whose values cannot be read fails alone."""
    try:
        rows = batch.to_pylist()
    except _NO_VALUE as exc:
        if batch.num_rows == 1:
            rows = [ItemError("bad_line", f"the row cannot be read: {exc}")]
        else:
            rows = [row for at in range(batch.num_rows) for row in _rows_of(batch.slice(at, 1))]
    yield from rows

"""Reads an input as items: lines of JSONL, rows of a CSV or Parquet file, images of a folder.

A row, or an image with its names, becomes a prompt with its images.
"""

from __future__ import annotations

import csv
import os
import re
from base64 import b64encode
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from turbofit.batch.batch_spec import ANSWER_TOKENS, IMAGE_COLUMN
from turbofit.batch.output_file import CHAT, BatchItem, ItemError, digest_of
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.messages import option_of
from turbofit.load.prompt import user_message

if TYPE_CHECKING:
    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.core.json_types import JsonObject

#: A row by its columns, or the error that took its place.
Row = Mapping[str, Any] | ItemError
#: The names of all columns, and a function that reads all rows from the beginning, with at least
#: the columns that it is given.
Table = tuple[Sequence[str], Callable[[Sequence[str]], Iterator[Row]]]

_ID: Final = "custom_id"
#: The key of those cells of a CSV row that have no column.
_MORE: Final = "\0"
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
#: ``{{word}}`` means a literal ``{word}``; other braces stay, so a prompt may contain JSON.
_PLACEHOLDER: Final = re.compile(r"\{\{(\w+)\}\}|\{([^{}\n\"':,]{1,128})\}")
#: The most bytes of a cell, which may be an image in base64.
_LARGEST_CELL: Final = 1 << 28
#: Rows of a Parquet file that are decoded at once: some megabytes each if they have images.
_ROWS: Final = 16
#: Exceptions of pyarrow for a value that Python has no type for, or that is not UTF-8.
_NO_VALUE: Final = (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError)
_NO_LINE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class BatchInput(NamedTuple):
    """An input: each call of ``items`` reads it from the beginning, in the same order.

    Relative paths of images begin in ``base``; ``max_tokens`` limits answers to items that state no
    limit; None leaves that to the server.
    """

    base: str
    max_tokens: int | None
    items: Callable[[], Iterator[BatchItem]]


def open_input(path: Path, spec: BatchSpec) -> BatchInput:
    """Open the input at this path.

    Raises:
        UsageError: it is missing or unreadable, or an option is for another kind of input.
        PackageError: it is a Parquet file, and pyarrow is not installed.
    """
    # `Path.exists` raises for another user's folder and for a name that is too long; these do not.
    is_folder = os.path.isdir(path)
    if os.path.exists(path) and not is_folder and not os.path.isfile(path):
        raise UsageError(
            f"{path} is no file that can be read twice", hint="write it into a file first"
        )
    try:
        if is_folder:
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="name a JSONL, CSV or Parquet file, or a folder of images",
        ) from None
    readers = {".csv": _csv, ".parquet": _parquet}
    if reader := _folder if is_folder else readers.get(path.suffix.lower()):
        tokens = spec.most_tokens or ANSWER_TOKENS
        items = _row_items(*reader(path), spec, tokens - ANSWER_TOKENS)
        return BatchInput(str(path if is_folder else path.parent), tokens, items)
    for name in ("prompt", "image_column"):
        if getattr(spec, name):
            raise UsageError(
                f"{option_of(name)} does not fit this input: a JSONL file has whole requests",
                hint=f"leave {option_of(name)} out",
            )
    items = partial(_lines, path, spec.most_tokens or 0)
    return BatchInput(str(path.parent), spec.most_tokens, items)


class _Named(msgspec.Struct):
    """The part that is read of a wrong line."""

    custom_id: str


class _Line(_Named):
    """A request in the form of OpenAI's batches."""

    body: msgspec.Raw
    method: str = "POST"
    url: str = CHAT


def _lines(path: Path, seed: int) -> Iterator[BatchItem]:
    """Each line that is not empty, as an item with the line's number.

    ``seed`` is part of the digests: with another --max-tokens the requests are others.
    """
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            raw = line.removeprefix(BOM_UTF8) if number == 1 else line
            if raw := raw.strip():
                yield _item(number, raw, digest_of(raw, seed))


def _item(number: int, raw: bytes, digest: int) -> BatchItem:
    fault = None
    try:
        line = msgspec.json.decode(raw, type=_Line)
    except _NO_LINE as exc:
        fault = ItemError("bad_line", f"line {number} is no request of a batch: {exc}")
        try:
            name = msgspec.json.decode(raw, type=_Named).custom_id
        except _NO_LINE:
            name = None
        return BatchItem(number=number, digest=digest, custom_id=name, fault=fault)
    if line.method != "POST":
        fault = ItemError("bad_method", f"method {line.method!r} is not POST")
    elif not line.url.startswith("/v1/"):
        fault = ItemError("bad_url", f"url {line.url!r} does not begin with /v1/")
    elif not bytes(line.body).startswith(b"{"):
        fault = ItemError("bad_line", "body is no JSON object")
    return BatchItem(
        number=number, digest=digest, custom_id=line.custom_id, url=line.url, body=line.body,
        fault=fault,
    )  # fmt: skip


def _row_items(
    columns: Sequence[str],
    rows: Callable[[Sequence[str]], Iterator[Row]],
    spec: BatchSpec,
    seed: int,
) -> Callable[[], Iterator[BatchItem]]:
    """A function that reads a table's rows as items, numbered from 1 and named by ``custom_id``."""
    if missing := [name for name in spec.image_column if name not in columns]:
        raise UsageError(
            f"there is no column {missing[0]!r}", hint=f"there are {', '.join(columns)}"
        )
    images = spec.image_column or tuple({IMAGE_COLUMN} & {*columns})
    if spec.prompt is None and "prompt" not in columns:
        raise UsageError(
            "there is no column 'prompt', and no --prompt says what to ask",
            hint=f'add --prompt "…", where {{COLUMN}} is one of {", ".join(columns)}',
        )
    template = "{prompt}" if spec.prompt is None else spec.prompt
    placeholders = {match[2] for match in _PLACEHOLDER.finditer(template) if match[2]}
    if unknown := sorted(placeholders - {*columns}):
        word = f"{{{unknown[0]}}}"
        listed = ", ".join(f"{{{name}}}" for name in columns[:20])
        raise UsageError(
            f"{word} in the prompt is no placeholder here",
            hint=f"there are {listed}; write {{{word}}} for {word} itself",
        )
    used = sorted({*({_ID} & {*columns}), *images, *placeholders})

    def items() -> Iterator[BatchItem]:
        for number, row in enumerate(rows(used), 1):
            name, fault = f"row-{number}", None
            body: JsonObject = {}
            if isinstance(row, ItemError):
                fault = row
            else:
                name = _readable(_text(row.get(_ID))) or name
                urls = [url for column in images if (url := _image(row[column]))]
                body = {"messages": [user_message(_filled(template, row), urls)]}
            # Text that is not UTF-8 has a digest, too, although its body cannot be sent.
            digest = digest_of(repr((name, body, str(fault))).encode(), seed)
            yield BatchItem(number=number, digest=digest, custom_id=name, body=body, fault=fault)

    return items


def _filled(prompt: str, row: Mapping[str, Any]) -> str:
    return _PLACEHOLDER.sub(
        lambda match: f"{{{match[1]}}}" if match[1] else _text(row[match[2]]), prompt
    )


def _readable(text: str) -> str:
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _text(value: Any) -> str:
    """A cell as text for a prompt; empty for an image's bytes."""
    return "" if value is None or isinstance(value, bytes | dict) else str(value)


def _image(value: Any) -> str:
    """A cell as an image's URL or path; datasets keep images as ``{bytes, path}``."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"data:image/unknown;base64,{b64encode(value).decode()}"
    return _text(value).strip()


def _folder(path: Path) -> Table:
    """The images of a folder and its subfolders; ``custom_id`` is the path within the folder."""
    if next(_images(str(path), ""), None) is None:
        raise UsageError(
            f"{path} holds no image ({', '.join(_IMAGES)})", hint="name another folder"
        )

    def rows(_used: Sequence[str]) -> Iterator[Row]:
        for below in _images(str(path), ""):
            shown = Path(_readable(below))
            yield {
                "name": shown.name, "stem": shown.stem, "path": str(shown), _ID: str(shown),
                IMAGE_COLUMN: f"./{below}",
            }  # fmt: skip

    return ("name", "stem", "path", _ID, IMAGE_COLUMN), rows


def _images(folder: str, below: str) -> Iterator[str]:
    """Paths of images below the folder, sorted by name, without hidden ones."""
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
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


def _csv(path: Path) -> Table:
    csv.field_size_limit(_LARGEST_CELL)
    # Bytes that are not UTF-8 become surrogates, which JSON does not accept.
    opened = partial(path.open, encoding="utf-8-sig", errors="surrogateescape", newline="")

    def rows(_used: Sequence[str]) -> Iterator[Row]:
        with opened() as file:
            reader = csv.DictReader(file, restkey=_MORE)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as exc:
                    yield ItemError("bad_line", f"line {reader.line_num} is no CSV: {exc}")
                    continue
                broken = _MORE in row or None in row.values()
                words = f"line {reader.line_num} has not one cell for each column"
                yield ItemError("bad_line", words) if broken else row

    with opened() as file, suppress(csv.Error):
        if (columns := next(csv.reader(file), [])) and len(set(columns)) == len(columns):
            return columns, rows
    raise UsageError(
        f"{path} does not begin with the names of its columns",
        hint="its first line must name each column once, e.g. custom_id,image,prompt",
    )


def _parquet(path: Path) -> Table:
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
                for at in range(batch.num_rows):
                    try:
                        yield from batch.slice(at, 1).to_pylist()
                    except _NO_VALUE as exc:  # noqa: PERF203 - the next row may be whole
                        yield ItemError("bad_line", f"the row cannot be read: {exc}")
        except (ArrowException, OSError) as exc:
            raise UsageError(f"{path} is damaged: {exc}", hint="write it again") from None

    return columns, rows

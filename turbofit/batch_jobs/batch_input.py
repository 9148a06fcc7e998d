"""Reads an input as items: the lines of a JSONL file, or the images of a folder with a prompt."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple
from zlib import crc32

import msgspec
from pydantic import Field

from turbofit.batch_jobs.output_file import CHAT, BatchItem, ItemError
from turbofit.core.errors import UsageError
from turbofit.core.validation import SECONDS, Metavar, Positive, Validated
from turbofit.measure.load.prompt import user_message
from turbofit.planning.request import Tokens

Seconds = Annotated[float, Field(gt=0, lt=1e7), SECONDS, Metavar("SECONDS")]

#: The most tokens of an answer to an image of a folder, unless ``--max-tokens`` says otherwise.
ANSWER_TOKENS: Final = 512
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
#: The shortest line that is a request.
EXAMPLE_LINE: Final = (
    '{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "Hello"}]}}'
)
#: The most bytes of a line that a message repeats.
_SHOWN: Final = 40
#: ``{word}`` is a placeholder, and ``{{word}}`` means the text ``{word}``. All other braces stay
#: unchanged, so that a prompt may contain JSON.
_PLACEHOLDER: Final = re.compile(r"\{(\{\w+\})\}|\{(\w+)\}")


class BatchSpec(Validated):
    """How a batch is sent: each field is an option of `turbofit batch`."""

    url: Annotated[str | None, Metavar("URL")] = Field(
        default=None, description="a running server (else the batch serves --model, and ends it)"
    )
    model: str | None = Field(
        default=None,
        description="the model to serve; with --url the model that requests name (default: each "
        "item's own, or the server's first)",
    )
    prompt: str | None = Field(
        default=None,
        description="the prompt for each image of a folder, with {name}, {stem} and {path} of its "
        "file",
    )
    max_tokens: Tokens | None = Field(
        default=None,
        description="the most tokens of an answer, if its item states no limit (default "
        f"{ANSWER_TOKENS}; for a JSONL file: no limit)",
    )
    concurrency: Positive | None = Field(
        default=None,
        description="items that are sent at once (default: an eighth more than a server of this "
        "machine runs at once; for another server 64)",
    )
    timeout: Seconds = Field(default=3600.0, description="how long one answer may take")
    patience: Seconds = Field(
        default=600.0,
        description="with --url: how long to wait for a server that does not answer",
    )


class BatchInput(NamedTuple):
    """The input of a batch. Each call of ``items`` reads all items again, in the same order.

    Relative paths of images begin in the folder ``base``. ``max_tokens`` limits the answers to
    items without a limit of their own. If ``max_tokens`` is None, the server decides the limit.
    """

    base: str
    max_tokens: int | None
    items: Callable[[], Iterator[BatchItem]]


def open_input(path: Path, spec: BatchSpec) -> BatchInput:
    """Open the input at this path.

    Raises:
        UsageError: the input is missing or unreadable, or ``--prompt`` does not fit it.
    """
    is_folder = os.path.isdir(path)
    # `Path.exists` raises for the folder of another user and for a name that is too long, but
    # `os.path.exists` returns False.
    if os.path.exists(path) and not is_folder and not os.path.isfile(path):
        raise UsageError(
            f"{path} is no regular file, and a batch reads its input twice",
            hint="write the input into a file",
        )
    try:
        if is_folder:
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="name a JSONL file, or a folder of images",
        ) from None
    if is_folder:
        tokens = spec.max_tokens or ANSWER_TOKENS
        return BatchInput(str(path), tokens, partial(_images, path, _template(path, spec), tokens))
    if path.name.lower().endswith(_IMAGES):
        raise UsageError(
            f"{path} is an image, and an input is a JSONL file or a folder",
            hint='name the folder of the image, with --prompt "…"',
        )
    lines = partial(_lines, path, spec.max_tokens)
    _refuse_without_requests(path, lines())
    if spec.prompt is not None:
        raise UsageError(
            "--prompt does not fit this input: a JSONL file has whole requests",
            hint="leave --prompt out",
        )
    return BatchInput(str(path.parent), spec.max_tokens, lines)


class _Line(msgspec.Struct):
    """A request in the form of OpenAI's batches."""

    custom_id: str
    body: dict[str, Any]
    method: Literal["POST"] = "POST"
    url: Annotated[str, msgspec.Meta(pattern="^/v1/")] = CHAT


def _refuse_without_requests(path: Path, items: Iterator[BatchItem]) -> None:
    """Refuse a file that has lines, but no request: no server is started for it.

    Raises:
        UsageError: no line is a request.
    """
    first = next(items, None)
    if first is None or first.fault is None or any(item.fault is None for item in items):
        return
    raise UsageError(
        f"{path} is no JSONL file of requests: {first.fault.message}",
        hint=f"a line is {EXAMPLE_LINE}; docs/batch.md makes lines of a table",
    )


def _lines(path: Path, tokens: int | None) -> Iterator[BatchItem]:
    """Yield each line that is not empty, as an item with the line's number.

    ``tokens`` is the value of ``--max-tokens``. The digest of an item includes this value, since
    another value makes another request.
    """
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            raw = line.removeprefix(BOM_UTF8) if number == 1 else line
            if raw := raw.strip():
                digest = crc32(raw, tokens or 0) or 1
                try:
                    found = msgspec.json.decode(raw, type=_Line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
                    begins = raw[:_SHOWN].decode(errors="replace")
                    message = f"line {number}, {begins!r}, is no request of a batch: {exc}"
                    fault = ItemError("bad_line", message)
                    yield BatchItem(number=number, digest=digest, fault=fault)
                else:
                    yield BatchItem(
                        number=number, digest=digest, custom_id=found.custom_id, url=found.url,
                        body=found.body,
                    )  # fmt: skip


def _template(path: Path, spec: BatchSpec) -> str:
    """Return the prompt for a folder's images.

    Raises:
        UsageError: the folder has no image, or the prompt is missing or has a wrong placeholder.
    """
    if next(_paths(str(path), ""), None) is None:
        raise UsageError(
            f"{path} holds no image ({', '.join(_IMAGES)})", hint="name another folder"
        )
    if spec.prompt is None:
        raise UsageError("the images of a folder need a --prompt", hint='add --prompt "…"')
    for match in _PLACEHOLDER.finditer(spec.prompt):
        if match[2] and match[2] not in ("name", "stem", "path"):
            raise UsageError(
                f"{match[0]} in the prompt is no placeholder",
                hint="placeholders are {name}, {stem} and {path}; "
                f"{{{match[0]}}} means the text {match[0]}",
            )
    return spec.prompt


def _images(folder: Path, template: str, tokens: int) -> Iterator[BatchItem]:
    """Yield an item for each image of a folder and its subfolders.

    The item's name is the path of the image within the folder.
    """
    for number, below in enumerate(_paths(str(folder), ""), 1):
        shown = Path(below.encode(errors="surrogateescape").decode(errors="backslashreplace"))
        words = {"name": shown.name, "stem": shown.stem, "path": str(shown)}
        prompt = _PLACEHOLDER.sub(lambda match: match[1] or words[match[2]], template)  # noqa: B023
        body = {"messages": [user_message(prompt, [f"./{below}"])]}
        # `repr` makes bytes of every name, also of a name that is not UTF-8.
        digest = crc32(repr((str(shown), body)).encode(), tokens) or 1
        yield BatchItem(number=number, digest=digest, custom_id=str(shown), body=body)


def _paths(folder: str, below: str) -> Iterator[str]:
    """Yield the paths of all images in a folder and its subfolders, sorted by name.

    Hidden images and hidden folders are left out.
    """
    try:
        with os.scandir(os.path.join(folder, below)) as entries:
            names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as exc:
        raise UsageError(
            f"{os.path.join(folder, below)} cannot be read: {exc.strerror or exc}",
            hint="let this user read the folder, or move it away",
        ) from None
    for name, is_folder in names:
        if is_folder and not name.startswith("."):
            yield from _paths(folder, f"{below}{name}/")
        elif name.lower().endswith(_IMAGES) and not name.startswith("."):
            yield f"{below}{name}"

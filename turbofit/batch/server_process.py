"""``turbofit serve`` for one batch, planned for its items, in a process that ends with this one."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import sys
from base64 import b64decode
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from turbofit.batch.item import ItemError
from turbofit.batch.request_body import ImageLimits, image_sources, is_remote, local_path
from turbofit.core.errors import LaunchError, TurbofitError, UsageError, error_from
from turbofit.core.process.variable_names import without_options
from turbofit.gateway.limits.gate import UNSTATED
from turbofit.gateway.limits.ranges import most_tokens
from turbofit.gateway.media.pictures import LARGEST_PIXELS
from turbofit.launch.engine import guard
from turbofit.launch.engine.launches import free_ports
from turbofit.launch.serve.runs import recorded_runs
from turbofit.planning.resolve import model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.batch.item import BatchInput, BatchItem
    from turbofit.core.images import AnyImageRule
    from turbofit.core.json_types import JsonObject, Options
    from turbofit.core.model import Model
    from turbofit.planning.request import PlanRequest

__all__ = ["BatchWorkload", "ServerProcess", "server_plan", "workload_of"]

SERVE: Final = (sys.executable, "-m", "turbofit", "serve")
#: Options of the batch that are the server's.
_LAUNCH: Final = {"allowed_media_domains", "pretend", "no_rehearse"}
#: Deaths of the whole server without an answer in between.
_MOST_DEATHS: Final = 3
_LAST_LINES: Final = 20
#: After its signal it drains, checks that the memory is back, and is killed then.
_END_SECONDS: Final = 90.0

#: Characters of base64 that hold any usual header; of a longer one all are looked at.
_HEADER: Final = 1 << 16
_STEP: Final = 256
_KINDS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_DATA: Final = re.compile(rb'"data:[^"]{0,80};base64,[^"]*"')


class ServerPlan(NamedTuple):
    """A request that promises what the items need, and the options of ``turbofit serve`` for it."""

    request: PlanRequest
    workload: BatchWorkload
    options: tuple[str, ...]


def server_plan(
    source: BatchInput, spec: BatchSpec, request: PlanRequest, tick: Callable[[], None]
) -> ServerPlan:
    """Read all items; what a person has given of the plan stays.

    Raises:
        UsageError: there is no such model, or it cannot be handed to another process.
    """
    if not isinstance(request.model, str):
        raise UsageError("a batch starts a model by its name", hint="give a name or a folder")
    workload = workload_of(source, model_of(request), tick)
    found = request.changed(**workload.keywords(request.given(), shrink=spec.shrink))
    # How many are sent at once is a load, and no promise that the plan must keep.
    arguments = [request.model, *found.option_arguments(("model", "concurrency"))]
    arguments += spec.option_arguments(spec.model_fields_set - _LAUNCH)
    return ServerPlan(found, workload, tuple(arguments))


class ServerProcess:
    """One server.

    Args:
        options: of ``turbofit serve``, the model first.
        say: takes its lines of progress.
    """

    def __init__(self, options: Sequence[str], say: Callable[[str], None]) -> None:
        self._options, self._say = tuple(options), say
        self.key = secrets.token_hex(16)
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._lines: asyncio.Task[None] | None = None
        self._ending = False

    async def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            TurbofitError: why it does not.
        """
        port = free_ports(1)[0]
        command = [*SERVE, *self._options, "--port", str(port), "--access-log", "none"]
        self._last.clear()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(Path(guard.__file__)), str(os.getpid()), *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**without_options(os.environ), "TURBOFIT_API_KEY": self.key},
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
            limit=1 << 20,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._lines = asyncio.ensure_future(self._read_lines(self._process.stderr))
        # Its one line on stdout is the address, once it serves.
        self.url = (await self._process.stdout.readline()).decode(errors="replace").strip()
        if not self.url:
            await self._process.wait()
            await self._lines
            raise self._why()

    async def keep(self, answers: Callable[[], int], moved: Callable[[str], None]) -> None:
        """Start it again where a signal killed it.

        Args:
            answers: how many there were until now.
            moved: told of the new address.

        Raises:
            TurbofitError: it ended otherwise, or dies again and again.
        """
        deaths, before = 0, -1
        while True:
            assert self._process is not None
            assert self._lines is not None
            code = await self._process.wait()
            await self._lines
            deaths, before = (1 if answers() > before else deaths + 1), answers()
            if code >= 0 or deaths > _MOST_DEATHS:
                raise self._why()
            self._say(f"warning: the server was killed by signal {-code}: starting it again")
            await self.start()
            moved(self.url)

    async def end(self) -> None:
        """End it in order, and whatever happens."""
        self._ending = True
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process.returncode is None:
                    with suppress(ProcessLookupError):
                        self._process.send_signal(number)
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._process.wait(), _END_SECONDS)
        if self._lines is not None:
            await asyncio.gather(self._lines, return_exceptions=True)

    def limits_and_places(self, request: PlanRequest, *, shrink: bool) -> tuple[ImageLimits, int]:
        """What images may be here, and how many items run at once, by the record of its run.

        Raises:
            LaunchError: there is none.
        """
        assert self._process is not None
        for _, record in recorded_runs():
            if record.pid == self._process.pid:
                break
        else:
            raise LaunchError(
                "the server's record is not in the state folder",
                hint="set XDG_STATE_HOME to a folder that can be written",
            )
        places, limits = record.attempts[-1].requests_at_once, record.attempts[-1].limits
        rule = model_of(request).image_rule
        if limits is None or rule is None or limits.vision_unit is None:
            return ImageLimits(), places
        return ImageLimits(
            bytes=limits.bytes_per_image, rule=rule, units=limits.units_per_image,
            limit=limits.image_limit, shrink=shrink,
        ), places  # fmt: skip

    def _why(self) -> TurbofitError:
        """Its error, from its last lines."""
        assert self._process is not None
        code = self._process.returncode or 0
        said = {"error": "", "hint": ""}
        for line in self._last:
            word, _, text = line.partition(": ")
            if word in said:
                said[word] = text
        if said["error"]:
            return error_from({"exit_code": code, "message": said["error"], "hint": said["hint"]})
        last = self._last[-1] if self._last else "it said nothing"
        return LaunchError(
            f"the server ended with {code}: {last}", hint="see turbofit report latest"
        )

    async def _read_lines(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            text = line.decode(errors="replace").rstrip()
            self._last.append(text)
            if not self._ending and not text.startswith(("error: ", "hint: ")):
                self._say(text)


# What a plan must promise so that every item of an input is served: read from the items.
#
# Images are looked at by their headers alone. Text is counted in bytes, since a token has one at
# least. Over: a prompt has about a quarter as many tokens, and the longest prompt, the most images
# and the worst image are promised together, though different items have them.


@dataclass
class BatchWorkload:
    """The worst of an input.

    ``image_size`` is None where the server fetches an image: it may be the worst that there is.
    ``context`` is None where an item does not bound its answer; ``unbounded`` counts those.
    """

    images: int = 0
    image_size: tuple[int, int] | None = None
    context: int | None = None
    unbounded: int = 0

    @property
    def text(self) -> str:
        """The most of each in one line."""
        size = "" if self.image_size is None else f", {self.image_size[0]}x{self.image_size[1]}"
        images = f"{self.images} image{'s' * (self.images != 1)}{size}"
        tokens = "no bound of tokens" if self.context is None else f"{self.context:,} tokens"
        return f"{images}, {tokens}"

    def keywords(self, request: Options, *, shrink: bool) -> Options:
        """Fields of a plan's request; what a person has given stays."""
        found: Options = {"images": self.images}
        if self.image_size is not None and not shrink:
            found["image_size"] = self.image_size
        if self.context is not None and "session_len" not in request:
            found["context"] = self.context
        return {name: value for name, value in found.items() if name not in request}


def workload_of(
    source: BatchInput, model: Model, tick: Callable[[], None] = lambda: None
) -> BatchWorkload:
    """Read all items and look at their images.

    Args:
        source: the input.
        model: whose rule says which image is the worst.
        tick: called now and then; what it raises ends the reading.
    """
    worst, images = BatchWorkload(), _Images(source.base, model.image_rule)
    longest = 0
    for item in source.items():
        if item.number % _STEP == 0:
            tick()
        body = None if item.fault else _body(item)
        if body is None:  # it will fail alone, and counts for nothing here
            continue
        urls = [image["url"] for image in image_sources(body)]
        worst.images = max(worst.images, len(urls))
        tokens = sum(map(images.tokens, urls))
        if source.max_tokens and not {"max_tokens", "max_completion_tokens"} & body.keys():
            body["max_tokens"] = source.max_tokens
        text = _DATA.sub(b'""', _text(item))
        whole = most_tokens(_KINDS.get(item.url, ""), body, text, len(text), tokens)
        if whole == UNSTATED:
            worst.unbounded += 1
        else:
            longest = max(longest, whole)
    worst.image_size = None if images.elsewhere else images.worst
    if longest and not worst.unbounded:
        worst.context = min(longest, model.text.max_position_embeddings)
    return worst


def _text(item: BatchItem) -> bytes:
    raw = item.body
    return bytes(raw) if isinstance(raw, msgspec.Raw) else msgspec.json.encode(raw)


def _body(item: BatchItem) -> JsonObject | None:
    """What an item asks; None where it cannot be read."""
    try:
        body: JsonObject = msgspec.json.decode(_text(item))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return body


class _Images:
    """The images of an input."""

    def __init__(self, base: str, rule: AnyImageRule | None) -> None:
        self._base, self._rule, self._units = base, rule, 0
        #: Size of the one with the most units.
        self.worst: tuple[int, int] | None = None
        #: Whether an image is fetched by the server, and nobody here knows its size.
        self.elsewhere = False

    def tokens(self, url: str) -> int:
        """Tokens of an image."""
        rule = self._rule
        if rule is None:
            return 0
        if is_remote(url):
            self.elsewhere = True
            return rule.unit_tokens(rule.worst_units())
        size = _size(url, self._base)
        if size is None:
            return 0
        try:
            units = rule.units(*size)
        except UsageError:
            return 0
        if units > self._units:
            self._units, self.worst = units, size
        return rule.tokens(*size)


def _size(url: str, base: str) -> tuple[int, int] | None:
    """Width and height of an image that is here, None where its item will fail."""
    from PIL import Image

    payload = url.partition(",")[2]
    # Of a long one the header alone, and all of it where that does not do.
    parts = [payload[:_HEADER], payload] if len(payload) > _HEADER else [payload]
    try:
        path = local_path(url, base)
    except ItemError:
        return None
    for source in parts if path is None else [path]:
        try:
            file: Any = source
            if path is None:
                file = BytesIO(b64decode(source + "=" * (-len(source) % 4)))
            with Image.open(file) as image:
                size = int(image.width), int(image.height)
        except Exception:  # noqa: BLE001 - Pillow's plugins raise whatever they meet
            continue
        return size if size[0] * size[1] <= LARGEST_PIXELS else None
    return None

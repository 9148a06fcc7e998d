"""``turbofit serve`` for one batch, planned for its items; the process ends with this one."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.batch.batch_spec import LAUNCH_OPTIONS
from turbofit.batch.sender import (
    LARGEST_IMAGE,
    bound_answer,
    decoded_body,
    image_sources,
    is_remote,
    local_path,
)
from turbofit.core.errors import LaunchError, UsageError, error_from
from turbofit.core.process.guard import guarded
from turbofit.core.process.progress import Step, tell
from turbofit.core.process.variable_names import without_options
from turbofit.gateway.limits.gate import UNSTATED
from turbofit.gateway.limits.ranges import most_tokens
from turbofit.gateway.media.pictures import LARGEST_PIXELS, from_url
from turbofit.launch.engine.launches import free_ports
from turbofit.launch.serve.runs import recorded_runs
from turbofit.planning.resolve import model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.batch.batch_input import BatchInput
    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.core.images import AnyImageRule
    from turbofit.core.json_types import Options
    from turbofit.core.model import Model
    from turbofit.planning.request import PlanRequest

SERVE: Final = (sys.executable, "-m", "turbofit", "serve")
#: Seconds that a stopped server has to drain and to check that its memory is free; then a kill.
_END_SECONDS: Final = 90.0
_KINDS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
#: The step that is shown while the server starts; its own clock is replaced by ours.
STARTING: Final = "starting the server"
_CLOCK: Final = re.compile(r"(?:, (?:\d+ min )?\d+ s){1,2}(?: left)?$| …$")
_DATA: Final = re.compile(rb'"data:[^"]{0,80};base64,[^"]*"')


def server_plan(
    source: BatchInput, spec: BatchSpec, request: PlanRequest
) -> tuple[BatchWorkload, tuple[str, ...]]:
    """Read all items; returns their needs, and options with which a server meets them.

    Options of the plan that a person gave are kept.

    Raises:
        UsageError: there is no such model, or it cannot be handed to another process.
    """
    if not isinstance(request.model, str):
        raise UsageError("a batch starts a model by its name", hint="give a name or a folder")
    workload = workload_of(source, model_of(request))
    promised = request.changed(**workload.keywords(request.given()))
    # The number of items that are sent at once is a load, not a promise of the plan.
    arguments = [request.model, *promised.option_arguments(("model", "concurrency"))]
    arguments += spec.option_arguments(spec.model_fields_set - set(LAUNCH_OPTIONS))
    return workload, tuple(arguments)


class ServerProcess:
    """One server; ``options`` are those of ``turbofit serve``, ``say`` receives its progress."""

    def __init__(self, options: Sequence[str], say: Callable[[str], None]) -> None:
        self._options, self._say = tuple(options), say
        self.key, self.url = secrets.token_hex(16), ""
        self._process: asyncio.subprocess.Process | None = None
        self._following: asyncio.Task[None] | None = None
        self._ending = False

    async def start(self) -> None:
        """Start the server and wait until it serves; a `TurbofitError` says why it does not."""
        command = [*SERVE, *self._options, "--port", str(free_ports(1)[0]), "--access-log", "none"]
        self._process = await asyncio.create_subprocess_exec(
            *guarded(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**without_options(os.environ), "TURBOFIT_API_KEY": self.key},
            start_new_session=True,  # Ctrl-C reaches only us, and we end it
            limit=1 << 20,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._following = asyncio.ensure_future(self._follow(self._process))
        # Its only line on stdout is the address, once it serves.
        self.url = (await self._process.stdout.readline()).decode(errors="replace").strip()
        if not self.url:
            await self.ended()

    async def ended(self) -> None:
        """Wait for the server to end by itself; a `TurbofitError` says why it did."""
        assert self._following is not None
        await asyncio.shield(self._following)

    async def end(self) -> None:
        """End the server normally, and by force if that takes too long."""
        self._ending = True
        if self._process is None or self._following is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            await asyncio.wait((self._following,), timeout=_END_SECONDS)
        await asyncio.gather(self._following, return_exceptions=True)

    def places(self) -> int:
        """The number of items that it runs at once, from the record of its run.

        Raises:
            LaunchError: the server has no record in the state folder.
        """
        assert self._process is not None
        pid = self._process.pid
        record = next((record for _, record in recorded_runs() if record.pid == pid), None)
        if record is None:
            raise LaunchError(
                "the server's record is not in the state folder",
                hint="set XDG_STATE_HOME to a folder that can be written",
            )
        return record.attempts[-1].requests_at_once

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Pass on its lines; when it ends, raise its error."""
        assert process.stderr is not None
        last, error = "it said nothing", {"error": "", "hint": ""}
        while line := await process.stderr.readline():
            last = line.decode(errors="replace").rstrip()
            word, _, text = last.partition(": ")
            if word in error:
                error[word] = text
            elif clock := _CLOCK.search(last):
                if not self.url:
                    tell(Step(STARTING, detail=last[: clock.start()]))
            elif not self._ending and word not in ("to ask", "to chat"):  # only the batch asks
                self._say(last)
        code = await process.wait()
        if error["error"]:
            raise error_from({"exit_code": code, "message": error["error"], "hint": error["hint"]})
        raise LaunchError(
            f"the server ended with {code}: {last}",
            hint="see turbofit report latest; the same command goes on from here",
        )


# The needs of an input: what a plan must promise so that every item is served.
#
# It is an upper bound: text is counted in bytes, about four to a token; and the longest prompt, the
# most images and the worst image are promised together, although different items have them.


@dataclass
class BatchWorkload:
    """The largest needs of an input's items.

    ``image_size`` is None if the server fetches an image, which may then be the worst possible.
    ``context``, in tokens, is None if an item does not limit its answer; ``unbounded`` counts such
    items.
    """

    images: int = 0
    image_size: tuple[int, int] | None = None
    context: int | None = None
    unbounded: int = 0

    @property
    def text(self) -> str:
        """The largest needs in one line."""
        size = "" if self.image_size is None else f", {self.image_size[0]}x{self.image_size[1]}"
        images = f"{self.images} image{'s' * (self.images != 1)}{size}"
        tokens = "no bound of tokens" if self.context is None else f"{self.context:,} tokens"
        return f"{images}, {tokens}"

    def keywords(self, request: Options) -> Options:
        """Fields of a plan's request for these needs; fields that a person gave are left out."""
        fields: Options = {"images": self.images}
        if self.image_size is not None:
            fields["image_size"] = self.image_size
        if self.context is not None and "session_len" not in request:
            fields["context"] = self.context
        return {name: value for name, value in fields.items() if name not in request}


def workload_of(source: BatchInput, model: Model) -> BatchWorkload:
    """Read all items and their images' sizes; the model's rule says which image is the worst."""
    worst, rule = BatchWorkload(), model.image_rule
    longest, most_units, elsewhere = 0, 0, False
    for item in source.items():
        try:
            body = {} if item.fault else decoded_body(item)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            body = {}
        if not body:  # it fails by itself, and needs nothing here
            continue
        urls = [image["url"] for image in image_sources(body)]
        worst.images = max(worst.images, len(urls))
        tokens = 0
        for url in urls:
            if rule is None:
                break
            if is_remote(url):
                elsewhere = True
                tokens += rule.unit_tokens(rule.worst_units())
            elif size := _size(url, source.base, rule):
                tokens += rule.tokens(*size)
                if rule.units(*size) > most_units:
                    most_units, worst.image_size = rule.units(*size), size
        bound_answer(body, source.max_tokens)
        text = _DATA.sub(b'""', msgspec.json.encode(body))
        whole = most_tokens(_KINDS.get(item.url, ""), body, text, len(text), tokens)
        if whole == UNSTATED:
            worst.unbounded += 1
        else:
            longest = max(longest, whole)
    if elsewhere:  # its size is unknown here
        worst.image_size = None
    if longest and not worst.unbounded:
        worst.context = min(longest, model.text.max_position_embeddings)
    return worst


def _size(url: str, base: str, rule: AnyImageRule) -> tuple[int, int] | None:
    """Width and height of a local image, as it will be sent; None if its item will fail."""
    from PIL import Image

    try:
        if (path := local_path(url, base)) is None:
            size = from_url(url, LARGEST_IMAGE).size
        elif os.path.getsize(path) > LARGEST_IMAGE:
            return None
        else:
            with Image.open(path) as image:
                size = int(image.width), int(image.height)
        rule.units(*size)
    except Exception:  # noqa: BLE001 - Pillow's plugins raise any exception
        return None
    return size if size[0] * size[1] <= LARGEST_PIXELS else None

"""``turbofit serve`` for one batch, planned for its items, in a process that ends with this one."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.batch.request_body import ImageLimits
from turbofit.batch.workload import workload_of
from turbofit.core.errors import LaunchError, TurbofitError, UsageError, error_from
from turbofit.core.process.variable_names import without_options
from turbofit.launch.engine import guard
from turbofit.launch.engine.launches import free_ports
from turbofit.launch.serve.runs import recorded_runs
from turbofit.planning.resolve import model_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from turbofit.batch.batch_spec import BatchSpec
    from turbofit.batch.item import BatchInput
    from turbofit.batch.workload import BatchWorkload
    from turbofit.planning.request import PlanRequest

__all__ = ["ServerPlan", "ServerProcess", "server_plan"]

SERVE: Final = (sys.executable, "-m", "turbofit", "serve")
#: Options of the batch that are the server's.
_LAUNCH: Final = {"allowed_media_domains", "pretend", "no_rehearse"}
#: Deaths of the whole server without an answer in between.
_MOST_DEATHS: Final = 3
_LAST_LINES: Final = 20
#: After its signal it drains, checks that the memory is back, and is killed then.
_END_SECONDS: Final = 90.0


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

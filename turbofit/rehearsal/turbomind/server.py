"""Runs LMDeploy's own HTTP server on a pretend machine, with the arguments of ``lmdeploy``.

Preprocessing, scheduling, memory, errors and the end of a process are real; only the text of an
answer is not.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.model import Model
from turbofit.core.struct import decode, to_json
from turbofit.rehearsal.checkpoint.twin import checkpoint_for
from turbofit.rehearsal.no_answer import say_no_answer
from turbofit.rehearsal.packages import INSIDE, engine_library
from turbofit.rehearsal.pretend.clock import CLOCK, ClockFile
from turbofit.rehearsal.pretend.command import CHANGING, cuda_site, find_turbofit, put_first
from turbofit.rehearsal.pretend.libraries import LibraryAccount, check_surface
from turbofit.rehearsal.pretend.run import prepare
from turbofit.rehearsal.pretend.scenario import Scenario

_MACHINE = "TURBOFIT_PRETEND_MACHINE"
#: The variable with the folder of a twin, which `turbofit.pipeline` opens instead of its model.
MODEL = "TURBOFIT_PRETEND_TWIN"
NOTICE = (
    "turbofit: PRETEND GPUs: memory, admission, errors and death are real; "
    "the words that this server generates mean nothing"
)
#: The time at which the server received the request of this task, by `time.monotonic`.
_TAKEN: Final[ContextVar[float | None]] = ContextVar("taken", default=None)


def server_environment(machine: Scenario, folder: Path) -> dict[str, str]:
    """Write the files of a pretend machine; return the environment of a server on this machine."""
    base = {name: text for name, text in os.environ.items() if not name.startswith(CHANGING)}
    env = prepare(machine, folder, base, site=cuda_site())
    check_surface(engine_library(), Path(env["TURBOFIT_PRETEND_LIBRARIES"]))
    (folder / "machine.json").write_text(to_json(machine), encoding="utf-8")
    env |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    env |= {_MACHINE: str(folder / "machine.json"), "TM_LOG_LEVEL": "INFO"}
    find_turbofit(env)
    return env


def program_environment(model: Model, machine: Scenario, folder: Path) -> dict[str, str]:
    """Return the environment for a program whose `turbofit.pipeline` opens a model on pretend GPUs.

    If the model's weights are not on disk, the program opens a twin in ``folder``: keep the folder
    while the program runs.

    Raises:
        UsageError: the model's own checkpoint is needed, and it is not on disk.
    """
    (folder / "machine.json").write_text(to_json(machine), encoding="utf-8")
    # LMDeploy chooses the chat template by the folder's name.
    name = (model.hub_id or model.name).rpartition("/")[2]
    env = {
        **os.environ,
        _MACHINE: str(folder / "machine.json"),
        MODEL: str(checkpoint_for(model, folder / name)),
        "TURBOFIT_LEASES": str(folder / "leases"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if cuda_site() is not None:  # the PyTorch engine's workers need its stand-ins to read the twin
        put_first(env, "PYTHONPATH", str(INSIDE))
    find_turbofit(env)
    return env


def preload() -> None:
    """Import the modules of LMDeploy's server that can be imported without a pretend machine."""
    from turbofit.rehearsal.turbomind import hfconfig  # noqa: F401 - only imported
    from turbofit.rehearsal.turbomind.hooks import declare_torchvision

    declare_torchvision()


def pretend_here() -> None:
    """Make TurboMind in this process run on the pretend machine that the environment names.

    LMDeploy reads a stand-in tokenizer, downloads no vocabulary to parse answers, and answers with
    a sentence that says that this is no answer. With a clock, the server's own work is as slow as
    the engine's forwards.

    Raises:
        UsageError: turbofit did not make the environment.
    """
    path, libraries = os.environ.get(_MACHINE), os.environ.get("TURBOFIT_PRETEND_LIBRARIES")
    if not path or not libraries:
        raise UsageError(
            "only turbofit starts this command: it needs an environment that turbofit makes",
            hint="use turbofit serve --pretend",
        )
    from turbofit.rehearsal.turbomind.hfconfig import plain_gpt_oss_parser
    from turbofit.rehearsal.turbomind.hooks import install

    account = LibraryAccount(Path(libraries))
    account.mark("import")
    install(
        decode(Path(path).read_bytes(), Scenario, what=path),
        account,
        tokenizer=True,
        ready=lambda _engine: account.mark("serving"),
    )
    plain_gpt_oss_parser()
    from lmdeploy.serve.core import async_engine

    say_no_answer(async_engine)
    if clock := os.environ.get(CLOCK):
        from fastapi import FastAPI
        from lmdeploy.serve.managers.session_manager import RequestHandlePool

        slow_down(RequestHandlePool, FastAPI, ClockFile(Path(clock)))


def slow_down(pool: Any, app: Any, clock: ClockFile) -> None:
    """Slow down the work of the host before a request reaches the engine.

    If pretend GPUs are N times slower than life, `bench` divides all times of a client by N. But
    the host prepares pictures, encodes text and speaks HTTP at its own speed. So a request waits
    N - 1 times as long as the host worked, before the request takes one of the engine's handles.

    ``pool`` is LMDeploy's class `RequestHandlePool`, ``app`` is the class of its ASGI app. The time
    in which a request waits for a free handle does not count: the slow cards cause this wait.
    """
    get, serve = pool.get, app.__call__

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        _TAKEN.set(time.monotonic())
        await serve(self, scope, receive, send)

    async def get_later(self: Any) -> Any:
        taken, slower = _TAKEN.get(), clock.read().factor - 1
        if taken is not None and slower > 0:
            await asyncio.sleep(slower * (time.monotonic() - taken))
        return await get(self)

    app.__call__, pool.get = call, get_later


def main(arguments: list[str]) -> int:
    """Make this process run on the pretend machine, then run LMDeploy's command line."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pretend_here()
    except TurbofitError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    sys.stderr.write(f"{NOTICE}\n")
    sys.stderr.flush()
    from lmdeploy.cli.entrypoint import run

    sys.argv = ["lmdeploy", *arguments]
    run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""The server of a batch."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import gone
from tests.support.waiting import auntil
from turbofit.batch_jobs import batch_job
from turbofit.batch_jobs.batch_job import serving
from turbofit.core.errors import LaunchError, UsageError

#: What stands for ``turbofit serve``: opens, and lives until a signal.
OPENS = """
import os, signal, sys
print(os.getpid(), os.environ['TURBOFIT_API_KEY'], file=sys.stderr, flush=True)
print('note', file=sys.stderr, flush=True)
print('http://127.0.0.1:1', flush=True)
signal.sigwait({signal.SIGTERM})
"""
#: A batch's process: starts that in its place, and says its number.
STARTS = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from turbofit.batch_jobs import batch_job
batch_job.SERVE = (sys.executable, sys.argv[2])
async def main():
    async with batch_job.serving([], lambda line: print(line.split()[0], flush=True)):
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def opens(tmp_path, monkeypatch) -> str:
    """Have that program stand for it; its file."""
    file = tmp_path / "opens.py"
    file.write_text(OPENS)
    monkeypatch.setattr(batch_job, "SERVE", (sys.executable, str(file)))
    return str(file)


def test_it_opens_says_and_ends(opens) -> None:
    said: list[str] = []

    async def main() -> int:
        async with serving(["m"], said.append) as (url, key, _):
            await auntil(lambda: "note" in said, "its note")
            number, word = said[0].split()
        assert url == "http://127.0.0.1:1"
        assert key == word, "its clients have this key alone"
        return int(number)

    assert gone(asyncio.run(main()))
    assert said[1:] == ["note"]


def test_a_server_that_a_signal_killed_ends_the_batch(opens) -> None:
    said: list[str] = []

    async def main() -> None:
        async with serving([], said.append) as (_, _, ended):
            await auntil(lambda: "note" in said, "its note")
            os.kill(int(said[0].split()[0]), signal.SIGKILL)
            await ended

    with pytest.raises(LaunchError, match="the server ended with -9: note") as caught:
        asyncio.run(main())
    assert "the same command continues the batch" in caught.value.hint


def test_its_error_is_ours() -> None:
    async def main() -> None:
        async with serving(["no-such-model", "--on", "1xrtx3090", "--pretend"], str):
            pass

    with pytest.raises(UsageError, match="no-such-model") as caught:
        asyncio.run(main())
    assert caught.value.hint


def test_it_ends_with_us_however_we_end(opens) -> None:
    command = [sys.executable, "-c", STARTS, str(Path(batch_job.__file__).parents[2]), opens]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        child.kill()
    assert gone(pid)

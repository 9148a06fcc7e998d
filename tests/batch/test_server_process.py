from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.support.processes import gone
from tests.waiting import auntil
from turbofit.batch import server_process
from turbofit.batch.server_process import ServerProcess
from turbofit.core.errors import LaunchError, UsageError

#: What stands for ``turbofit serve``: opens, and lives until a signal.
OPENS = (
    "import signal, sys\n"
    "print('note', file=sys.stderr, flush=True)\n"
    "print('http://127.0.0.1:' + sys.argv[sys.argv.index('--port') + 1], flush=True)\n"
    "signal.sigwait({signal.SIGTERM})\n"
)


@pytest.fixture
def opens(tmp_path, monkeypatch) -> str:
    """Have that program stand for it; its file."""
    file = tmp_path / "opens.py"
    file.write_text(OPENS)
    monkeypatch.setattr(server_process, "SERVE", (sys.executable, str(file)))
    return str(file)


def test_it_opens_says_and_ends(opens) -> None:
    said: list[str] = []

    async def main() -> int:
        server = ServerProcess(["m"], said.append)
        await server.start()
        await auntil(lambda: said == ["note"], "its note")
        assert server.url.startswith("http://127.0.0.1:")
        pid = server._process.pid
        await server.end()
        return pid

    assert gone(asyncio.run(main()))


def test_a_server_that_a_signal_killed_starts_again(opens) -> None:
    said: list[str] = []
    moved: list[str] = []

    async def main() -> None:
        server = ServerProcess([], said.append)
        await server.start()
        keeping = asyncio.ensure_future(server.keep(lambda: len(moved), moved.append))
        for number in range(1, 3):
            server._process.kill()
            await auntil(lambda number=number: len(moved) == number, "another start")
        assert moved[-1] == server.url
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await server.end()

    asyncio.run(main())
    assert said.count("warning: the server was killed by signal 9: starting it again") == 2


def test_a_server_that_dies_again_and_again_is_given_up(opens) -> None:

    async def main() -> None:
        server = ServerProcess([], lambda _: None)
        await server.start()

        def kill(_url: str) -> None:
            server._process.kill()

        kill("")
        try:
            await server.keep(lambda: 0, kill)
        finally:
            await server.end()

    with pytest.raises(LaunchError, match="the server ended with -9"):
        asyncio.run(main())


def test_its_error_is_ours() -> None:
    async def main() -> None:
        server = ServerProcess(["no-such-model", "--on", "1xrtx3090", "--pretend"], lambda _: None)
        try:
            await server.start()
        finally:
            await server.end()

    with pytest.raises(UsageError, match="no-such-model") as caught:
        asyncio.run(main())
    assert caught.value.hint


def test_it_ends_with_us_however_we_end(opens) -> None:
    code = (
        "import asyncio, sys\n"
        f"sys.path.insert(0, {str(Path(server_process.__file__).parents[2])!r})\n"
        "from turbofit.batch import server_process\n"
        f"server_process.SERVE = (sys.executable, {opens!r})\n"
        "async def main():\n"
        "    server = server_process.ServerProcess([], lambda _: None)\n"
        "    await server.start()\n"
        "    print(server._process.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )

    async def main() -> int:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        pid = int(await child.stdout.readline())
        child.kill()
        await child.wait()
        return pid

    assert gone(asyncio.run(main()))

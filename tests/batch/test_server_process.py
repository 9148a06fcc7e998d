"""The server of a batch, and the plan that its items need."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.batch.standin import lines, request, write_requests
from tests.support.processes import Child, gone
from tests.support.waiting import auntil, until
from turbofit.batch import server_process
from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec
from turbofit.batch.sender import LARGEST_IMAGE
from turbofit.batch.server_process import BatchWorkload, ServerProcess, server_plan, workload_of
from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.process.progress import Step, listened
from turbofit.load.prompt import png
from turbofit.model.source import resolve_model
from turbofit.planning.request import PlanRequest

#: What stands for ``turbofit serve``: opens, and lives until a signal.
OPENS = """
import signal, sys
print('starting the engine, 1 min 11 s, 9 s left', file=sys.stderr, flush=True)
print('to ask: curl http://127.0.0.1:1', file=sys.stderr, flush=True)
print('note', file=sys.stderr, flush=True)
print('http://127.0.0.1:' + sys.argv[sys.argv.index('--port') + 1], flush=True)
signal.sigwait({signal.SIGTERM})
"""
#: A batch's process: starts that in its place, and says its number.
STARTS = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from turbofit.batch import server_process
server_process.SERVE = (sys.executable, sys.argv[2])
async def main():
    server = server_process.ServerProcess([], lambda _: None)
    await server.start()
    print(server._process.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def opens(tmp_path, monkeypatch) -> str:
    """Have that program stand for it; its file."""
    file = tmp_path / "opens.py"
    file.write_text(OPENS)
    monkeypatch.setattr(server_process, "SERVE", (sys.executable, str(file)))
    return str(file)


@asynccontextmanager
async def started(*words: str, say: Callable[[str], None] = str) -> AsyncIterator[ServerProcess]:
    server = ServerProcess(list(words), say)
    try:
        await server.start()
        yield server
    finally:
        await server.end()


def test_it_opens_says_and_ends(opens) -> None:
    said: list[str] = []
    steps: list[Step | None] = []

    async def main() -> int:
        with listened(steps.append):
            async with started("m", say=said.append) as server:
                await auntil(lambda: said == ["note"], "its note")
        assert Step("starting the server", detail="starting the engine") in steps
        assert server.url.startswith("http://127.0.0.1:")
        return server._process.pid

    assert gone(asyncio.run(main()))


def test_a_server_that_a_signal_killed_ends_the_batch(opens) -> None:
    async def main() -> None:
        async with started() as server:
            server._process.kill()
            await server.ended()

    with pytest.raises(LaunchError, match="the server ended with -9: note") as caught:
        asyncio.run(main())
    assert "the same command goes on" in caught.value.hint


def test_its_error_is_ours() -> None:
    async def main() -> None:
        async with started("no-such-model", "--on", "1xrtx3090", "--pretend"):
            pass

    with pytest.raises(UsageError, match="no-such-model") as caught:
        asyncio.run(main())
    assert caught.value.hint


def test_it_ends_with_us_however_we_end(opens) -> None:
    package = str(Path(server_process.__file__).parents[2])
    command = [sys.executable, "-c", STARTS, package, opens]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        child.kill()
    assert gone(pid)


def photos(tmp_path, count: int = 3):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(png(448, 448 + 8 * number))
    return folder


def planned(folder, spec: dict[str, Any], **request) -> tuple[BatchWorkload, dict[str, str]]:
    """The workload, and the server's options with the word after each."""
    source = open_input(folder, BatchSpec(prompt="?", max_tokens=16))
    plan = PlanRequest.of(**{"model": "internvl2-2b", **request})
    workload, words = server_plan(source, BatchSpec.of(**spec), plan)
    return workload, dict(zip(words, (*words[1:], ""), strict=True))


def test_the_options_promise_what_the_items_need(tmp_path) -> None:
    asked = {"on": "1xrtx3090", "enable_prefix_caching": False, "concurrency": 5000}
    workload, options = planned(photos(tmp_path), {"pretend": True}, **asked)
    assert "--concurrency" not in options, "how many are sent at once is no promise of the server"
    assert list(options)[:3] == ["internvl2-2b", "--on", "1xrtx3090"]
    assert (options["--images"], options["--image-size"]) == ("1", "448x448")
    assert int(options["--context"]) == workload.context
    assert list(options)[-1] == "--pretend"
    assert "--no-enable-prefix-caching" in options


def test_limits_that_were_given_stay(tmp_path) -> None:
    folder = photos(tmp_path)
    spec = {"no_rehearse": True, "allowed_media_domains": ("x.org", "*.y.org")}
    limits = {"context": 8192, "max_dynamic_patch": 4, "image_size": "400x400"}
    options = planned(folder, spec, **limits)[1]
    assert (options["--image-size"], options["--context"]) == ("400x400", "8192")
    assert options["--max-dynamic-patch"] == "4"
    assert list(options)[-4:] == ["--allowed-media-domains", "x.org", "*.y.org", "--no-rehearse"]
    # A model that another process cannot read.
    with pytest.raises(UsageError, match="by its name"):
        planned(folder, {}, model=MODEL)


def test_defaults_are_the_server_s_and_bound_answers_that_state_none(tmp_path) -> None:
    path = write_requests(tmp_path / "in.jsonl", {"a": "x"})
    spec = BatchSpec(default_sampling={"max_tokens": 64, "top_p": 0.9})
    plan = PlanRequest.of(model="internvl2-2b")
    workload, words = server_plan(open_input(path, spec), spec, plan)
    assert workload.unbounded == 0
    given = words[words.index("--default-sampling") + 1]
    assert json.loads(given) == {"max_tokens": 64, "top_p": 0.9}


@pytest.mark.lmdeploy
@pytest.mark.exhaustive
def test_lmdeploys_engine_may_die(tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    words = [
        "--model",
        "internvl2-2b",
        "--on",
        "1xrtx3090",
        "--pretend",
        "--prompt",
        "?",
        "--max-tokens",
        "8",
    ]
    named = ["batch", str(photos(tmp_path, 40)), str(output)]
    child = Child(
        [sys.executable, "-m", "turbofit", *named, *words], standin=False,
        XDG_STATE_HOME=str(tmp_path / "state"), TURBOFIT_LEASES=str(tmp_path / "leases"),
    )  # fmt: skip
    try:
        engine = int(child.wait_for("(process ").partition("(process ")[2].partition(",")[0])
        child.wait_for("phase: ready")
        until(lambda: output.read_bytes().count(b"\n") >= 3, "three answers")
        os.kill(engine, signal.SIGKILL)
        child.wait_for("(process ", count=2)
        assert child.finish() == 0, child.stderr
    finally:
        child.kill()
    found = lines(output)
    assert len({one["custom_id"] for one in found}) == len(found) == 40
    assert not [one for one in found if one["error"]]


MODEL = resolve_model("internvl2-2b")


def test_the_worst_image_that_is_there_decides(tmp_path) -> None:
    sizes = ((448, 448), (1344, 448), (900, 900))
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(png(*size))
    (tmp_path / "broken.png").write_bytes(b"x")
    with open(tmp_path / "too_big.png", "wb") as file:
        file.write(png(4032, 3024))
        file.truncate(LARGEST_IMAGE + 1)
    source = open_input(tmp_path, BatchSpec(prompt="What is this?", max_tokens=100))
    found, rule = workload_of(source, MODEL), MODEL.image_rule
    worst = max(sizes, key=lambda size: rule.units(*size))
    assert (found.images, found.image_size, found.unbounded) == (1, worst, 0)
    assert rule.tokens(*worst) + 100 < found.context < rule.tokens(*worst) + 100 + 1200


def jsonl(tmp_path, *rows, max_tokens=None):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    return workload_of(open_input(path, BatchSpec(max_tokens=max_tokens)), MODEL)


def pictured(*urls: str) -> dict[str, Any]:
    row = request("a", "x", max_tokens=10)
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    row["body"]["messages"][0]["content"] = parts
    return row


def test_a_text_counts_by_its_bytes_and_an_image_in_it_by_its_tokens(tmp_path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(2000, 1500)).decode()
    found = jsonl(tmp_path, pictured(url, url), request("b", "y" * 500, max_tokens=5))
    assert (found.images, found.image_size) == (2, (2000, 1500))
    assert 0 < found.context - 2 * MODEL.image_rule.tokens(2000, 1500) < 1200
    text = jsonl(tmp_path, request("b", "y" * 5000, max_tokens=5))
    assert (text.images, text.image_size) == (0, None)
    assert 5000 < text.context < 6200
    longest = jsonl(tmp_path, request("a", "y" * 90000, max_tokens=5))
    assert longest.context == MODEL.text.max_position_embeddings


def test_an_image_that_is_not_here_has_no_size(tmp_path) -> None:
    worst = MODEL.image_rule.unit_tokens(13)  # what is elsewhere may be that
    for url, tokens in (("https://example.com/a.png", worst), ("file://photos[1]/a.png", 0)):
        found = jsonl(tmp_path, pictured(url))
        assert (found.images, found.image_size) == (1, None)
        assert 0 < found.context - tokens < 1200


def test_an_answer_without_a_bound_leaves_the_context_to_the_plan(tmp_path) -> None:
    rows = request("a", "x"), request("b", "y", max_tokens=5)
    assert jsonl(tmp_path, *rows) == BatchWorkload(unbounded=1)
    assert jsonl(tmp_path, *rows, max_tokens=50).unbounded == 0


def test_it_is_told_in_one_line_and_what_a_person_gave_stays() -> None:
    found = BatchWorkload(images=2, image_size=(640, 480), context=4096)
    assert found.text == "2 images, 640x480, 4,096 tokens"
    assert BatchWorkload(images=1, unbounded=1).text == "1 image, no bound of tokens"
    needs = {"images": 2, "image_size": (640, 480), "context": 4096}
    assert found.keywords({}) == needs
    assert found.keywords({"images": 1, "image_size": (64, 64), "session_len": 8192}) == {}
    assert BatchWorkload().keywords({}) == {"images": 0}

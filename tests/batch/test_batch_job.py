"""Whole batches against a server that runs; engines of LMDeploy are in `test_server_process.py`."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

import turbofit
from tests.batch.standin import StandIn, items_of, lines, write_requests
from tests.support.processes import free_port
from tests.support.waiting import HANG, until
from turbofit.batch import batch_job
from turbofit.batch.batch_job import BatchJob, run_together, send_all
from turbofit.batch.batch_spec import BatchSpec, BatchTarget, target_of
from turbofit.batch.output_file import BatchItem, BatchLine, OutputFile, Survey
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.process.progress import Step, listened
from turbofit.core.process.threads import in_thread
from turbofit.load.prompt import png
from turbofit.planning.request import PlanRequest


def run(source, output, url: str, **spec):
    job = BatchJob((source, output), BatchSpec.of(**spec), BatchTarget(url, None, None, 8))
    return asyncio.run(job.run())


def names(path) -> list[str]:
    return [one["custom_id"] for one in lines(path)]


def items(count: int, text: str = "x") -> dict[str, str]:
    return {f"i{n:04}": f"{text} {n}" for n in range(count)}


def test_answers_and_failures_each_have_their_line(tmp_path) -> None:
    texts = {**items(30), "bad": "400,ok", "odd": "422", "late": "503,ok", "died": "reset,ok"}
    source = write_requests(tmp_path / "in.jsonl", texts)
    with source.open("a") as file:
        file.write("broken\n" + source.read_text().splitlines()[0] + "\n")
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        result = run(source, output, server.url)
        assert (result.items, result.answered, result.failed) == (36, 32, 4)
        assert max(server.seen.values()) == 2
        assert server.most <= 8
        before = len(server.bodies)
        again = run(source, output, server.url)
        assert (again.before, again.left, again.answered) == (36, 0, 32)
        assert len(server.bodies) == before
        found = lines(output)
        assert len({one["id"] for one in found}) == len(found) == 36
        codes = {one["custom_id"]: one["error"]["code"] for one in found if one["error"]}
        assert codes == {
            "bad": "refused", "odd": "refused", None: "bad_line", "i0000": "duplicate_custom_id",
        }  # fmt: skip
        assert run(source, output, server.url, retry_failed=True).failed == 3
        assert len(server.bodies) == before + 2
    assert len(lines(output)) == 36


def test_images_of_a_folder(tmp_path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out.jsonl"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(64, 64))
    (folder / "broken.png").write_bytes(b"x")
    with StandIn() as server:
        result = run(folder, output, server.url, prompt="ok {stem}")
        assert sorted(server.seen) == [f"ok {n}" for n in range(5)]
        assert {(body["max_tokens"], body["model"]) for body in server.bodies} == {(512, "m")}
        assert sorted(names(output)) == [*(f"{n}.png" for n in range(5)), "broken.png"]
        assert (result.answered, result.failed) == (5, 1)
        with pytest.raises(UsageError, match="is of another input"):
            run(folder, output, server.url, prompt="another")
        with pytest.raises(UsageError, match="--max-tokens has changed"):
            run(folder, output, server.url, prompt="ok {stem}", max_tokens=300)
        # What is usual is not another.
        assert run(folder, output, server.url, prompt="ok {stem}", max_tokens=512).left == 0


def test_a_server_that_goes_away_ends_it_and_it_can_go_on(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", items(40, "hold"))
    output, port = tmp_path / "out.jsonl", free_port()

    def end() -> None:
        server.wait_for(8)
        server.close()

    with StandIn(port) as server, ThreadPoolExecutor() as pool:
        ended = pool.submit(end)
        with pytest.raises(UnservedError, match="has not answered for ") as caught:
            run(source, output, server.url, patience=0.2)
        assert "give the same command" in caught.value.hint
        ended.result()
    done = len(lines(output))
    assert done < 40
    assert output.read_bytes().count(b"\n") == done
    with StandIn(port) as server:
        server.release()
        result = run(source, output, server.url)
    assert (result.before, result.answered) == (done, 40)
    assert len(set(names(output))) == 40


def test_waiting_for_a_server_is_told(tmp_path) -> None:
    source, port = write_requests(tmp_path / "in.jsonl", items(3)), free_port()
    waits = Step("sending", 0, 3, detail="0 failed, waiting for the server: no connection")
    servers = [StandIn(port)]
    with ExitStack() as started:

        def hear(step: Step | None) -> None:
            if step == waits and servers:
                started.enter_context(servers.pop())

        with listened(hear):
            result = run(source, tmp_path / "out.jsonl", f"http://127.0.0.1:{port}")
        assert result.answered == 3


def test_stopping_keeps_what_there_is_and_the_rate_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batch_job, "_SECONDS", 0.01)
    source = write_requests(tmp_path / "in.jsonl", {**items(20), "held": "hold"})
    output = tmp_path / "out.jsonl"

    def hear(step: Step | None) -> None:
        if step is not None and step.done == 20:
            assert re.fullmatch(r"0 failed, [\d,]+\.\d/s", step.detail)
            job.stop()

    with StandIn() as server:
        job = BatchJob((source, output), BatchSpec(), BatchTarget(server.url, None, None, 4))
        with listened(hear):
            result = asyncio.run(job.run())
        assert (result.answered, result.left, result.before) == (20, 1, 0)
        assert min(result.seconds, result.items_per_second) > 0
        job, resume = BatchJob((source, output), BatchSpec(), job._target), OutputFile.resume
        with monkeypatch.context() as patch:  # it is stopped while it reads
            patch.setattr(OutputFile, "resume", lambda *a, **k: (resume(*a, **k), job.stop()))
            result = asyncio.run(job.run())
        assert (result.answered, result.items_per_second) == (20, 0)
        server.release()
        assert run(source, output, server.url).left == 0


def test_so_many_are_under_way_and_no_more_are_read(tmp_path) -> None:
    counts, most = Counter[str](), Counter[str]()

    def count(what: str, number: int) -> None:
        counts[what] += number
        most["running"] = max(most["running"], counts["running"])
        most["ahead"] = max(most["ahead"], counts["read"] - counts["written"])

    def read() -> Iterator[BatchItem]:
        for item in items_of(range(1, 501)):
            count("read", 1)
            yield item

    async def ask(item: BatchItem) -> BatchLine:
        count("running", 1)
        await asyncio.sleep(0.001)
        count("running", -1)
        return BatchLine(id=item.line_id, custom_id=item.custom_id)

    async def main() -> None:
        survey = Survey(items_of(range(1, 501)))
        with OutputFile(tmp_path / "out.jsonl") as output:
            output.resume(Survey([]), retry_failed=False)
            found = survey.pending(read())
            await send_all(found, output, ask, partial(count, "written"), at_once=7)

    asyncio.run(main())
    assert sorted(names(tmp_path / "out.jsonl")) == sorted(f"i{n}" for n in range(1, 501))
    assert most["running"] == 7
    assert most["ahead"] <= 7 + 2 * 16


@pytest.mark.parametrize("first", ["nothing", "work", "beside"])
def test_the_end_of_the_work_and_the_first_error_end_the_rest(first) -> None:
    ended = []

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        if first == name:
            raise KeyError(name)
        ended.append(name)

    async def for_ever(name: str) -> None:
        try:
            await work(name)
            await asyncio.Event().wait()
        finally:
            ended.append("rest")

    failing = first != "nothing"
    with pytest.raises(KeyError) if failing else nullcontext():
        asyncio.run(run_together([work("a"), work("work")], [for_ever("beside")]))
    assert ended[-1] == "rest"
    assert failing or ended == ["a", "work", "beside", "rest"]


def test_who_is_cancelled_waits_for_its_thread() -> None:
    began, goes_on, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        began.set()
        goes_on.wait()
        ended.append("thread")

    async def main() -> None:
        task = asyncio.ensure_future(in_thread(work))
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.sleep(0)
        goes_on.set()
        await asyncio.wait((task,))
        ended.append("task")
        assert task.cancelled()

    asyncio.run(main())
    assert ended == ["thread", "task"]
    assert asyncio.run(in_thread(int, "7")) == 7


def test_each_line_comes_once_and_those_of_earlier_runs_first(tmp_path) -> None:
    texts = {**{f"i{n}": f"x {n}" for n in range(50)}, "bad": "400"}
    source, output = write_requests(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    with StandIn() as server:
        loop = turbofit.batch(source, output, url=server.url, concurrency=4)
        early = [line.custom_id for line in islice(loop, 10)]
        loop.close()
        assert not [one for one in threading.enumerate() if one.name == "batch"]
        assert len(lines(output)) >= 10
        found = {line.custom_id: line for line in turbofit.batch(source, output, url=server.url)}
        assert server.most <= 64
    assert early == list(found)[:10]
    assert sorted(found) == sorted(texts)
    assert found["i7"].text == "x 7"
    assert found["bad"].error.code == "refused"
    assert found["bad"].response.body["error"]["message"] == "no: 400"


def test_what_is_no_output_is_said_in_the_loop(tmp_path) -> None:
    source, other = write_requests(tmp_path / "in.jsonl", items(1)), tmp_path / "other.jsonl"
    other.write_text("something else\n")
    for output, words in (
        (source, "are one file"),
        (tmp_path / ("a" * 300), "File name too long"),
        (other, "is none of a batch"),
    ):
        loop = turbofit.batch(source, output, url="http://127.0.0.1:9")
        with pytest.raises(UsageError, match=words):
            list(loop)


def test_wrong_options_are_said_at_once() -> None:
    url = {"url": "http://x"}
    for options, message in (
        ({}, "nobody is named who answers"),
        ({"model": ""}, "nobody is named who answers"),
        ({"url": "x:80"}, "x:80 is no address"),
        ({"model": "m", "api_key": "k"}, "api_key is for a server"),
        ({**url, "model": "m", "max_batch_size": 4}, "^max_batch_size is of a plan"),
        ({**url, "promt": "x"}, "promt is nothing that PlanRequest knows"),
        ({**url, "timeout": -1}, "timeout -1"),
    ):
        with pytest.raises(UsageError, match=message):
            turbofit.batch("in", "out", **options)


def test_a_server_that_runs_and_options_of_the_other_one(monkeypatch) -> None:
    monkeypatch.delenv("TURBOFIT_API_KEY", raising=False)
    assert target_of("http://x", None, None) == ("http://x", None, None, 64, None)
    request = PlanRequest.of(model="m", concurrency=9)
    assert target_of("http://x", "k", request) == ("http://x", "k", "m", 9, None)
    assert target_of(None, None, request).request is request
    BatchSpec.of(pretend=True, no_rehearse=True).check(url=None)
    for url, given in ((None, "patience"), ("http://x", "pretend"), ("http://x", "no_rehearse")):
        with pytest.raises(UsageError, match=f"--{given.replace('_', '-')} is for a server"):
            BatchSpec.of(**{given: 5.0 if given == "patience" else True}).check(url=url)
    monkeypatch.setenv("TURBOFIT_API_KEY", "e")
    assert target_of("http://x", None, PlanRequest.of(model="")).key == "e"


def command(output: Path, server: StandIn, texts: dict[str, str], *words: str) -> list[str]:
    """A batch of these items."""
    source = write_requests(output.with_name("in.jsonl"), texts)
    named = ["batch", str(source), str(output), "--url", server.url]
    return [sys.executable, "-m", "turbofit", *named, *words]


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_doubles_nothing(tmp_path) -> None:
    output, killed = tmp_path / "out.jsonl", 0
    with StandIn() as server:
        batch = command(output, server, items(200), "--concurrency", "8", "--quiet")
        for at in (1, 60, 130):
            with subprocess.Popen(batch, stderr=subprocess.PIPE) as child:
                server.wait_for(at)
                child.send_signal(signal.SIGKILL)
                killed += child.wait(HANG) == -signal.SIGKILL
            with output.open("ab") as file:
                file.write(b'{"id":"batch_req_torn')
        assert killed >= 2
        subprocess.run(batch, check=True, timeout=HANG)
        # Only what was under way at a kill was sent twice.
        assert len(server.bodies) <= 200 + 3 * 8
    assert sorted(names(output)) == sorted(items(200))


@pytest.mark.slow
def test_a_signal_ends_the_command_in_order(tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        batch = command(output, server, {**items(5), "held": "hold"}, "--json")
        with subprocess.Popen(batch, stdout=subprocess.PIPE) as child:
            until(lambda: output.exists() and output.read_bytes().count(b"\n") == 5, "five lines")
            child.send_signal(signal.SIGTERM)
            said = json.loads(child.communicate(timeout=HANG)[0])
    assert child.returncode == 130
    assert (said["schema"], said["answered"], said["left"]) == ("turbofit.batch/1", 5, 1)


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_ends_it_and_with_room_it_goes_on(tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        batch = command(output, server, items(60), "--quiet")
        limited = [sys.executable, "-c", LIMITED, *batch]
        done = subprocess.run(limited, stderr=subprocess.PIPE, check=False, text=True, timeout=HANG)
        assert done.returncode == 2
        assert f"error: {output} cannot be written: File too large" in done.stderr
        assert "hint: make room" in done.stderr
        assert 0 < len(lines(output)) < 60
        assert output.read_bytes().endswith(b"\n")
        subprocess.run(batch, check=True, timeout=HANG)
    assert sorted(names(output)) == sorted(items(60))

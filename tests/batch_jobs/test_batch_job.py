"""Whole batches against a server that runs; engines of LMDeploy are in `test_server_process.py`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.batch_jobs.standin import StandIn, items_of, lines, write_requests
from tests.support.processes import free_port
from tests.support.waiting import HANG, until
from turbofit.batch_jobs import batch_job
from turbofit.batch_jobs.batch_input import BatchSpec
from turbofit.batch_jobs.batch_job import BatchJob, send_all
from turbofit.batch_jobs.output_file import BatchItem, BatchLine, OutputFile, Survey
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.png import png
from turbofit.core.process.progress import Step, listened


def run(source, output, url: str, **spec):
    given = {"url": url, "concurrency": 8, **spec}
    return asyncio.run(BatchJob((source, output), BatchSpec.of(**given)).run())


def names(path) -> list[str]:
    return [one["custom_id"] for one in lines(path)]


def items(count: int, text: str = "x") -> dict[str, str]:
    return {f"i{n:04}": f"{text} {n}" for n in range(count)}


def test_answers_and_failures_each_have_their_line(tmp_path) -> None:
    texts = {**items(30), "bad": "400,ok", "odd": "422", "late": "503,ok", "died": "reset,ok"}
    source = write_requests(tmp_path / "in.jsonl", texts)
    with source.open("a") as file:
        file.write("broken\n")
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        result = run(source, output, server.url)
        assert (result.items, result.answered, result.failed) == (35, 32, 3)
        assert max(server.seen.values()) == 2
        assert server.most <= 8
        before = len(server.bodies)
        again = run(source, output, server.url)
        assert (again.before, again.left, again.answered) == (35, 0, 32)
        assert len(server.bodies) == before
        found = lines(output)
        assert len({one["id"] for one in found}) == len(found) == 35
        codes = {one["custom_id"]: one["error"]["code"] for one in found if one["error"]}
        assert codes == {"bad": "refused", "odd": "refused", None: "bad_line"}
        # As docs/batch.md says it: without the lines of failed items, these are sent again.
        kept = [line for line in output.read_bytes().splitlines(True) if b'"error":null}' in line]
        output.write_bytes(b"".join(kept))
        assert run(source, output, server.url).failed == 2
        assert len(server.bodies) == before + 2
    assert len(lines(output)) == 35


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


def test_an_output_that_somebody_takes_away_ends_it_with_an_error(tmp_path, monkeypatch) -> None:
    """It said "20 of 20 items answered", with exit code 0 and no file."""
    monkeypatch.setattr(batch_job, "_SECONDS", 0.01)
    texts = {**items(20), "held": "hold"}

    def remove(path: Path) -> None:
        path.unlink()

    def replace(path: Path) -> None:
        path.rename(path.with_name("elsewhere"))
        path.write_text("")

    def cut(path: Path) -> None:
        os.truncate(path, 0)

    for act in (remove, replace, cut):
        folder = tmp_path / act.__name__
        folder.mkdir()
        source, output = write_requests(folder / "in.jsonl", texts), folder / "out.jsonl"

        def hear(step: Step | None, act=act, output=output) -> None:
            if step is not None and step.done == 20 and output.exists():
                act(output)

        with StandIn() as server:
            with (
                listened(hear),
                pytest.raises(UsageError, match="was removed, replaced or cut") as caught,
            ):
                run(source, output, server.url)
            assert "items without a line are sent again" in caught.value.hint
            server.release()
            if act is not replace:
                assert run(source, output, server.url).answered == 21
                assert sorted(names(output)) == sorted(texts)


def test_the_end_looks_at_the_output_too(tmp_path, monkeypatch) -> None:
    source, output = write_requests(tmp_path / "in.jsonl", items(3)), tmp_path / "out.jsonl"
    append = OutputFile.append

    def gone_at_the_last(self: OutputFile, line: bytes, *, failed: bool) -> None:
        append(self, line, failed=failed)
        if self.lines == 3:
            output.unlink()

    monkeypatch.setattr(OutputFile, "append", gone_at_the_last)
    with StandIn() as server, pytest.raises(UsageError, match="was removed, replaced or cut"):
        run(source, output, server.url)


def test_so_many_are_under_way_and_no_more_are_read(tmp_path) -> None:
    counts, most = Counter[str](), Counter[str]()

    def count(what: str, number: int) -> None:
        counts[what] += number
        most["running"] = max(most["running"], counts["running"])
        most["ahead"] = max(most["ahead"], counts["read"] - counts["answered"])

    def read() -> Iterator[BatchItem]:
        for item in items_of(range(1, 501)):
            count("read", 1)
            yield item

    async def ask(item: BatchItem) -> BatchLine:
        count("running", 1)
        await asyncio.sleep(0.001)
        count("running", -1)
        count("answered", 1)
        return BatchLine(id=item.line_id, custom_id=item.custom_id)

    async def main() -> None:
        survey = Survey(items_of(range(1, 501)))
        with closing(OutputFile(tmp_path / "out.jsonl")) as output:
            output.resume(Survey([]))
            await send_all(survey.pending(read()), output, ask, at_once=7)

    asyncio.run(main())
    assert sorted(names(tmp_path / "out.jsonl")) == sorted(f"i{n}" for n in range(1, 501))
    assert most["running"] == 7
    assert most["ahead"] <= 7 + 2 * 16


def test_what_is_no_output_is_said(tmp_path) -> None:
    source, other = write_requests(tmp_path / "in.jsonl", items(1)), tmp_path / "other.jsonl"
    other.write_text("something else\n")
    for output, words in (
        (source, "are one file"),
        (tmp_path / ("a" * 300), "File name too long"),
        (other, "is no line of a batch"),
    ):
        with pytest.raises(UsageError, match=words):
            run(source, output, "http://127.0.0.1:9")


def command(output: Path, server: StandIn, texts: dict[str, str], *words: str) -> list[str]:
    """A batch of these items."""
    source = write_requests(output.with_name("in.jsonl"), texts)
    named = ["batch", str(source), str(output), "--url", server.url]
    return [sys.executable, "-m", "turbofit", *named, *words]


@pytest.mark.slow
def test_ten_kill_9_lose_and_double_nothing(tmp_path) -> None:
    output, killed = tmp_path / "out.jsonl", 0
    # The item that is held keeps the batch alive until its tenth kill.
    texts = {**items(199), "held": "hold"}
    with StandIn() as server:
        batch = command(output, server, texts, "--concurrency", "8", "--quiet")
        for at in range(1, 200, 20):
            with subprocess.Popen(batch, stderr=subprocess.PIPE) as child:
                server.wait_for(at)
                child.send_signal(signal.SIGKILL)
                killed += child.wait(HANG) == -signal.SIGKILL
            with output.open("ab") as file:
                file.write(b'{"id":"batch_req_torn')
        assert killed == 10
        server.release()
        subprocess.run(batch, check=True, timeout=HANG)
        # Only what was under way at a kill was sent twice.
        assert len(server.bodies) <= 200 + 10 * 8
    assert sorted(names(output)) == sorted(texts)


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

"""Whole batches against a server that runs; engines of LMDeploy are in `test_server_process.py`."""

from __future__ import annotations

import asyncio
import re
import threading

import pytest

from tests.batch.standin import StandIn, lines, write_requests
from tests.support.processes import free_port
from turbofit.batch import batch_job
from turbofit.batch.batch_job import BatchJob
from turbofit.batch.batch_spec import BatchSpec, BatchTarget
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.process.progress import Step, listened
from turbofit.load.prompt import png


def run(source, output, url: str, *, at_once: int = 8, **spec):
    job = BatchJob((source, output), BatchSpec.of(**spec), BatchTarget(url, None, None, at_once))
    return asyncio.run(job.run())


def names(path) -> list[str]:
    return [one["custom_id"] for one in lines(path)]


def items(count: int, text: str = "x") -> dict[str, str]:
    return {f"i{n:04}": f"{text} {n}" for n in range(count)}


def test_answers_and_failures_each_have_their_line(tmp_path) -> None:
    texts = {**items(30), "bad": "400", "odd": "422", "late": "503,ok", "died": "reset,ok"}
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
        assert len(server.bodies) == before
    assert (again.before, again.left, again.answered) == (36, 0, 32)
    found = lines(output)
    assert len({one["id"] for one in found}) == len(found) == 36
    codes = {one["custom_id"]: one["error"]["code"] for one in found if one["error"]}
    assert codes == {
        "bad": "refused", "odd": "refused", None: "bad_line", "i0000": "duplicate_custom_id",
    }  # fmt: skip
    assert sorted(map(str, lines(tmp_path / "out.jsonl.errors.jsonl"))) == sorted(
        str(one) for one in found if one["error"]
    )
    assert result.errors == str(tmp_path / "out.jsonl.errors.jsonl")


def test_failed_items_are_sent_again_where_that_is_asked_for(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", {"a": "ok", "b": "400,ok"})
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        assert run(source, output, server.url).failed == 1
        assert run(source, output, server.url, retry_failed=True).failed == 0
    assert sorted(names(output)) == ["a", "b"]
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()


def test_images_of_a_folder(tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(64, 64))
    (folder / "broken.png").write_bytes(b"x")
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        result = run(folder, output, server.url, prompt="ok {stem}", in_order=True)
        assert sorted(server.seen) == [f"ok {n}" for n in range(5)]
        assert {body["max_tokens"] for body in server.bodies} == {512}
        assert {body["model"] for body in server.bodies} == {"m"}
    assert names(output) == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.png"]
    assert (result.answered, result.failed) == (5, 1)
    with StandIn() as server, pytest.raises(UsageError, match="is of another input"):
        run(folder, output, server.url, prompt="another")
    with StandIn() as server, pytest.raises(UsageError, match="--max-tokens has changed"):
        run(folder, output, server.url, prompt="ok {stem}", max_tokens=300)
    with StandIn() as server:  # what is usual is not another
        assert run(folder, output, server.url, prompt="ok {stem}", max_tokens=512).left == 0


def test_an_output_that_is_not_in_order_stays_so(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", items(3))
    output = tmp_path / "out.jsonl"
    with StandIn() as server:
        run(source, output, server.url)
        output.write_text("".join(output.read_text().splitlines(keepends=True)[1:]))
        with pytest.raises(UsageError, match="not in order"):
            run(source, output, server.url, in_order=True)
        assert run(source, output, server.url).left == 0


def test_input_and_output_are_two_files(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", items(1))
    with pytest.raises(UsageError, match="are one file"):
        run(source, source, "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="File name too long"):
        run(source, tmp_path / ("a" * 300), "http://127.0.0.1:9")


def test_a_server_that_goes_away_ends_it_and_it_can_go_on(tmp_path) -> None:
    source = write_requests(tmp_path / "in.jsonl", items(40, "hold"))
    output, port = tmp_path / "out.jsonl", free_port()
    with StandIn(port) as server:
        ended = threading.Thread(target=_ends, args=(server,))
        ended.start()
        with pytest.raises(UnservedError, match="has not answered"):
            run(source, output, server.url, patience=0.2)
        ended.join()
    done = len(lines(output))
    assert done < 40
    assert output.read_bytes().count(b"\n") == done
    with StandIn(port) as server:
        server.release()
        result = run(source, output, server.url)
    assert (result.before, result.answered) == (done, 40)
    assert len(set(names(output))) == 40


def _ends(server: StandIn) -> None:
    """Let nothing be answered, and end."""
    server.wait_for(8)
    server.close()


def test_waiting_for_a_server_is_told(tmp_path) -> None:
    source, port = write_requests(tmp_path / "in.jsonl", items(3)), free_port()
    started: list[StandIn] = []

    def hear(step: Step | None) -> None:
        waits = "0 failed, waiting for the server: no connection"
        if not started and step == Step("sending", 0, 3, detail=waits):
            started.append(StandIn(port).__enter__())

    try:
        with listened(hear):
            result = run(source, tmp_path / "out.jsonl", f"http://127.0.0.1:{port}")
        assert result.answered == 3
    finally:
        started[0].close()


def test_stopping_keeps_what_there_is_and_the_rate_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batch_job, "_SECONDS", 0.01)
    source = write_requests(tmp_path / "in.jsonl", {**items(20), "held": "hold"})
    output = tmp_path / "out.jsonl"

    async def main(url: str):
        def hear(step: Step | None) -> None:
            if step is not None and step.done == 20:
                assert re.fullmatch(r"0 failed, [\d,]+\.\d/s", step.detail)
                job.stop()

        job = BatchJob((source, output), BatchSpec(), BatchTarget(url, None, None, 4))
        with listened(hear):
            return await job.run()

    with StandIn() as server:
        result = asyncio.run(main(server.url))
        assert (result.answered, result.left, result.before) == (20, 1, 0)
        assert result.seconds > 0
        assert result.items_per_second > 0
        server.release()
        assert run(source, output, server.url).left == 0

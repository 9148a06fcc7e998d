from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.gateway.media.test_clips import MOST, sequence
from tests.support.gateway import chat, data_url
from tests.support.waiting import HANG
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.media import clips as films
from turbofit.gateway.media.clips import Clip

opencv = pytest.mark.skipif(find_spec("cv2") is None, reason="needs OpenCV")


def film(folder: Path, frames: int = 50, size=(320, 240), rate: float = 10.0, kind="mp4") -> bytes:
    """A small film, as OpenCV writes it."""
    import cv2
    import numpy as np

    path = folder / f"film.{kind}"
    code = "MJPG" if kind == "avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, size)
    for shade in range(frames):
        writer.write(np.full((size[1], size[0], 3), shade % 256, np.uint8))
    writer.release()
    return path.read_bytes()


def looked(url: str, fetched=None) -> Clip | None:
    body = chat({"type": "video_url", "video_url": {"url": url}})
    return asyncio.run(films.VideoInspector().look(read_body("chat", body), fetched or {}, MOST))


def refused(url: str, fetched=None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        looked(url, fetched)
    return caught.value


@opencv
@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "mov"])
def test_headers_say_frames_and_size(tmp_path, kind) -> None:
    data = film(tmp_path, 23, (320, 240), 12.5, kind)
    found = looked(data_url(data, "video/anything"))
    assert found is not None
    assert (found.frames, found.size, found.rate, found.bytes) == (23, (320, 240), 12.5, len(data))
    remote = "https://x.org/a"
    assert looked(remote, {remote: data}) == found


def test_frames_need_nobody_who_reads_films(monkeypatch) -> None:
    monkeypatch.setattr(films, "_PROGRAM", "/does/not/exist")
    found = looked(sequence(2, (64, 48)))
    assert found is not None
    assert found.frames == 2
    body = read_body("chat", chat())
    assert asyncio.run(films.VideoInspector().look(body, {}, MOST)) is None


@opencv
def test_broken_films_are_refused(tmp_path) -> None:
    data = film(tmp_path, 23)
    for bad in (data[:200], b"\0\0\0\x18ftyp" + bytes(99)):
        assert refused(data_url(bad, "video/mp4")).reason == "broken_video"
    remote = "https://x.org/a"
    assert refused(remote, {remote: b"<html>"}).reason == "unknown_video_type"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit(3)", "no_video_reader"),
        ("import os; os.kill(os.getpid(), 11)", "broken_video"),
        ("print('[1, 2]')", "broken_video"),
        ("print('[1e999, 25, 64, 48]')", "broken_video"),
        ("import signal; signal.pause()", "broken_video"),
    ],
)
def test_a_reader_that_dies_takes_nobody_along(tmp_path, monkeypatch, program, reason) -> None:
    script = tmp_path / "reader.py"
    script.write_text(program)
    monkeypatch.setattr(films, "_PROGRAM", str(script))
    monkeypatch.setattr(films, "_SECONDS", 0.1 if "pause" in program else HANG)
    said = refused(data_url(b"\0\0\0\x18ftyp" + bytes(99), "video/mp4"))
    assert said.reason == reason


def test_a_reader_that_sigkill_does_not_end_keeps_no_request(tmp_path, monkeypatch) -> None:
    """The kernel may hold it: on a disk that is silent, in a debugger."""
    program, go = tmp_path / "reader.py", tmp_path / "go"
    go.touch()
    program.write_text(
        f"import os, time\nwhile os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n"
    )
    monkeypatch.setattr(films, "_PROGRAM", str(program))
    monkeypatch.setattr(films, "_SECONDS", 0.0)
    monkeypatch.setattr(films, "_LAST_SECONDS", 0.0)
    held: list[asyncio.subprocess.Process] = []

    def hold(process: asyncio.subprocess.Process) -> None:
        held.append(process)

    monkeypatch.setattr(asyncio.subprocess.Process, "kill", hold)
    url = data_url(b"\0\0\0\x18ftypmp42", "video/mp4")
    body = read_body("chat", chat({"type": "video_url", "video_url": {"url": url}}))

    async def look() -> None:
        try:
            with pytest.raises(Refusal) as caught:
                await films.VideoInspector().look(body, {}, MOST)
            assert caught.value.reason == "broken_video"
            assert held[0].returncode is None
        finally:
            go.unlink()
            await held[0].wait()

    asyncio.run(look())

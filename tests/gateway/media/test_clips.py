"""Videos as clients send them."""

from __future__ import annotations

import asyncio
import threading
from base64 import b64encode
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support.gateway import chat, data_url, picture
from tests.support.waiting import HANG
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.media import clips
from turbofit.gateway.media.clips import MOST_FRAMES, Clip, film_clip, film_of, frames_of

MOST = 1 << 20
T = TypeVar("T")


def sequence(count: int, *sizes: tuple[int, int], kind: str = "JPEG") -> str:
    """Frames as a client sends them that has sampled them itself."""
    frames = [picture(*sizes[i % len(sizes)], kind) for i in range(count)]
    return "data:video/jpeg;base64," + ",".join(b64encode(frame).decode() for frame in frames)


def refused(read: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read()
    return caught.value


def refused_url(url: str, most: int = MOST) -> Refusal:
    return refused(lambda: frames_of(url, most) or film_of(url, most))


def test_frames_of_a_client_are_counted() -> None:
    url = sequence(5, (64, 48))
    clip = frames_of(url, MOST)
    assert (clip.frames, clip.size, clip.rate, clip.url) == (5, (64, 48), None, url)
    assert frames_of(url.replace("=,/9j", "= ,\n/9j"), MOST) == clip


FILM = b"\0\0\0\x18ftyp" + bytes(99)
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("url", "most", "reason"),
    [
        ("https://x.org/a.mp4", MOST, "bad_video_url"),
        ("data:video/mp4,abc", MOST, "bad_video_url"),
        ("data:video/mp4;base64,%%%", MOST, "bad_video_base64"),
        (data_url(picture(8, 8), "video/mp4"), MOST, "unknown_video_type"),
        (data_url(PLAYLIST, "video/mp4"), MOST, "unknown_video_type"),
        (data_url(FILM, "video/mp4"), 50, "video_too_big"),
        (sequence(2, (8, 8), (9, 8)), MOST, "broken_video"),
        (sequence(2, (8, 8), kind="PNG"), MOST, "unknown_video_type"),
        (sequence(200, (64, 48)), 1000, "video_too_big"),
        ("data:video/jpeg;base64,", MOST, "unknown_image_type"),
    ],
)  # fmt: skip
def test_what_is_no_video_is_refused(url, most, reason) -> None:
    assert refused_url(url, most).reason == reason


@pytest.mark.parametrize(
    ("rate", "size", "reason"),
    [
        (0.0, (64, 48), "broken_video"), (1e9, (64, 48), "broken_video"),
        (25.0, (0, 48), "bad_video_size"), (25.0, (70_000, 1), "bad_video_size"),
        (25.0, (20_000, 20_000), "bad_video_size"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_are_refused(rate, size, reason) -> None:
    assert refused(lambda: film_clip(b"RIFF\0\0\0\0AVI ", 9, rate, size)).reason == reason


def test_frames_are_counted_before_any_is_opened(monkeypatch) -> None:
    """Each takes the loop 0.1 ms, and the largest body holds a hundred thousand."""
    monkeypatch.setattr(clips, "from_base64", None)
    refusal = refused_url("data:video/jpeg;base64," + ",".join(["/9j/"] * (MOST_FRAMES + 1)))
    assert refusal.reason == "too_many_frames"
    assert str(MOST_FRAMES) in refusal.message


def test_a_film_has_bytes_for_its_frames() -> None:
    """LMDeploy looks for each frame that the header promises: over a minute for 100 million."""
    data = b"RIFF\0\0\0\0AVI " + bytes(88)
    assert film_clip(data, 25, 25.0, (64, 48)).frames == 25
    with pytest.raises(Refusal) as caught:
        film_clip(data, 26, 25.0, (64, 48))
    assert caught.value.key == "broken_video:count"
    assert caught.value.facts == {"size": 100, "frames": 26}


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


def looked(url: str, fetched=None) -> Clip:
    body = chat({"type": "video_url", "video_url": {"url": url}})
    turn = asyncio.Semaphore()
    return asyncio.run(clips.video_of(read_body("chat", body), fetched or {}, MOST, turn))


@pytest.mark.parametrize("kind", ["film", "frames"])
def test_the_event_loop_copies_no_byte_of_a_film(tmp_path, monkeypatch, kind: str) -> None:
    """Twelve films of 20 MB held it for 4.7 s."""
    reader = tmp_path / "reader.py"
    reader.write_text("import sys\nprint([len(sys.stdin.buffer.read()) // 4, 25, 64, 48])\n")
    monkeypatch.setattr(clips, "_PROGRAM", str(reader))
    threads = list[threading.Thread]()

    def in_thread(function: Callable[..., T]) -> Callable[..., T]:
        def called(*given: Any) -> T:
            threads.append(threading.current_thread())
            return function(*given)

        return called

    for name in ("decoded", "encoded", "from_base64"):
        monkeypatch.setattr(clips, name, in_thread(getattr(clips, name)))

    def write(*_: object) -> None:
        raise AssertionError("the event loop writes to a pipe")

    monkeypatch.setattr(asyncio.StreamWriter, "write", write)
    big = FILM[:12] + bytes(100_000)
    clip = looked(data_url(big, "video/mp4") if kind == "film" else sequence(5, (64, 48)))
    assert clip.frames == (len(big) // 4 if kind == "film" else 5)
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.slow
@opencv
@pytest.mark.parametrize(
    ("kind", "mime"), [("mp4", "mp4"), ("mkv", "webm"), ("avi", "x-msvideo"), ("mov", "mp4")]
)
def test_headers_say_frames_and_size(tmp_path, kind, mime) -> None:
    data, remote = film(tmp_path, 23, (320, 240), 12.5, kind), "https://x.org/a"
    clip = looked(data_url(data, "video/anything"))
    assert clip.url == data_url(data, f"video/{mime}")
    assert (clip.frames, clip.size, clip.rate) == (23, (320, 240), 12.5)
    assert looked(remote, {remote: data}) == clip


@opencv
def test_broken_films_are_refused(tmp_path) -> None:
    for bad in (film(tmp_path, 23)[:200], FILM):
        refusal = refused(lambda bad=bad: looked(data_url(bad, "video/mp4")))
        assert refusal.reason == "broken_video"
    remote = "https://x.org/a"
    assert refused(lambda: looked(remote, {remote: b"<html>"})).reason == "unknown_video_type"


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
    monkeypatch.setattr(clips, "_PROGRAM", str(script))
    monkeypatch.setattr(clips, "_SECONDS", 0.1 if "pause" in program else HANG)
    assert refused(lambda: looked(data_url(FILM, "video/mp4"))).reason == reason


def test_a_reader_that_sigkill_does_not_end_keeps_no_request(tmp_path, monkeypatch) -> None:
    """The kernel may hold it: on a disk that is silent, in a debugger."""
    program, go = tmp_path / "reader.py", tmp_path / "go"
    go.touch()
    program.write_text(
        f"import os, time\nwhile os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n"
    )
    monkeypatch.setattr(clips, "_PROGRAM", str(program))
    monkeypatch.setattr(clips, "_SECONDS", 0.0)
    monkeypatch.setattr(clips, "_LAST_SECONDS", 0.0)
    readers: list[asyncio.subprocess.Process] = []

    def hold(process: asyncio.subprocess.Process) -> None:
        readers.append(process)

    monkeypatch.setattr(asyncio.subprocess.Process, "kill", hold)
    url = data_url(FILM, "video/mp4")
    body = read_body("chat", chat({"type": "video_url", "video_url": {"url": url}}))

    async def look() -> None:
        try:
            with pytest.raises(Refusal) as caught:
                await clips.video_of(body, {}, MOST, asyncio.Semaphore())
            assert caught.value.reason == "broken_video"
            assert readers[0].returncode is None
        finally:
            go.unlink()
            await readers[0].wait()

    asyncio.run(look())

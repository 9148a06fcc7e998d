from __future__ import annotations

from base64 import b64encode

import pytest

from tests.support.gateway import data_url, picture
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.clips import MOST_FRAMES, film_clip, film_of, frames_of

MOST = 1 << 20


def sequence(count: int, *sizes: tuple[int, int], kind: str = "JPEG") -> str:
    """Frames as a client sends them that has sampled them itself."""
    frames = [picture(*sizes[i % len(sizes)], kind) for i in range(count)]
    return "data:video/jpeg;base64," + ",".join(b64encode(one).decode() for one in frames)


def refused(url: str, most: int = MOST) -> Refusal:
    with pytest.raises(Refusal) as caught:
        frames_of(url, most) or film_of(url, most)
    return caught.value


def test_frames_of_a_client_are_counted() -> None:
    found = frames_of(sequence(5, (64, 48)), MOST)
    assert found is not None
    assert (found.frames, found.size, found.rate) == (5, (64, 48), None)
    assert found.url == sequence(5, (64, 48))
    spaced = frames_of(sequence(2, (64, 48)).replace("=,/9j", "= ,\n/9j"), MOST)
    assert spaced is not None
    assert spaced.url == sequence(2, (64, 48))


@pytest.mark.parametrize(
    ("start", "mime"),
    [
        (b"\0\0\0\x18ftypisom", "mp4"), (b"\x1a\x45\xdf\xa3", "webm"),
        (b"RIFF\0\0\0\0AVI ", "x-msvideo"),
    ],
)  # fmt: skip
def test_films_are_told_by_their_first_bytes(start, mime) -> None:
    data = start + bytes(50)
    url = data_url(data, "video/whatever")
    assert frames_of(url, MOST) is None
    assert film_of(url, MOST) == data
    found = film_clip(data, 9, 25.0, (64, 48))
    assert found.url == data_url(data, f"video/{mime}")
    assert (found.frames, found.rate, found.size, found.bytes) == (9, 25.0, (64, 48), len(data))


def test_what_is_no_video_is_refused() -> None:
    assert refused("https://x.org/a.mp4").reason == "bad_video_url"
    assert refused("data:video/mp4,abc").reason == "bad_video_url"
    assert refused("data:video/mp4;base64,%%%").reason == "bad_video_base64"
    assert refused(data_url(picture(8, 8), "video/mp4")).reason == "unknown_video_type"
    assert refused(data_url(b"\0\0\0\x18ftyp" + bytes(99), "video/mp4"), 50).status == 413
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    assert refused(data_url(playlist, "video/mp4")).reason == "unknown_video_type"
    assert refused(sequence(2, (8, 8), (9, 8))).reason == "broken_video"
    assert refused(sequence(2, (8, 8), kind="PNG")).reason == "unknown_video_type"
    assert refused(sequence(200, (64, 48)), 1000).status == 413
    assert refused("data:video/jpeg;base64,").status == 415


@pytest.mark.parametrize(
    ("rate", "size", "reason"),
    [
        (0.0, (64, 48), "broken_video"), (1e9, (64, 48), "broken_video"),
        (25.0, (0, 48), "bad_video_size"), (25.0, (70_000, 1), "bad_video_size"),
        (25.0, (20_000, 20_000), "bad_video_size"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_are_refused(rate, size, reason) -> None:
    with pytest.raises(Refusal) as caught:
        film_clip(b"RIFF\0\0\0\0AVI ", 9, rate, size)
    assert caught.value.reason == reason


def test_frames_are_counted_before_any_is_opened(monkeypatch) -> None:
    """Each takes the loop 0.1 ms, and the largest body holds a hundred thousand."""
    monkeypatch.setattr("turbofit.gateway.media.clips.from_base64", None)
    refusal = refused("data:video/jpeg;base64," + ",".join(["/9j/"] * (MOST_FRAMES + 1)))
    assert refusal.reason == "too_many_frames"
    assert str(MOST_FRAMES) in refusal.message


def test_a_film_has_bytes_for_its_frames() -> None:
    """LMDeploy looks for each frame that the header promises: over a minute for 100 million."""
    data = b"RIFF\0\0\0\0AVI " + bytes(88)
    assert film_clip(data, 25, 25.0, (64, 48)).frames == 25
    with pytest.raises(Refusal, match="26 frames in 100 bytes"):
        film_clip(data, 26, 25.0, (64, 48))

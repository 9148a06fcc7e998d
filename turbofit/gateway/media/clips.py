"""Reads the number and size of frames from the headers of clients' videos, without decoding.

A separate process reads the header with the loader that LMDeploy tries first. An unusable video
raises a `Refusal`. Films have megabytes, so threads decode, copy and encode them, beside the event
loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from turbofit.core.images.rule import LARGEST_PIXELS, LONGEST_SIDE
from turbofit.core.process.interpreter import in_thread
from turbofit.core.struct import Struct
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_body import MediaSlot, Parsed
from turbofit.gateway.media.fetch import about_url
from turbofit.gateway.media.pictures import (
    BYTES_OF_PIXEL,
    SPACES,
    check_bytes,
    decoded,
    encoded,
    from_base64,
)

#: LMDeploy's media type for frames that the client has sampled: JPEGs in base64 between commas.
_SEQUENCE: Final = "video/jpeg"
_TAKEN: Final = "MP4, MOV, WebM, Matroska, AVI and JPEG frames (data:video/jpeg) are taken"
#: The fewest and the most frames a second that a film may have.
RATES: Final = (0.01, 1000.0)
#: The number of frames at which Qwen's own sampler stops.
MOST_FRAMES: Final = 768
#: The fewest bytes of a frame in a film: MP4's table of sizes has 4 bytes for each frame.
_LEAST_FRAME: Final = 4
_PROGRAM: Final = str(Path(__file__).with_name("film_header.py"))
_SECONDS: Final = 20.0
#: Seconds to wait after SIGKILL, since the kernel may keep a process in a system call.
_LAST_SECONDS: Final = 5.0
_NO_OPENCV: Final = 3
#: The most bytes by which the length of base64 exceeds the length of its data, due to padding.
_PADDING: Final = 3


class Clip(Struct):
    """One video: its ``data:`` URL, its number of frames, and their size in pixels.

    ``rate`` is in frames a second. If the client sampled the frames itself, ``rate`` is None, and
    the engine uses all frames.
    """

    url: str
    frames: int
    size: tuple[int, int]
    rate: float | None = None

    @property
    def payload(self) -> int:
        """The length of the URL in characters."""
        return len(self.url)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of host memory of one frame when an engine has decoded the frame to RGB."""
        return self.size[0] * self.size[1] * BYTES_OF_PIXEL


async def video_of(
    parsed: Parsed, fetched: Mapping[str, bytes], most_bytes: int, processes: asyncio.Semaphore
) -> Clip | None:
    """Return the request's video, or None if it has no video.

    ``fetched`` has files by URL, ``most_bytes`` limits a video. ``processes`` limits how many
    processes read the headers of films at once.
    """
    slot = next((slot for slot in parsed.slots if slot.shape == "clip"), None)
    if slot is None:
        return None
    clip = await in_thread(_read, slot, fetched, most_bytes)
    if isinstance(clip, Clip):
        return clip
    async with processes:
        header = await _header(clip)
    return await in_thread(film_clip, clip, *header)


def _read(slot: MediaSlot, fetched: Mapping[str, bytes], most_bytes: int) -> Clip | bytes:
    """Return the frames that the client sampled itself, or the film."""
    if slot.remote:
        with about_url(slot.source):
            return check_film(fetched[slot.source], most_bytes)
    return frames_of(slot.source, most_bytes) or film_of(slot.source, most_bytes)


async def _header(data: bytes) -> tuple[int, float, tuple[int, int]]:
    """Read a film's header in a separate process; return frames, frames a second, and size."""
    film = await in_thread(_in_memory, data)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", _PROGRAM, stdin=film,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        os.close(film)
    try:
        text, _ = await asyncio.wait_for(process.communicate(), _SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        text = b""
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(process.wait(), _LAST_SECONDS)
    if process.returncode == _NO_OPENCV:
        raise Refusal("no_video_reader")
    try:
        frames, rate, width, height = msgspec.json.decode(text, type=list[float])
    except (msgspec.MsgspecError, ValueError):
        frames = rate = width = height = 0.0
    if frames < 1:
        raise Refusal("broken_video:header")
    return int(frames), rate, (int(width), int(height))


def _in_memory(data: bytes) -> int:
    """Return the descriptor of a new file in memory with ``data``, for a process to read."""
    film = os.memfd_create("film")
    with open(film, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(film, 0, os.SEEK_SET)
    return film


def frames_of(url: str, most_bytes: int) -> Clip | None:
    """Return a video made of frames that the client sampled itself; None if the URL has a film.

    Raises:
        Refusal: there are too many frames or bytes, or frames that differ in size or are no images.
    """
    head, payload = _split(url)
    if head != f"data:{_SEQUENCE};base64":
        return None
    check_bytes("video_too_big", len(payload) * 3 // 4, most_bytes, SPACES)
    count = payload.count(",") + 1
    if count > MOST_FRAMES:
        raise Refusal("too_many_frames:sent", count=count, most=MOST_FRAMES)
    frames = [from_base64(text, most_bytes) for text in payload.split(",")]
    sizes = {frame.size for frame in frames}
    if {frame.mime for frame in frames} != {"image/jpeg"}:
        raise Refusal("unknown_video_type:frame", taken=_TAKEN)
    if len(sizes) > 1:
        raise Refusal("broken_video:sizes")
    return Clip(
        url=f"data:{_SEQUENCE};base64,{','.join(frame.base64 for frame in frames)}",
        frames=len(frames),
        size=sizes.pop(),
    )


def film_of(url: str, most_bytes: int) -> bytes:
    """Return the film in a ``data:`` URL.

    Raises:
        Refusal: the URL has no valid base64, or the file is too large.
    """
    _, payload = _split(url)
    check_bytes("video_too_big", len(payload) * 3 // 4, most_bytes, _PADDING)
    try:
        data = decoded(payload)
    except ValueError:
        raise Refusal("bad_video_base64") from None
    return check_film(data, most_bytes)


def check_film(data: bytes, most_bytes: int) -> bytes:
    """Return ``data`` if it is a film; refuse other bytes, such as a playlist of files.

    Raises:
        Refusal: the bytes are no film of an accepted type, or are too many.
    """
    check_bytes("video_too_big", len(data), most_bytes)
    if _mime(data) is None:
        raise Refusal("unknown_video_type", taken=_TAKEN)
    return data


def film_clip(data: bytes, frames: int, rate: float, size: tuple[int, int]) -> Clip:
    """Return a film as a `Clip`, with the numbers of its header.

    Raises:
        Refusal: the header has an impossible size, rate or number of frames.
    """
    if not RATES[0] <= rate <= RATES[1]:
        raise Refusal("broken_video:rate", rate=rate)
    width, height = size
    if not 1 <= min(size) <= max(size) <= LONGEST_SIDE or width * height > LARGEST_PIXELS:
        raise Refusal(
            "bad_video_size", width=width, height=height, longest=LONGEST_SIDE, most=LARGEST_PIXELS
        )
    if frames * _LEAST_FRAME > len(data):
        # LMDeploy tries to read each frame that the header announces, even if it does not exist.
        raise Refusal("broken_video:count", frames=frames, size=len(data))
    url = f"data:{_mime(data)};base64,{encoded(data)}"
    return Clip(url=url, frames=frames, size=size, rate=rate)


def _split(url: str) -> tuple[str, str]:
    """Split a ``data:`` URL with base64 into its head, in lower case, and its base64 text."""
    head, comma, payload = url.partition(",")
    head = head.lower()
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise Refusal("bad_video_url")
    return head, payload


def _mime(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return "video/mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "video/webm"
    return "video/x-msvideo" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None

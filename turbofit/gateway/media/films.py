"""Headers of films, read as LMDeploy's first choice of a loader will, outside of this process."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.gateway.http.prepare import is_remote
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.clips import Clip, check_film, film_clip, film_of, frames_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.gateway.http.bodies import Parsed

__all__ = ["VideoInspector"]

_PROGRAM: Final = str(Path(__file__).with_name("film_header.py"))
_SECONDS: Final = 20.0
#: Seconds that it has to end after SIGKILL; a process that the kernel holds is not waited for.
_LAST_SECONDS: Final = 5.0
_AT_ONCE: Final = 2
_NO_OPENCV: Final = 3


class VideoInspector:
    """Looks at the video of a request."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def look(
        self, parsed: Parsed, fetched: Mapping[str, bytes], most_bytes: int
    ) -> Clip | None:
        """The request's video, None where it has none.

        Args:
            parsed: what `prepare.start` gave: at most one video.
            fetched: the files of `prepare.remote_urls`.
            most_bytes: how many bytes a video may have.

        Raises:
            Refusal: no usable video.
        """
        slot = next((slot for slot in parsed.slots if slot.shape == "clip"), None)
        if slot is None:
            return None
        if is_remote(slot):
            film = check_film(fetched[slot.source], most_bytes)
        else:
            frames = frames_of(slot.source, most_bytes)
            if frames is not None:
                return frames
            film = film_of(slot.source, most_bytes)
        return film_clip(film, *await self._header(film))

    async def _header(self, data: bytes) -> tuple[int, float, tuple[int, int]]:
        """Frames, frames a second, and size.

        Raises:
            Refusal: a film that cannot be read, or nobody here who reads films.
        """
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", _PROGRAM, stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                text, _ = await asyncio.wait_for(process.communicate(data), _SECONDS)
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
        if not all(isfinite(one) for one in (frames, rate, width, height)) or frames < 1:
            raise Refusal("broken_video:header")
        return int(frames), rate, (int(width), int(height))

"""Reads a film's header: ``python -I film_header.py < FILM`` prints frames, rate, width, height.

This program runs as a separate process, since a demuxer in C reads a stranger's bytes. It imports
nothing of turbofit. Exit code 3 means that OpenCV is not installed.
"""

from __future__ import annotations

import json
import resource
import sys
from io import BytesIO
from typing import Any

#: The limits of processor time, in seconds, and of address space, in bytes. A header needs a
#: fraction of both.
_SECONDS, _BYTES = 10, 4 << 30


def main() -> int:
    """Print the header as JSON, or zeros for an unreadable film; return the exit code."""
    try:
        import cv2
        from cv2 import videoio_registry
    except ImportError:
        return 3
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    # OpenCV 5.0 keeps no reference to the object that it reads from.
    film = BytesIO(sys.stdin.buffer.read())
    capture: Any = cv2.VideoCapture  # OpenCV's types do not know this call
    opened = capture(film, videoio_registry.getStreamBufferedBackends()[0], [])
    names = (
        cv2.CAP_PROP_FRAME_COUNT,
        cv2.CAP_PROP_FPS,
        cv2.CAP_PROP_FRAME_WIDTH,
        cv2.CAP_PROP_FRAME_HEIGHT,
    )
    values = [float(opened.get(name)) if opened.isOpened() else 0.0 for name in names]
    sys.stdout.write(json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())

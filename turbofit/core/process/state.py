"""Where turbofit keeps files between runs: the folder ``turbofit`` in the user's state folder.

That is ``$XDG_STATE_HOME``, else ``~/.local/state``; on Windows ``%LOCALAPPDATA%``, as the package
platformdirs has it. A relative path is ignored, as the XDG Base Directory Specification wants.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


def state_dir(room: str, *, make: bool = True) -> Path:
    """The state folder of one room, e.g. ``state_dir("runs")``; made where it is missing.

    Only the user can read it: logs of a server may hold what its clients sent.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(_base(windows=os.name == "nt"))
    for name in ("turbofit", *Path(room).parts):
        folder /= name
        if make:  # mkdir gives its mode to the last folder alone
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def digest_of_parts(*parts: str) -> str:
    """A file's name for what belongs to all of these texts together."""
    from hashlib import sha256

    return sha256("\0".join(parts).encode()).hexdigest()[:24]


def _base(*, windows: bool) -> str:
    """The user's state folder."""
    chosen = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(chosen):
        return chosen
    if not windows:
        return os.path.expanduser("~/.local/state")
    return os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")


def new_path(room: str, stem: str, suffix: str = "") -> Path:
    """Make an empty folder in a room's folder, with a name that no other run has.

    Where there is a ``suffix``, an empty file of that name.

    Raises:
        OSError: it cannot be made.
    """
    base = state_dir(room) / f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}"
    for attempt in range(1000):
        path = base.with_name(f"{base.name}{f'-{attempt}' if attempt else ''}{suffix}")
        try:
            if suffix:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            else:
                path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{base}{suffix}")

"""Where huggingface_hub keeps what it has downloaded: ``models--ORG--NAME`` folders.

Imports nothing of ours: looking whether a checkpoint is there must cost next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["cached_snapshot", "hub_cache"]


def cached_snapshot(hub_id: str, revision: str | None) -> str | None:
    """The folder of a hub id in the local hub cache, None where it is not there.

    The layout is huggingface_hub's: ``models--ORG--NAME/refs/REVISION`` names a commit,
    ``snapshots/COMMIT`` holds the files.
    """
    if hub_id.count("/") != 1 or ".." in hub_id or "\0" in hub_id:
        return None
    base = os.path.join(hub_cache(), "models--" + hub_id.replace("/", "--"))
    wanted = revision or "main"
    if not wanted.isprintable() or ".." in wanted:
        return None
    commit = wanted
    try:
        with open(os.path.join(base, "refs", *wanted.split("/")), encoding="ascii") as file:
            commit = file.read(256).strip()
    except (OSError, ValueError):
        if revision is None:
            return None
    if not commit.isalnum():
        return None
    folder = os.path.join(base, "snapshots", commit)
    return folder if os.path.isfile(os.path.join(folder, "config.json")) else None


def hub_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Where huggingface_hub keeps its files, by the rules of its ``constants.py``.

    It obeys a relative path, too. A variable that is empty is not set.
    """
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        home = environ.get("HF_HOME")
        if not home:
            caches = environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
            home = os.path.join(caches, "huggingface")
        cache = os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(cache))

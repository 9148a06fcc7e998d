"""Where huggingface_hub keeps what it has downloaded: ``models--ORG--NAME`` folders.

Imports nothing of ours: looking whether a checkpoint is there must cost next to nothing.
"""

from __future__ import annotations

import os

__all__ = ["cached_snapshot"]


def cached_snapshot(hub_id: str, revision: str | None) -> str | None:
    """The folder of a hub id in the local hub cache, None where it is not there.

    The layout is huggingface_hub's: ``models--ORG--NAME/refs/REVISION`` names a commit,
    ``snapshots/COMMIT`` holds the files.
    """
    if hub_id.count("/") != 1 or ".." in hub_id or "\0" in hub_id:
        return None
    base = os.path.join(_hub_cache(), "models--" + hub_id.replace("/", "--"))
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


def _hub_cache() -> str:
    """Where huggingface_hub keeps its files."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(key):
            return os.path.expanduser(value)
    home = os.environ.get("HF_HOME")
    if not home:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        home = os.path.join(cache, "huggingface")
    return os.path.join(os.path.expanduser(home), "hub")

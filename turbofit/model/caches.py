"""Finds downloads in the caches of huggingface_hub and modelscope, in each version's layout.

It imports nothing of turbofit, since checking for a checkpoint must take almost no time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

#: ModelScope's name of the main branch, and the name on the hubs that it mirrors.
_BRANCHES = ("master", "main")


def cached_snapshot(hub_id: str, revision: str | None, holds: str = "config.json") -> str | None:
    """The folder of a hub id in huggingface_hub's cache; None if it lacks the file ``holds``.

    ``models--ORG--NAME/refs/REVISION`` names a commit, ``snapshots/COMMIT`` holds the files.
    """
    commit = wanted = revision or "main"
    if hub_id.count("/") != 1 or ".." in hub_id + wanted or not (hub_id + wanted).isprintable():
        return None
    base = os.path.join(hub_cache(), "models--" + hub_id.replace("/", "--"))
    try:
        with open(os.path.join(base, "refs", *wanted.split("/")), encoding="ascii") as file:
            commit = file.read(256).strip()
    except (OSError, ValueError):
        if revision is None:
            return None
    if not commit.isalnum():
        return None
    folder = os.path.join(base, "snapshots", commit)
    return folder if os.path.isfile(os.path.join(folder, holds)) else None


def hub_cache(environ: Mapping[str, str] = os.environ) -> str:
    """The folder of huggingface_hub's cache, by the rules of its ``constants.py``."""
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        home = environ.get("HF_HOME")
        if not home:
            caches = environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
            home = os.path.join(caches, "huggingface")
        cache = os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(cache))


def uses_modelscope() -> bool:
    """Whether LMDeploy would download from ModelScope; this is LMDeploy's own test."""
    return os.environ.get("LMDEPLOY_USE_MODELSCOPE", "").lower() == "true"


def modelscope_cache() -> str:
    """The folder that contains the downloads of all versions of modelscope."""
    root = os.environ.get("MODELSCOPE_CACHE") or os.path.join("~", ".cache", "modelscope")
    return os.path.expanduser(root)


def modelscope_folders(hub_id: str, revision: str | None) -> Iterator[str]:
    """Yield the folders that may hold a model, newest layout first; each has a config.json.

    Up to modelscope 1.37 a model's main branch has one folder, ``ORG/NAME``, in the root, in its
    ``hub``, or in ``models`` of either; some versions write ``___`` for a dot of the name. Since
    modelscope-hub 0.4 it is ``models/ORG--NAME/snapshots/REVISION``.
    """
    owner, _, name = hub_id.partition("/")
    parts = {owner, name, *(revision or "main").split("/")}
    if parts & {"", ".", ".."} or "/" in name or not "".join(parts).isprintable():
        return
    root = modelscope_cache()
    snapshots = os.path.join(root, "models", f"{owner}--{name}", "snapshots")
    for branch in (revision,) if revision else _BRANCHES:
        folder = os.path.join(snapshots, *branch.split("/"))
        if has_config(folder):
            yield folder
    masked = name.replace(".", "___")
    for above in ("models", os.path.join("hub", "models"), "hub", ""):
        for stored in dict.fromkeys((masked, name)):
            folder = os.path.join(root, above, owner, stored)
            if has_config(folder) and revision is None:
                yield folder


def has_config(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))

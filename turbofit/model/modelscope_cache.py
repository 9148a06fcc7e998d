"""Where the modelscope package keeps what it has downloaded, in the layout of each of its versions.

Imports nothing of ours: looking whether a checkpoint is there must cost next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["cache_root", "modelscope_folders", "uses_modelscope"]

#: What a repository's own branch is called there, and on the hubs that it mirrors.
_BRANCHES = ("master", "main")


def uses_modelscope() -> bool:
    """Whether LMDeploy would download from ModelScope: its own test of its own variable."""
    return os.environ.get("LMDEPLOY_USE_MODELSCOPE", "").lower() == "true"


def cache_root() -> str:
    """The folder below which all versions of the package keep their files."""
    root = os.environ.get("MODELSCOPE_CACHE") or os.path.join("~", ".cache", "modelscope")
    return os.path.expanduser(root)


def modelscope_folders(hub_id: str, revision: str | None) -> Iterator[str]:
    """The folders that may hold a model, newest layout first; each has a config.json.

    Up to modelscope 1.37 a model has one folder, ``ORG/NAME``, below the root, its ``hub``, or
    ``models`` in either; ``___`` stands for a dot of the name in some versions, and ``.mv`` says
    the revision. Since modelscope-hub 0.4 it is ``models/ORG--NAME/snapshots/REVISION``.
    """
    owner, _, name = hub_id.partition("/")
    if not owner or not name or "/" in name or "\0" in hub_id or {owner, name} & {".", ".."}:
        return
    if revision is not None and (
        not revision.isprintable() or {"..", "."} & {*revision.split("/")}
    ):
        return
    root = cache_root()
    snapshots = os.path.join(root, "models", f"{owner}--{name}", "snapshots")
    for branch in (revision,) if revision else _BRANCHES:
        folder = os.path.join(snapshots, *branch.split("/"))
        if _has_config(folder):
            yield folder
    masked = name.replace(".", "___")
    for above in ("models", os.path.join("hub", "models"), "hub", ""):
        for stored in dict.fromkeys((masked, name)):
            folder = os.path.join(root, above, owner, stored)
            if _has_config(folder) and revision in {None, _version(folder)}:
                yield folder


def _has_config(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


def _version(folder: str) -> str | None:
    """The revision that a flat folder was downloaded at, None where it does not say."""
    try:
        with open(os.path.join(folder, ".mv"), encoding="utf-8") as file:
            text = file.read(512)
    except (OSError, ValueError):
        return None
    return text.partition(",")[0].removeprefix("Revision:").strip() or None

"""The JSON Schemas of the documents that `--json` prints, as published files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: The documents; ``plan`` is also the schema of a prediction and of a rehearsal.
NAMES: Final = (
    "plan", "report", "cluster-plan", "cluster-status", "bench", "tune",
    "share", "which", "batch",
)  # fmt: skip


def schema_text(name: str) -> str:
    """The text of the schema of one of ``NAMES``, as JSON."""
    return schema_path(name).read_text(encoding="utf-8")


def schema_path(name: str) -> Path:
    """The path of the schema of one of ``NAMES``; `generate` writes the file."""
    return Path(__file__).parent / f"turbofit.{name}-{version_of(name)}.json"


def version_of(name: str) -> int:
    """The newest version of the schema of one of ``NAMES``."""
    versions = {"plan": 2, "report": 2, "share": 2, "cluster-plan": 2, "cluster-status": 3}
    return versions.get(name, 1)

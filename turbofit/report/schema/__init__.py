"""The JSON Schemas of the documents that `--json` prints, as published files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: The newest version of each document's schema. A prediction and a rehearsal have the schema
#: ``plan``.
VERSIONS: Final = {
    "plan": 2, "report": 2, "cluster-plan": 2, "cluster-status": 3, "bench": 1, "tune": 1,
    "share": 2, "which": 1, "batch": 1,
}  # fmt: skip
NAMES: Final = tuple(VERSIONS)


def schema_text(name: str) -> str:
    """Return the JSON text of a schema; ``name`` is one of ``NAMES``."""
    return schema_path(name).read_text(encoding="utf-8")


def schema_path(name: str) -> Path:
    """Return the path of a schema, which `scripts/schemas.py` writes."""
    return Path(__file__).parent / f"turbofit.{name}-{VERSIONS[name]}.json"

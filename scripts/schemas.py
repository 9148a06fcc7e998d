"""``python -m scripts.schemas``: the published JSON Schemas, made of the types.

A field's description stands beside the field, a type's is the first paragraph of its docstring.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Final, NamedTuple

import msgspec

from turbofit.batch_jobs.batch_job import BatchResult
from turbofit.core.cluster import ClusterPlan, NodeStatus
from turbofit.core.plan import Plan
from turbofit.core.struct import Document, Struct
from turbofit.core.tuning import Tuning
from turbofit.measure.load.result import LoadResult
from turbofit.planning.which import Which
from turbofit.report.schema import NAMES, VERSIONS, schema_path
from turbofit.report.share import SharedRun
from turbofit.report.stored_documents import RunDocument


class _Document(NamedTuple):
    """What is published of a type.

    ``named``: whether a document of it must name its schema.
    """

    kind: type[Struct]
    title: str
    comment: str = ""
    named: bool = True


_SIZES: Final = "All sizes are bytes."
_LATER: Final = "A field that is not required was added later"
_DOCUMENTS: Final = {
    "plan": _Document(
        Plan,
        "A plan, a prediction or a rehearsal of turbofit",
        f"{_SIZES} {_LATER}, or may be left out by who writes plans by hand; turbofit writes all "
        "of them.",
    ),
    "report": _Document(RunDocument, "A run of turbofit serve with its plan"),
    "cluster-plan": _Document(
        ClusterPlan,
        "A plan for several machines",
        f"{_SIZES} {_LATER}; turbofit writes all of them.",
        named=False,
    ),
    "cluster-status": _Document(
        NodeStatus,
        "A model that a Ray cluster serves, at one moment",
        "turbofit cluster status --json prints an array of these, one for each model that is "
        "served.",
        named=False,
    ),
    "bench": _Document(LoadResult, "A load on a server, and what it measured", "Seconds."),
    "tune": _Document(Tuning, "Settings that were tried, and the best of them", "Seconds."),
    "share": _Document(SharedRun, "A run on real cards beside its forecast", _SIZES),
    "which": _Document(Which, "Cards that keep a promise, or models that a machine serves", _SIZES),
    "batch": _Document(BatchResult, "A batch at its end: what `batch --json` prints", "Seconds."),
}
_PLAN: Final = "urn:turbofit:plan:2"
_LEFT_OUT: Final = ("title", "default", "discriminator")


def document(name: str) -> Document:
    """The schema of one of ``NAMES``; all but the plan's refer to the plan's for what it has."""
    told = _DOCUMENTS[name]
    parts = _parts(told.kind)
    theirs = set() if told.kind is Plan else set(_parts(Plan))
    whole = _published(parts.pop(told.kind.__name__), theirs)
    names = "schema" in whole["properties"] and told.named
    if names and "schema" not in whole["required"]:
        whole["required"].insert(0, "schema")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:turbofit:{name}:{VERSIONS[name]}",
        "title": told.title,
        **({"$comment": told.comment} if told.comment else {}),
    }
    defs = {one: _published(part, theirs) for one, part in parts.items() if one not in theirs}
    return {**head, **whole, "$defs": defs}


def _any_json(kind: type) -> Document:
    """The schema of what is declared as ``object``."""
    if kind is object:
        return {"description": "any JSON value"}
    raise NotImplementedError


def _parts(kind: type[Struct]) -> dict[str, Any]:
    """The schemas of a type and of all that its fields hold, by their names."""
    parts = msgspec.json.schema_components([kind], schema_hook=_any_json)[1]
    return dict(parts)


def _published(part: Any, theirs: set[str]) -> Any:
    """A part of msgspec's schema as it is published.

    Defaults are left out, since turbofit writes every field; a field that is unknown is an error;
    a reference leads to the plan's schema where that has the type.
    """
    if isinstance(part, list):
        return [_published(one, theirs) for one in part]
    if not isinstance(part, dict):
        return part
    found: dict[str, Any] = {
        key: {name: _published(one, theirs) for name, one in value.items()}
        if key == "properties"
        else _published(value, theirs)
        for key, value in part.items()
        if key not in _LEFT_OUT
    }
    if "$ref" in found:
        name = found["$ref"].rpartition("/")[2]
        inside = f"{_PLAN}#/$defs/{name}" if name in theirs else f"#/$defs/{name}"
        found["$ref"] = _PLAN if name == "Plan" else inside
    if "properties" in found:
        found["additionalProperties"] = False
        found.setdefault("required", [])
    if isinstance(found.get("description"), str):
        found["description"] = " ".join(found["description"].split("\n\n")[0].split()).replace(
            "``", ""
        )
    return found


def _laid_out(value: Any, indent: int = 0) -> str:
    """A part of a schema as JSON: on one line what has at most 160 characters, as most fields."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or indent + len(line) <= 160:
        return line
    start = "\n" + " " * (indent + 2)
    if isinstance(value, list):
        inside = [_laid_out(one, indent + 2) for one in value]
    else:
        inside = [f"{json.dumps(key)}: {_laid_out(one, indent + 2)}" for key, one in value.items()]
    open_, close = "[]" if isinstance(value, list) else "{}"
    return f"{open_}{start}{(',' + start).join(inside)}{start[:-2]}{close}"


def main() -> None:
    """Write all of them."""
    argparse.ArgumentParser(prog="python -m scripts.schemas", description=__doc__).parse_args()
    for name in NAMES:
        schema_path(name).write_text(_laid_out(document(name)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

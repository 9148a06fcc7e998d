"""The JSON Schema of profiles, for editors: ``python -m turbofit.cli.options.profile_schema``.

It is made of the fields that the command line is made of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbofit.cli.options.common_options import sections
from turbofit.core.presets import presets_dir

if TYPE_CHECKING:
    from turbofit.cli.options.profile import ProfileSection
    from turbofit.core.json_types import Document


def schema_file() -> Path:
    return presets_dir() / "profile.schema.json"


def document() -> Document:
    known = sections()
    of_models = {
        name: _section(one) for name, one in known.items() if one.of_model and name != "model"
    }
    shared = {name: _section(one) for name, one in known.items() if name != "model"}
    names = _section(known["model"])["properties"]
    entry = {
        "type": "object",
        "properties": {**names, **{name: {"$ref": f"#/properties/{name}"} for name in of_models}},
        "required": ["model"],
        "additionalProperties": False,
    }
    one_model = {"anyOf": [names["model"], entry]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:turbofit:profile:1",
        "title": "A profile of turbofit: turbofit.yaml",
        "type": "object",
        "properties": {
            "model": one_model,
            "models": {"type": "array", "items": one_model, "minItems": 1},
            **shared,
        },
        "not": {"required": ["model", "models"]},
        "additionalProperties": False,
    }


def _section(section: ProfileSection) -> dict[str, Any]:
    """A heading; each field under its name as a keyword's, and as an option's."""
    made = section.kind.model_json_schema()["properties"]
    properties = {}
    for name in section.fields:
        plain = name.rstrip("_")
        properties[plain] = properties[plain.replace("_", "-")] = _field(section, name, made[name])
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _field(section: ProfileSection, name: str, made: dict[str, Any]) -> dict[str, Any]:
    """One value: what pydantic takes, and the texts that a command line has."""
    field = section.kind.model_fields[name]
    if name in section.secret:
        reference: dict[str, Any] = {"type": "string", "pattern": "^(env|file):."}
        references = [reference, {"type": "array", "items": reference}]
        return {"description": field.description, "anyOf": references}
    told = ("title", "default", "description")
    alone = {key: value for key, value in made.items() if key not in told}
    kinds: list[dict[str, Any]] = made.get("anyOf") or [alone]
    kinds = [one for one in kinds if one.get("type") not in (None, "object")]
    if name in section.lists:
        kinds += [one["items"] for one in kinds if "items" in one]
    if "BeforeValidator" in f"{field.annotation} {field.metadata}":
        kinds.append({"type": "string"})
    kinds = [one for place, one in enumerate(kinds) if one not in kinds[:place]]
    if {"type": "null"} not in kinds:
        kinds.append({"type": "null"})
    return {"description": field.description, "anyOf": kinds}


def main() -> None:
    text = json.dumps(document(), indent=2, ensure_ascii=False) + "\n"
    schema_file().write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The site's reference pages: commands from click, Python from docstrings, schemas, sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

import turbofit
from scripts.citations import citations
from turbofit.cli.command import Argument, Option
from turbofit.cli.command_group import COMMANDS, TURBOFIT
from turbofit.cli.manual import EXIT_CODES, MANUAL
from turbofit.core.version import REFERENCE
from turbofit.planning.request import PlanRequest
from turbofit.report.schema import NAMES, schema_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.cli.command import CliCommand

_ROOT: Final = Path(__file__).parents[1]
#: The published JSON Schemas of the documents that turbofit prints.
SCHEMAS: Final = tuple(map(schema_path, NAMES))
#: Where each public name of `turbofit` stands; mkdocstrings reads the source and imports nothing.
_HOMES: Final = {
    "Plan": "turbofit.core.plan.Plan",
    "PlanRequest": "turbofit.planning.request.PlanRequest",
}


def reference_pages() -> dict[str, str]:
    """Each page's text, by its place on the site."""
    return {
        "reference/cli.md": "\n".join(_commands()),
        "reference/python.md": "\n".join(_python()),
        "reference/schemas.md": "\n".join(_schemas()),
        "reference/sources.md": "\n".join(_sources()),
    }


def _commands() -> Iterator[str]:
    yield "# The command line\n"
    yield "Every command with all its options. [Commands](../commands.md) says what each is for.\n"
    yield from _table(
        ("command", "what"), ((f"[{one}](#{one})", COMMANDS[one]) for one in COMMANDS)
    )
    root = click.Context(TURBOFIT, info_name="turbofit")
    for name in COMMANDS:
        command = TURBOFIT.get_command(root, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=root)
        yield from _command(command, ctx, name)
    yield "## Exit codes\n"
    yield from _table(("code", "meaning"), ((str(code), what) for code, what in EXIT_CODES.items()))


def _command(command: CliCommand, ctx: click.Context, name: str) -> Iterator[str]:
    yield f"## {name}\n\n{COMMANDS[name]}.\n"
    command.explain(name)
    yield _code([command.get_usage(ctx).removeprefix("Usage: ")])
    arguments = [one for one in command.params if isinstance(one, Argument)]
    if arguments:
        records = ((f"`{one.make_metavar(ctx)}`", one.explained) for one in arguments)
        yield from _table(("argument", "what"), records)
    groups: dict[str, list[tuple[str, str]]] = {}
    for one in command.params:
        record = one.get_help_record(ctx) if isinstance(one, Option) else None
        if isinstance(one, Option) and record is not None:
            groups.setdefault(one.group, []).append((f"`{record[0]}`", record[1]))
    for group, options in groups.items():
        yield from _table((group or "option", "what"), options)
    if name in MANUAL:
        manual = MANUAL[name]
        yield f"Examples:\n\n{_code(manual.examples)}"
        codes = ", ".join(map(str, sorted((0, 1, 2, *manual.exits, 130))))
        yield f"[Exit codes](#exit-codes): {codes}. It touches: {manual.touches}.\n"


def _python() -> Iterator[str]:
    yield "# Python\n"
    yield f"```python\nimport turbofit\n```\n\nturbofit {turbofit.__version__} has these names:\n"
    names = [name for name in turbofit.__all__ if not name.startswith("_")]
    for name in sorted(names, key=str.lower):
        yield f"::: {_HOMES.get(name, f'turbofit.api.{name}')}\n"
        members = "members: false" if name == "PlanRequest" else "filters: ['!^_']"
        yield f"    options:\n      heading_level: 2\n      {members}\n"
        if name == "PlanRequest":
            fields = PlanRequest.model_fields.items()
            rows = ((f"`{field}`", info.description or "") for field, info in fields)
            yield from _table(("field", "what"), rows)


def _schemas() -> Iterator[str]:
    yield "# JSON Schemas\n"
    yield (
        "`--json` prints one document. `turbofit report --schema NAME` prints its JSON Schema. "
        'Sizes are bytes; what could not be read is `"NA"`, never 0.\n'
    )
    for path in SCHEMAS:
        schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        place = path.relative_to(_ROOT).as_posix()
        yield f"## {path.stem}\n\n{schema['title']}. [{path.name}](../{place})\n"
        fields = schema.get("properties") or schema["$defs"][_target(schema["$ref"])]["properties"]
        yield from _table(
            ("key", "what"), ((f"`{one}`", _said(schema, fields[one])) for one in fields)
        )


def _said(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """A field's description, or else that of the type that it refers to."""
    for one in (field, *field.get("anyOf", ()), field.get("items", {})):
        if said := one.get("description"):
            return str(said)
        target = _target(one.get("$ref", ""))
        if target in schema.get("$defs", {}):
            return str(schema["$defs"][target].get("description", ""))
    return str(field.get("const", field.get("type", "")))


def _sources() -> Iterator[str]:
    yield "# Sources\n"
    yield (
        f"What turbofit's figures, ranges and formulas rest on, in LMDeploy {REFERENCE} where no"
        " version is named, in torch and in Transformers: a file, a name in it, and a hash of what"
        " stands there or words of it. A test looks each up in the installed packages."
        " [How to add](../adding.md#an-engine-version) says how a new release is compared.\n"
    )
    rows = []
    for one in citations():
        cited = f"{one.package} {one.version} {one.cited}".replace("  ", " ").replace("`", "")
        rows.append((f"`{one.file}:{one.line}`", f"`{cited}` {one.digest}"))
    yield from _table(("in", "rests on"), rows)


def _target(reference: str) -> str:
    return reference.rpartition("/")[2]


def _table(
    head: tuple[str, str], rows: Iterator[tuple[str, str]] | list[tuple[str, str]]
) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |\n|---|---|"
    for name, what in rows:
        said = " ".join(what.split()).replace("|", "\\|").replace("<", "&lt;")
        yield f"| {name} | {said} |"  # Python-Markdown splits no code at a bar
    yield ""


def _code(lines: tuple[str, ...] | list[str]) -> str:
    return "```text\n" + "\n".join(lines) + "\n```\n"

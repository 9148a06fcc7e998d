"""Commands that turbofit's own sentences name, in hints above all: each is parsed."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.test_docs_commands import problem_of
from turbofit.cli.command import Option
from turbofit.cli.main import TURBOFIT
from turbofit.cli.manual import COMMANDS
from turbofit.core.errors import spelled_in_shell
from turbofit.core.messages import neighbours

PACKAGE = Path(__file__).parents[2] / "turbofit"
#: What stands for the reader's own words, and for what a sentence fills in.
VALUES = {
    "SPEC": "4xrtx3090", "NAME=URL": "a=http://127.0.0.1:1", "N": "1", "BYTES": "1GiB",
    "NAME": "turbomind", "[ADAPTER]": "ADAPTER",
}  # fmt: skip
#: A command, to the end of its sentence's part.
COMMAND = re.compile(rf"\bturbofit ((?:{'|'.join(COMMANDS)})\b[^`;:\n]*)")
#: What an unfinished mention of a command lacks: the words of its reader.
UNFINISHED = re.compile(r"is missing|needs a value|needs a model")


def sentences() -> Iterator[tuple[str, str]]:
    """Each text of the package that is no docstring, with where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "turbofit " not in source:
            continue
        nodes = list(ast.walk(ast.parse(source)))
        joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        inside = {id(part) for node in joined for part in node.values}
        inside |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if id(node) not in inside and any(isinstance(text, str) for text in texts):
                said = "".join(text if isinstance(text, str) else "FILLED" for text in texts)
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", said


def rows() -> Iterator[tuple[str, str]]:
    """The lines of presets/neighbours.yaml, each the whole of a hint or behind ``here: …``."""
    table = neighbours()
    yield from (("neighbours.yaml", text) for text in table["commands"].values())
    yield from (("neighbours.yaml", text) for text in table["arguments"].values())
    for options in table["options"].values():
        yield from (("neighbours.yaml", row.get("say", "")) for row in options.values())


def command_of(text: str) -> list[str]:
    """The words of a command at the beginning of a text, up to the first word of prose."""
    name, *rest = text.split()
    bare = name.rstrip(",.)")
    if bare != name:
        return [bare]
    options = {
        spelled: param
        for param in TURBOFIT.get_command(click.Context(TURBOFIT), name).params
        for spelled in (*param.opts, *param.secondary_opts)
    }
    words = [name]
    while rest:
        word = rest.pop(0)
        bare = word.rstrip(",.)'\"")
        if bare in options:
            words.append(bare)
            option = options[bare]
            if isinstance(option, Option) and not option.bare and rest and bare == word:
                word = rest.pop(0)
                bare = word.rstrip(",.)")
                words.append(VALUES.get(bare, bare))
        elif bare == "FILLED":
            break  # an option, a model or prose: only running it tells
        elif bare.isupper() or re.search(r"[\w]\.\w|^\[[A-Z]+\]$|^-", bare):
            words.append(VALUES.get(bare, bare))
        else:
            break
        if bare != word:
            break
    return words


def test_each_command_in_a_sentence_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("model: internvl2-8b")
    mentions = [
        (where, match)
        for where, text in (*sentences(), *rows())
        for match in COMMAND.finditer(spelled_in_shell(text))
    ]
    assert len(mentions) >= 80
    for where, match in mentions:
        words, problem = command_of(match[1]), ""
        with contextlib.suppress(click.exceptions.Exit):  # of --help
            problem = problem_of(words)
        whole = match.start() == 0 and words[1:]
        assert not problem or (UNFINISHED.search(problem) and not whole), (where, words)

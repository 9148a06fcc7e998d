"""Chooses LMDeploy's parsers of tool calls and of reasoning for a model's family.

The table is ``presets/engines/parsers.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal

from turbofit.core.model import Model
from turbofit.core.presets import read_preset
from turbofit.core.struct import Struct

Kind = Literal["tool", "reasoning"]

_OPTIONS: Final[dict[Kind, str]] = {
    "tool": "--tool-call-parser", "reasoning": "--reasoning-parser",
}  # fmt: skip
#: The tag that LMDeploy's reasoning parser needs in the tokenizer; without it no server starts.
_THOUGHT: Final = b"<think>"
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


class _Row(Struct, forbid_unknown_fields=True):
    """A family of models and its parser.

    ``architecture`` None means any architecture; ``name`` is a regular expression for the name of
    the model.
    """

    parser: str
    architecture: str | None = None
    name: str = ""


@cache
def _rows() -> dict[Kind, tuple[_Row, ...]]:
    return read_preset("engines", "parsers", dict[Kind, tuple[_Row, ...]])


def parser_of(kind: Kind, model: Model) -> str | None:
    """Return LMDeploy's name of the parser for a model's family; None if there is no parser."""
    for row in _rows()[kind]:
        if row.architecture in (None, model.architecture) and re.search(
            row.name, model.name, re.IGNORECASE
        ):
            return row.parser
    return None


def parser_options(model: Model, folder: Path, given: Sequence[str]) -> Iterable[str]:
    """Yield the options of LMDeploy's server that set the parsers of a model's family.

    Args:
        model: the model of the plan.
        folder: the model folder that the engine loads.
        given: the user's options for LMDeploy; a parser in them is kept.
    """
    for kind, option in _OPTIONS.items():
        parser = parser_of(kind, model)
        if parser is None or any(word.partition("=")[0] == option for word in given):
            continue
        files = [path for name in _TOKENIZER_FILES if (path := folder / name).is_file()]
        if kind == "tool" or any(_THOUGHT in file.read_bytes() for file in files):
            yield from (option, parser)

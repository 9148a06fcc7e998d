"""The text of `--help` below the options: examples, exit codes, what the command touches."""

from __future__ import annotations

import textwrap
from functools import cache
from typing import Final, NamedTuple

from turbofit.cli.terminal.output import PAGE_WIDTH
from turbofit.core.presets import load_yaml, presets_dir

#: The meaning of each exit code.
EXIT_CODES: Final[dict[int, str]] = {
    0: "done",
    1: "a bug in turbofit",
    2: "wrong use",
    3: "it would not serve: it does not fit, dies or hangs",
    4: "the machine cannot be read or has no GPU",
    5: "the engine could not be launched, or not be ended",
    6: "out of memory after all retries",
    7: "a needed package is missing or unsupported",
    130: "Ctrl-C",
}


class Manual(NamedTuple):
    """The manual of one command: examples, exit codes besides 0, 1, 2 and 130, what it touches."""

    examples: list[str]
    exits: list[int]
    touches: str


MANUAL: Final[dict[str, Manual]] = {
    name: Manual(**fields) for name, fields in load_yaml(presets_dir() / "manual.yaml").items()
}


@cache
def option_texts(command: str) -> dict[str, str]:
    """Texts for a command's options and arguments that have none of their own."""
    texts = load_yaml(presets_dir() / "options.yaml")
    return {**texts["shared"], **texts.get(command, {})}


@cache
def group_lines() -> dict[str, str]:
    """What each group of options is for."""
    lines: dict[str, str] = load_yaml(presets_dir() / "options.yaml")["groups"]
    return lines


def manual_text(name: str) -> str:
    """The lines below the options of a command; empty if it has no manual."""
    if name not in MANUAL:
        return ""
    manual = MANUAL[name]
    codes = sorted((0, 1, 2, *manual.exits, 130))
    exits = "; ".join(f"{code} {EXIT_CODES[code]}" for code in codes)
    variables = f"each --option can be TURBOFIT_{name.upper()}_OPTION (docs/environment.md)"
    folded = [
        line
        for what, text in (
            ("environment", variables), ("exit codes", exits), ("touches", manual.touches),
        )
        for line in textwrap.wrap(
            f"{what}: {text}", PAGE_WIDTH, subsequent_indent="  ", break_on_hyphens=False
        )
    ]  # fmt: skip
    examples = [f"  {example}" for example in manual.examples]
    return "\n".join(["", "examples:", *examples, "", *folded, ""])

"""All commands by name, and the text of `--help` below the options of each."""

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
COMMANDS: Final[dict[str, str]] = {
    "plan": "the best plan for a model on a machine: settings, ledger, command",
    "predict": "what given settings would do, without a search",
    "rehearse": "LMDeploy's real engine on pretend GPUs with the plan's settings",
    "pretend": "any command on pretend GPUs: memory by process, card and phase, peak, death",
    "serve": "measure, plan, launch LMDeploy and watch it",
    "cluster": "show the nodes of a Ray cluster, or let one finish and end",
    "chat": "ask a server from the terminal, pictures by their paths",
    "ps": "the servers that run here",
    "logs": "what the engines of a run have printed",
    "stop": "end a server in order",
    "calibrate": "launch an engine, measure its worst case, and correct later plans by it",
    "tune": "settings tried on the real engine under a load; plan and serve use the best",
    "bench": "a load on any OpenAI-compatible server: requests a second, latency, errors",
    "batch": "a file or a folder of requests, until each has its line; resumes",
    "gateway": "hold every request to a plan, in front of any LMDeploy",
    "merge": "a LoRA into its checkpoint; LLaVA's original format into the hf format",
    "quantize": "what a 4-bit checkpoint takes, the program that makes it, and its reader",
    "machine": "GPUs, who uses them, how they reach each other",
    "export": "a plan as a systemd unit, a Compose file or Kubernetes objects",
    "report": "a plan, a rehearsal or a run again: text, Markdown, JSON, one HTML page",
    "which": "the cards that keep a promise; the models that a machine serves",
    "doctor": "check this machine and its environment, each finding with a fix",
    "diagnose": "explain a crash log: what, where, how many bytes, what would have worked",
    "models": "models that turbofit knows by name",
    "gpus": "GPUs that turbofit knows by name",
    "completion": "what makes bash, zsh or fish complete commands, options and presets",
}
_ABOVE: Final = """\
Usage: turbofit [--help] [--version] COMMAND ...

Plans, launches and checks LMDeploy vision-language servers so that they never
run out of GPU memory.

Commands:"""
_BELOW: Final = """
turbofit COMMAND --help tells more: options, examples, exit codes, and what it
touches.
"""


class Manual(NamedTuple):
    """The manual of one command; ``exits`` are its exit codes besides 0, 1, 2 and 130.

    ``touches`` says what the command changes on the machine.
    """

    examples: list[str]
    exits: list[int]
    touches: str


MANUAL: Final[dict[str, Manual]] = {
    name: Manual(**fields) for name, fields in load_yaml(presets_dir() / "manual.yaml").items()
}


@cache
def option_texts(command: str) -> dict[str, str]:
    """Return the help texts of presets/options.yaml for one command, by option and argument."""
    texts = load_yaml(presets_dir() / "options.yaml")
    return {**texts["shared"], **texts.get(command, {})}


@cache
def group_lines() -> dict[str, str]:
    """Return the purpose of each group of options in one line, by the group's name."""
    lines: dict[str, str] = load_yaml(presets_dir() / "options.yaml")["groups"]
    return lines


def manual_text(name: str) -> str:
    """Return the help page's lines below the options; "" for a command without a manual."""
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


def overview() -> str:
    """Return the text of `turbofit --help`, which lists all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join((_ABOVE, *lines, _BELOW))

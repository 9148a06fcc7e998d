"""``turbofit completion SHELL``: what makes a shell complete commands, options and presets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.command import Argument, command
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from click.shell_completion import CompletionItem, ShellComplete

SHELLS: Final = ("bash", "zsh", "fish")
#: The environment variable in which a shell asks `turbofit` for completions.
COMPLETE_VARIABLE: Final = "_TURBOFIT_COMPLETE"
#: How many cards of a kind `--on` offers.
_COUNTS: Final = (1, 2, 4, 8)


@command(Argument("shell", metavar="SHELL", type=click.Choice(SHELLS)))
def completion(shell: str) -> int:
    """Print the script, which asks turbofit itself at each TAB."""
    known = _shell(shell)
    assert known is not None
    answer(known.source() + "\n")
    return 0


def complete(instruction: str) -> int:
    """Answer a shell's request for completions, which stands in the environment.

    Raises:
        UsageError: no shell asks so.
    """
    shell, _, what = instruction.partition("_")
    known = _shell(shell)
    if known is None or what != "complete":
        raise UsageError(
            f"{COMPLETE_VARIABLE}={instruction[:40]} is no shell's question",
            hint="unset it; turbofit completion bash prints the script that sets it",
        )
    answer(known.complete() + "\n")
    return 0


def _shell(name: str) -> ShellComplete | None:
    """Click's completion of turbofit in a shell; None where click does not know the shell."""
    from click.shell_completion import get_completion_class

    from turbofit.cli.command_group import TURBOFIT

    kind = get_completion_class(name)
    return None if kind is None else kind(TURBOFIT, {}, "turbofit", COMPLETE_VARIABLE)


def complete_model(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Models that have a preset; files where none begins so."""
    from turbofit.core.presets import load_yaml, preset_path

    return _candidates_or_files(sorted(load_yaml(preset_path("models", "aliases"))), incomplete)


def complete_spec(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Cards that have a preset, one, two, four and eight of them; files where none begins so."""
    from turbofit.machine.presets import preset_names

    return _candidates_or_files(
        [f"{n}x{name}" for name in preset_names() for n in _COUNTS], incomplete
    )


def _candidates_or_files(candidates: Iterable[str], incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    items = [CompletionItem(word) for word in candidates if word.startswith(incomplete)]
    return items or [CompletionItem(incomplete, type="file")]

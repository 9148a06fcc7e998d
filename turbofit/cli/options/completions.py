"""What is offered at a TAB: models, machines, files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click


#: How many cards of a kind `--on` offers.
_COUNTS: Final = (1, 2, 4, 8)


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from turbofit.core.presets import load_yaml, preset_path

    return candidates_or_files(sorted(load_yaml(preset_path("models", "aliases"))), incomplete)


def complete_spec(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from turbofit.machine.presets import preset_names

    names = [f"{n}x{name}" for name in preset_names() for n in _COUNTS]
    return candidates_or_files(names, incomplete)


def candidates_or_files(candidates: Iterable[str], incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    items = [CompletionItem(word) for word in candidates if word.startswith(incomplete)]
    return items or [CompletionItem(incomplete, type="file")]

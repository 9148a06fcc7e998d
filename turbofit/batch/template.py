"""Prompts with placeholders: ``What is on {name}?``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["PromptTemplate"]

_PLACEHOLDER: Final = re.compile(r"\{\{(\w+)\}\}|\{([^{}\n\"':,]{1,128})\}")


class PromptTemplate:
    """A prompt whose ``{word}`` are replaced; ``{{word}}`` stands for ``{word}`` itself.

    Other braces stay, so that a prompt may hold JSON.

    Args:
        text: the prompt.
        names: the placeholders that there are.

    Raises:
        UsageError: a placeholder that there is not.
    """

    def __init__(self, text: str, names: Iterable[str]) -> None:
        self._text, known = text, tuple(names)
        #: Placeholders that stand in the prompt.
        self.used: set[str] = set()
        for match in _PLACEHOLDER.finditer(text):
            if match[2] is None:
                continue
            self.used.add(match[2])
            if match[2] not in known:
                listed = ", ".join(f"{{{name}}}" for name in known[:20])
                raise UsageError(
                    f"{match[0]} in the prompt is no placeholder here",
                    hint=f"there are {listed}; write {{{match[0]}}} for {match[0]} itself",
                )

    def fill(self, values: Mapping[str, str]) -> str:
        """The prompt of one item."""
        return _PLACEHOLDER.sub(
            lambda match: f"{{{match[1]}}}" if match[1] else values[match[2]], self._text
        )

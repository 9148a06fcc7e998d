"""What a family's reader is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from turbofit.core.model import ImageRule, TextDims, VisionDims
from turbofit.model.config import Section
from turbofit.model.families.support import inner_refusal
from turbofit.model.families.text import TEXT_ARCHITECTURES, read_text

__all__ = ["Dims", "Parts", "Reader", "inner_text"]


class Parts(NamedTuple):
    """The JSON files of a checkpoint that say its dims; a reader adds to ``warnings``.

    ``processor`` is the image processor's settings, None where the checkpoint has none.
    """

    config: Section
    architecture: str
    processor: Section | None
    warnings: list[str]

    def warn_without_processor(self) -> None:
        """Say that image limits are assumed, where no file tells them."""
        if self.processor is None:
            self.warnings.append(
                "there is no preprocessor_config.json: Transformers' default image limits are"
                " assumed, and LMDeploy will not start without it"
            )


class Dims(NamedTuple):
    """Dims of both halves and the rule that turns images into tokens."""

    text: TextDims
    vision: VisionDims | None = None
    rule: ImageRule | None = None


Reader = Callable[[Parts], Dims]


def inner_text(config: Section, outer: str) -> TextDims:
    """The language model inside a vision model, by its own ``architectures[0]``.

    Raises:
        UsageError: it names none, or one that turbofit has no account of.
    """
    names = config.strings("architectures")
    if not names:
        raise config.error("architectures", "is missing, and LMDeploy does not guess it")
    if names[0] not in TEXT_ARCHITECTURES:
        raise inner_refusal(outer, names[0])
    return read_text(config, names[0])

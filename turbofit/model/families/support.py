"""Answers for models that turbofit has no account of: which programs run them, what to do.

The models are data in ``presets/families/unplanned.yaml``, which is read only for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Final, Literal

from turbofit.core.errors import UsageError
from turbofit.core.presets import converted, load_yaml, preset_path
from turbofit.core.struct import Struct
from turbofit.core.version import REFERENCE

_BY_HAND: Final = {
    "turbomind": "TurboMind runs it: start LMDeploy by hand with a low --cache-max-entry-count",
    "pytorch": "LMDeploy's PyTorch engine runs it: start that by hand (--backend pytorch) with a "
    "low --cache-max-entry-count",
}


class UnsupportedFamily(Struct, forbid_unknown_fields=True):
    """A family that turbofit has no account of.

    ``engine`` is the engine of LMDeploy that runs it, or None. ``names`` are beginnings of names
    that people type; ``words`` may stand anywhere in them. ``elsewhere`` are other programs that
    list it among their models.
    """

    name: str
    architectures: tuple[str, ...]
    engine: Literal["turbomind", "pytorch"] | None = None
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    why: str = ""
    hint: str = ""

    def refusal(self) -> UsageError:
        """The error that says why there is no account, and what to do."""
        if self.engine is not None:
            message = f"turbofit does not account for {self.name} yet"
            hint = _BY_HAND[self.engine]
        else:
            message = f"LMDeploy {REFERENCE} does not run {self.name}"
            runs = "run" if len(self.elsewhere) > 1 else "runs"
            hint = f"{' and '.join(self.elsewhere)} {runs} it"
            if not self.elsewhere:
                hint = "take a version of the model in Hugging Face's own format, if there is one"
        message += f": {self.why}" if self.why else ""
        return UsageError(message, hint=self.hint or hint)


@cache
def unplanned() -> tuple[UnsupportedFamily, ...]:
    """All families without an account that the file lists."""
    path = preset_path("families", "unplanned")
    return converted(load_yaml(path).get("models"), tuple[UnsupportedFamily, ...], path)


def refusal(architecture: str) -> UsageError:
    """The error for a checkpoint of an architecture without an account."""
    for known in unplanned():
        if architecture in known.architectures:
            return known.refusal()
    return UsageError(
        f"turbofit does not know the architecture {architecture[:80]!r}",
        hint="`turbofit models` names one of each family that is known",
    )


def inner_refusal(outer: str, inner: str) -> UsageError:
    """The error for a vision model that contains this language model."""
    names = {one: family.name for family in unplanned() for one in family.architectures}
    return UsageError(
        f"turbofit does not account for {outer} with {names.get(inner, inner[:80])} inside",
        hint="take a version with a language model that is known",
    )


def named_refusal(name: str) -> UsageError | None:
    """The error for a typed name or an architecture without an account; None if it is unknown."""
    return _longest_match(name, unplanned())


def purpose_refusal(name: str) -> UsageError | None:
    """The error for a model that does not chat, though its config.json is a chat model's.

    ``name`` is a hub id or the path of a folder; None if no word in it says so.
    """
    return _longest_match(name, [family for family in unplanned() if family.words])


def _longest_match(name: str, families: Iterable[UnsupportedFamily]) -> UsageError | None:
    typed = re.sub(r"[\s._-]+", "-", name.rstrip("/").rpartition("/")[2].lower())
    matches = [
        (len(known), family)
        for family in families
        for known in (*family.words, *family.names, *family.architectures)
        if (known in family.words and known in typed) or _begins(typed, known.lower())
    ]
    return max(matches, key=lambda pair: pair[0])[1].refusal() if matches else None


def _begins(typed: str, known: str) -> bool:
    """Whether a typed name is ``known`` or continues it: gemma-4-31b does so, gemma-4b does not."""
    pieces = re.split(r"[._-]+", known)
    end = r"(?![a-z0-9])" if known[-1].isdigit() else r"(?![a-z])"
    return re.match("-?".join(map(re.escape, pieces)) + end, typed) is not None

"""A message that tells its cause by itself: what the tables of such messages are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from turbofit.diagnose.answer import PhaseName

__all__ = ["MessageRule", "Rank"]

#: A cause ends a run; a consequence follows one; a notice harms nobody.
Rank = Literal["cause", "consequence", "notice"]


class MessageRule(Struct):
    """One message. ``planned``: a plan for the model and machine belongs to the answer.

    ``substrings``: each match has at least one of them, so that most lines are passed over without
    a regular expression. ``passing``: it harms nobody where the engine starts after it.
    """

    kind: str
    substrings: tuple[str, ...]
    pattern: str
    phase: PhaseName
    what: str
    why: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    rank: Rank = "cause"
    planned: bool = False
    passing: bool = False

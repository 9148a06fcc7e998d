"""Which names clients may give, and what the engine or the address calls the model instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from turbofit.core.json_types import JsonObject

__all__ = ["hold_name", "no_such_model", "unambiguous"]


def hold_name(names: Mapping[str, str], body: JsonObject) -> None:
    """Write the engine's own name of the model into a body that names it otherwise.

    Args:
        names: the engine's name by each that clients may give; empty where all are passed on.
        body: of a request; one that names no model stays as it is.

    Raises:
        Refusal: it names another model.
    """
    name = body.get("model")
    if not names or name is None:
        return
    if not isinstance(name, str) or name not in names:
        raise no_such_model(name, names)
    body["model"] = names[name]


def no_such_model(name: Any, known: Collection[str]) -> Refusal:
    """What a client is told that asks for another model."""
    return Refusal("model_not_found", name=str(name)[:80], known=", ".join(known), param="model")


def unambiguous(models: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The names of each model that mean no other one; its first name always does.

    Args:
        models: the names of each, the first of which no two share.
    """
    first = {names[0] for names in models}
    found = []
    for number, names in enumerate(models):
        others = {
            name for at, theirs in enumerate(models) if at != number for name in theirs
        } | first - {names[0]}
        kept = [name for name in names if name == names[0] or name not in others]
        found.append(tuple(dict.fromkeys(kept)))
    return found

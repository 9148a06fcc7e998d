"""Which names clients may give, and what the engine or the address calls the model instead."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from turbofit.core.json_types import Document, JsonObject
    from turbofit.gateway.http.refusals import Api

_CREATED: Final = int(time.time())


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
    models_of = Counter(name for names in models for name in set(names))
    return [
        tuple(name for name in dict.fromkeys(names) if name == names[0] or models_of[name] == 1)
        for names in models
    ]


class ModelCard(NamedTuple):
    """A name that clients may give, the model that it means, and where that stands."""

    name: str
    model: str
    facts: Document | None = None


def models_document(cards: Sequence[ModelCard], api: Api) -> Document:
    """The list of names in the form of its API; ``root`` is the model that a name means."""
    facts = [{} if card.facts is None else {"turbofit": card.facts} for card in cards]
    if api == "anthropic":
        data = [
            {"type": "model", "id": card.name, "display_name": card.model, **more}
            for card, more in zip(cards, facts, strict=True)
        ]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}
    return {
        "object": "list",
        "data": [
            {
                "id": card.name, "object": "model", "created": _CREATED, "owned_by": "lmdeploy",
                "root": card.model, "parent": None, "permission": [], **more,
            }
            for card, more in zip(cards, facts, strict=True)
        ],
    }  # fmt: skip

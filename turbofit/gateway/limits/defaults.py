"""A server's defaults for requests: sampling parameters, and arguments of the chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.messages import meant
from turbofit.core.struct import JsonObject, Struct
from turbofit.core.validation import Metavar, parsed
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.ranges import ANSWER_LENGTHS, RULES, check_template, hold_fields
from turbofit.gateway.limits.rules import Scope

_TEMPLATE: Final = "chat_template_kwargs"
#: Fields of the chat route that set an argument of the template. A client's field wins against a
#: default.
_ALSO_ARGUMENTS: Final = ("enable_thinking", "reasoning_effort")
_NO_RANGE: Final = Scope()
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")


def _hold_sampling(values: JsonObject, name: str) -> None:
    """Refuse sampling parameters that are unknown or outside their ranges.

    ``name`` is the option with the parameters.
    """
    for field in values.keys() - _SAMPLING:
        raise UsageError(f"{name} has no {field[:60]!r}", hint=meant(field, _SAMPLING))
    changes = hold_fields(RULES["chat"], values, _NO_RANGE)
    if changes:
        raise UsageError(
            f"{name} has a value that engines do not take: {', '.join(changes)}",
            hint="write the value after the arrow",
        )


def _json_object(hold: Callable[[JsonObject, str], None], text: str, name: str) -> JsonObject:
    """Return the JSON object in an option's text, after ``hold`` has checked or changed it."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UsageError(
            f"{name} {text[:60]!r} is no JSON object",
            hint=f"quote it: {name} '{{\"NAME\": VALUE}}'",
        )
    try:
        hold(values, name)
    except Refusal as refusal:
        raise UsageError(
            f"{name}: {refusal.message}", hint="change the value, or leave the option out"
        ) from None
    return values


#: Types of options that read the text of a command line.
JsonSampling = Annotated[
    dict[str, Any], parsed(partial(_json_object, _hold_sampling)), Metavar("JSON")
]
JsonArguments = Annotated[
    dict[str, Any],
    parsed(partial(_json_object, lambda values, _: check_template(values))),
    Metavar("JSON"),
]


class Defaults(Struct):
    """Default arguments of the chat ``template``, and default ``sampling`` parameters."""

    template: dict[str, Any] = msgspec.field(default_factory=dict)
    sampling: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        parts = [f"{name} {value}" for name, value in self.sampling.items()]
        if self.template:
            parts.append(f"{_TEMPLATE} {json.dumps(self.template)}")
        return [f"defaults of a request: {', '.join(parts)}"] if parts else []

    def complete(self, kind: str, body: JsonObject) -> None:
        """Add the default values to a body, in place.

        A field gets its default if the route takes the field, and the body has no value or a null
        for it. ``kind`` is the route's kind.
        """
        rules = RULES.get(kind, {})
        for name, value in self.sampling.items():
            names = ANSWER_LENGTHS.get(kind, ()) if name == "max_tokens" else (name,)
            given_here = any(body.get(field) is not None for field in names)
            if not given_here and names and _takes(kind, names[-1], value):
                body[names[-1]] = value
        given = body.get(_TEMPLATE) or {}
        if self.template and _TEMPLATE in rules and isinstance(given, dict):
            # A client's field that sets an argument wins against the default argument.
            beside = {field for field in _ALSO_ARGUMENTS if body.get(field) is not None}
            under = {name: self.template[name] for name in self.template.keys() - beside}
            body[_TEMPLATE] = {**under, **given}


def _takes(kind: str, name: str, value: Any) -> bool:
    """Return whether a route has the field ``name``, and ``value`` is in the field's range."""
    rule = RULES.get(kind, {}).get(name)
    try:
        return rule is not None and rule.hold(name, value, _NO_RANGE) is not None
    except Refusal:
        return False

"""The rules of `ranges.RULES`; each rule brings the value of a field into a range.

The functions are pure. Pydantic reads values here as in LMDeploy's request models (``"3"`` and
``3.0`` are 3). Values are passed on as plain numbers, so an engine never sees another spelling.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias, TypeVar

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from turbofit.core.struct import Struct
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import shown

#: A number, or the name of a number of the plan.
Most: TypeAlias = int | Literal["vocabulary", "context"]

_Value = TypeVar("_Value")

_BOOLEAN: Final = TypeAdapter(bool)
_INTEGER: Final = TypeAdapter(int)
_FLOAT: Final = TypeAdapter[float](FiniteFloat)
#: A stop string of fewer characters is in so many tokens that LMDeploy decodes thousands of tokens.
_SHORT: Final = 3


class Scope(Struct):
    """The plan's numbers that rules need; an unknown number is 0, and limits nothing.

    ``vocabulary``: the number of tokens that the model knows. ``context``: the tokens of the
    longest request.
    """

    engine: str = ""
    vocabulary: int = 0
    context: int = 0

    def number(self, most: Most) -> int:
        """Return a limit as a number; 0 if the plan does not know this number."""
        if isinstance(most, int):
            return most
        return self.vocabulary if most == "vocabulary" else self.context


class Rule(Struct):
    """The rule of one field; this base class changes no value.

    If not ``passed``, the field is left out of the body.
    """

    passed: bool = True

    def hold(self, name: str, value: Any, scope: Scope) -> Any:  # noqa: ARG002 - others need them
        """Return the value to pass on, unchanged or moved into the range, or raise a `Refusal`."""
        return value


class ShortRule(Rule):
    """A rule that accepts any value, except a list or object of more than ``most`` items.

    A longer list is refused, since LMDeploy would write an error text for each wrong item.
    """

    most: int

    def hold(self, name: str, value: Any, scope: Scope) -> Any:  # noqa: ARG002 - see Rule
        if isinstance(value, list | dict) and len(value) > self.most:
            raise refused(name, f"has {len(value)} items, the limit is {self.most}")
        return value


class RefusedRule(Rule):
    """A rule that refuses every value; ``why`` follows the field's name in the message."""

    why: str

    def hold(self, name: str, value: Any, scope: Scope) -> Any:  # noqa: ARG002 - see Rule
        raise refused(name, self.why)


class Flag(Rule):
    """A rule for true or false, in any spelling that pydantic reads, such as ``"yes"`` and 1."""

    def hold(self, name: str, value: Any, scope: Scope) -> bool:  # noqa: ARG002 - see Rule
        return _read(_BOOLEAN, name, value, "neither true nor false")


class IntegerRule(Rule):
    """A rule for a whole number from ``least`` to ``most``.

    ``over`` says what happens to a larger number: it is refused, or lowered to ``most``. With
    ``wrap``, for a seed, any number is taken modulo ``most`` + 1.
    """

    least: int = 0
    most: Most = (1 << 31) - 1
    over: Literal["refuse", "lower", "wrap"] = "refuse"

    def hold(self, name: str, value: Any, scope: Scope) -> int:
        number, most = _whole(name, value), scope.number(self.most)
        between = f"between {self.least} and {most}"
        if most == 0 and not isinstance(self.most, int):  # the plan's number is unknown
            most, between = max(number, self.least), f"at least {self.least}"
        if self.over == "wrap":
            return number % (most + 1)
        if number < self.least or (number > most and self.over != "lower"):
            raise refused(name, f"is {shown(number)}, it must be {between}")
        return min(number, most)


class Number(Rule):
    """A rule for a number from ``least`` to ``most``.

    ``above``: ``least`` itself is not allowed. ``floor``: positive numbers below ``floor`` are
    raised to ``floor``. ``clamp``: a number outside the range becomes the nearer end of the range.
    """

    least: float
    most: float
    above: bool = False
    floor: float = 0.0
    clamp: bool = False

    def hold(self, name: str, value: Any, scope: Scope) -> float:  # noqa: ARG002 - see Rule
        number = _read(_FLOAT, name, value, "no finite number")
        if self.clamp:
            number = min(max(number, self.least), self.most)
        if number < self.least or number > self.most or (self.above and number == self.least):
            edge = "above" if self.above else "at least"
            between = f"it must be {edge} {self.least:g} and at most {self.most:g}"
            raise refused(name, f"is {shown(number)}, {between}")
        if 0 < number < self.floor:
            number = self.floor
        return int(value) if isinstance(value, int) and value == number else number


class TextRule(Rule):
    """A rule for a string of at most ``most`` characters.

    If ``most`` is None, only the limit of all text in a body applies. ``empty`` says whether the
    string may be empty.
    """

    most: int | None = None
    empty: bool = True

    def hold(self, name: str, value: Any, scope: Scope) -> str:  # noqa: ARG002 - see Rule
        if not isinstance(value, str):
            raise refused(name, "is no string")
        if not value and not self.empty:
            raise refused(name, "is empty")
        if self.most is not None and len(value) > self.most:
            raise refused(name, f"has {len(value)} characters, the limit is {self.most}")
        return value


class Texts(Rule):
    """A rule for a string, or a list of at most ``most`` strings; no string may be empty.

    A string has up to ``characters`` characters, and all strings together have up to ``together``.
    Up to ``short`` strings may have only one or two characters. An empty list becomes None.
    """

    most: int | None = None
    characters: int | None = None
    short: int | None = None
    together: int | None = None

    def hold(self, name: str, value: Any, scope: Scope) -> Any:
        texts = value if isinstance(value, list) else [value]
        if self.most is not None and len(texts) > self.most:
            raise refused(name, f"has {len(texts)} strings, the limit is {self.most}")
        rule = TextRule(most=self.characters, empty=False)
        for text in texts:
            rule.hold(name, text, scope)
        short = sum(len(text) < _SHORT for text in texts)
        if self.short is not None and short > self.short:
            strings = f"{short} strings of less than {_SHORT} characters"
            raise refused(name, f"has {strings}, the limit is {self.short}")
        together = sum(map(len, texts))
        if self.together is not None and together > self.together:
            raise refused(name, f"has {together} characters together, the limit is {self.together}")
        return value or None


class Ids(Rule):
    """A rule for a list of at most ``most`` token ids, all in the vocabulary."""

    most: Most

    def hold(self, name: str, value: Any, scope: Scope) -> list[int]:
        if not isinstance(value, list):
            raise refused(name, "is no list of token ids")
        most = scope.number(self.most)
        if 0 < most < len(value):
            raise refused(name, f"has {len(value)} token ids, the limit is {most}")
        ids = value
        if not all(type(item) is int for item in value):
            ids = [_whole(name, item) for item in value]
        if ids:
            _within_vocabulary(name, min(ids), max(ids), scope)
        return ids


class Biases(Rule):
    """A rule for an object of at most ``most`` numbers by token id.

    Each number is moved into the range from -``bias`` to ``bias``.
    """

    most: int
    bias: float

    def hold(self, name: str, value: Any, scope: Scope) -> dict[str, float]:
        if not isinstance(value, dict):
            raise refused(name, "is no object of token ids and numbers")
        if len(value) > self.most:
            raise refused(name, f"has {len(value)} token ids, the limit is {self.most}")
        number = Number(least=-self.bias, most=self.bias, clamp=True)
        biases = {
            _whole(name, token): number.hold(name, bias, scope) for token, bias in value.items()
        }
        if biases:
            _within_vocabulary(name, min(biases), max(biases), scope)
        return {str(token): bias for token, bias in biases.items()}


def refused(name: str, what: str) -> Refusal:
    """Return the refusal of the field ``name``; ``what`` follows the name in the message."""
    return Refusal("bad_request:field", what=what, param=name)


def _within_vocabulary(name: str, least: int, most: int, scope: Scope) -> None:
    """Refuse token ids from ``least`` to ``most`` unless all are in the model's vocabulary."""
    last = scope.vocabulary - 1
    if least < 0 or 0 <= last < most:
        wrong = least if least < 0 else most
        allowed = f"between 0 and {last}" if last >= 0 else "at least 0"
        raise refused(name, f"has token id {shown(wrong)}, ids are {allowed}")


def _whole(name: str, value: Any) -> int:
    return _read(_INTEGER, name, value, "no whole number")


def _read(adapter: TypeAdapter[_Value], name: str, value: Any, mismatch: str) -> _Value:
    """Return a value as pydantic reads it; ``mismatch`` says what a refused value is not."""
    try:
        return adapter.validate_python(value)
    except ValidationError:
        raise refused(name, f"is {shown(value)}, {mismatch}") from None

"""Reads a checkpoint's JSON files: each value is checked for its type and its range."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from turbofit.core.errors import UsageError
from turbofit.core.model import Dtype
from turbofit.core.struct import JsonObject

#: The most bytes of JSON that are read; the largest published config.json is below 1 MiB.
LARGEST_JSON: Final = 16 << 20

#: The largest valid dimension.
_LARGEST_DIM: Final = 1 << 24

_DTYPES: Final[dict[str, Dtype]] = {
    "float16": "float16", "half": "float16", "fp16": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float32": "float32", "float": "float32", "fp32": "float32",
}  # fmt: skip
_HINT: Final = "check the checkpoint's files, or name a model from `turbofit models`"

D = TypeVar("D")
T = TypeVar("T")


def parse_json(data: bytes, what: str, hint: str = _HINT) -> Section:
    """Parse one JSON object; errors call the object ``what``, and have the hint ``hint``.

    Raises:
        UsageError: the data is not a JSON object.
    """
    import json

    try:
        # The standard reader accepts NaN and Infinity, which published configs contain.
        value = json.loads(data.decode("utf-8-sig"))
        if b"\\u" in data:
            # The reader accepts half of a surrogate pair, which no plan could contain.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{what} is not JSON: {str(exc)[:200]}", hint=hint) from None
    if not isinstance(value, dict):
        raise UsageError(f"{what} is not a JSON object", hint=hint)
    return Section(value, what)


class Section:
    """One JSON object; errors call the object ``what``, e.g. ``config.json: vision_config``.

    A value of the wrong type is an error; a missing list is an empty tuple.
    """

    def __init__(self, values: JsonObject, what: str) -> None:
        self.values = values
        self.what = what

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = _LARGEST_DIM
    ) -> int:
        """Return the integer at ``key``; ``default`` if the key is missing or null.

        A list of equal integers, such as ``[448, 448]``, counts as one integer.

        Raises:
            UsageError: the value is missing and has no default, is not an integer, or is not within
                ``low`` to ``high``.
        """
        value = self.values.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value[:4]):
            value = value[0]
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"is not an integer but {_short_text(value)}")
        if not low <= value <= high:
            raise self.error(key, f"is {_short_text(value)}, not within {low}..{high}")
        return value

    def divisor(
        self, key: str, whole: int, what: str, default: int | None = None, *, high: int = 1 << 12
    ) -> int:
        """Return the integer at ``key``, which must divide ``whole`` without a remainder.

        ``what`` are the things that ``whole`` counts, such as heads; the error names them.
        """
        value = self.integer(key, default, high=high)
        self.refuse_if(whole % value, key, f"{value} does not divide {whole} {what}")
        return value

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """Return the number at ``key``; ``default`` if the key is missing or null.

        Raises:
            UsageError: the value is not a number, or is out of bounds.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"is not a number but {_short_text(value)}")
        if not low <= value <= high:
            raise self.error(key, f"is {_short_text(value)}, not within {low}..{high}")
        return float(value)

    def _typed(self, key: str, kind: type[T], what: str) -> T | None:
        """Return the value at ``key``, which must be a ``kind``; None if the key is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise self.error(key, f"is not {what} but {_short_text(value)}")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._typed(key, bool, "true or false")
        return default if value is None else value

    def string(self, key: str, default: D) -> str | D:
        value = self._typed(key, str, "a string")
        return default if value is None else value

    def strings(self, key: str) -> tuple[str, ...]:
        return self._items(key, str, "strings")

    def integers(self, key: str) -> tuple[int, ...]:
        return self._items(key, int, "integers")

    def _items(self, key: str, kind: type[T], what: str) -> tuple[T, ...]:
        """Return the list at ``key``, whose items must be of type ``kind``."""
        value = self._typed(key, list, f"a list of {what}") or []
        if not all(type(item) is kind for item in value):
            raise self.error(key, f"is not a list of {what}")
        return tuple(value)

    def section(self, key: str) -> Section | None:
        """Return a nested object; None if the key is missing."""
        value = self._typed(key, dict, "an object")
        return None if value is None else Section(value, f"{self.what}: {key}")

    def part(self, key: str) -> Section:
        """Return a nested object; an empty object if the key is missing."""
        return self.section(key) or Section({}, f"{self.what}: {key}")

    def required(self, key: str) -> Section:
        """Return a nested object that must be present.

        Raises:
            UsageError: the key is missing.
        """
        section = self.section(key)
        if section is None:
            raise self.error(key, "is missing")
        return section

    def refuse_if(self, wrong: object, key: str, problem: str) -> None:
        """Refuse the file if ``wrong`` is true; the error names the key and the problem.

        Raises:
            UsageError: ``wrong`` is true.
        """
        if wrong:
            raise self.error(key, problem)

    def error(self, key: str, problem: str) -> UsageError:
        """Make an error that names this object, the key and the problem."""
        return UsageError(f"{self.what}: {key} {problem}", hint=_HINT)


def dtype_of(section: Section) -> Dtype | None:
    """Return the ``dtype`` or ``torch_dtype`` of a config; None if it is missing or unknown."""
    for key in ("dtype", "torch_dtype"):
        value = section.values.get(key)
        if isinstance(value, str):
            return _DTYPES.get(value.rpartition(".")[2])
    return None


def _short_text(value: Any) -> str:
    """Return a short text for a value from a file; an integer from a file may have any length."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "an absurd number"
    return repr(value)[:60]

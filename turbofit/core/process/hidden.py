"""Secrets in command lines and texts, which turbofit hides in all that it writes or prints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: The text that replaces a secret.
HIDDEN: Final = "***"
#: Options and variables whose value is a secret; argparse accepts LMDeploy's option shortened, too.
_NAME: Final = re.compile(r"(?i)(?:token|key|password|secret)s?$|^--api(?:-(?:ke?)?)?$|^bearer$")
#: Characters around names and values in a header or a JSON text, and the ends of a name there.
_QUOTES: Final = "{}'\",:"
_BEFORE_SECRET: Final = (":", "Bearer", "bearer")
#: A count of tokens: a few digits, fewer than a key has.
_COUNT: Final = re.compile(r"(?i)\d[\d.,_]{,11}[km]?i?")
#: The user name and password in a URL.
_USER: Final = re.compile(r"(?<=://)[^\s/@]+(?=@)")
#: The shortest secret, in characters, that is searched for in a text.
_SHORTEST: Final = 4


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line, with ``***`` in place of each secret."""
    return [shown for shown, _ in _split(words)]


def hide_secrets(text: str, words: Sequence[str], environ: Mapping[str, str]) -> str:
    """A text in which the secrets of a command line and of an environment are hidden.

    It misses secrets of up to three characters, and secrets that were read from a file.
    """
    secrets = {secret for _, found in _split(words) for secret in found}
    for name, value in environ.items():
        if _NAME.search(name):
            secrets.update(value.split(","))
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _USER.sub(HIDDEN, text)


def _split(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each word as it may be shown, with the secrets in it.

    The value of a secret option stands behind ``=`` or in the next word; an option of several
    values, such as LMDeploy's ``--api-keys``, takes all words up to the next option. A pasted line,
    a header or a JSON text is one word that contains several.
    """
    next_is_one = others_are = False
    for word in words:
        within = list(_split(word.split())) if len(word.split()) > 1 else []
        secrets = [secret for _, found in within for secret in found]
        name, equals, value = word.partition("=")
        if next_is_one or (others_are and not word.startswith("-")):
            next_is_one = False
            counts = _COUNT.fullmatch(word) and others_are
            yield (word, []) if counts else (HIDDEN, [word, word.strip(_QUOTES), *secrets])
            continue
        field = name.strip(_QUOTES)
        is_one = _NAME.search(field) is not None and len(field.split()) < 2
        others_are = is_one and field[:1] == "-" and name.endswith("s")
        next_is_one = is_one and not equals and (field[:1] == "-" or name.endswith(_BEFORE_SECRET))
        if is_one and equals:
            yield f"{name}={HIDDEN}", [value, value.strip(_QUOTES), *secrets]
        elif within:
            yield " ".join(shown for shown, _ in within), secrets
        else:
            yield _USER.sub(HIDDEN, word), ["".join(_USER.findall(word))]

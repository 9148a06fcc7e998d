"""Hides the secrets of a command line in all that turbofit writes or prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from turbofit.logs.keys import HIDDEN, USER

#: A word with its secrets hidden, and the list of these secrets.
Shown = tuple[str, list[str]]

#: Options and variables whose value is a secret; LMDeploy's ``--api-keys`` may be shortened.
_NAME: Final = re.compile(r"(?i)(?:token|key|password|secret)s?$|^--api(?:-(?:ke?)?)?$|^bearer$")
#: A number of tokens, as of ``--max-tokens``: a few digits, fewer than a token of access has.
_COUNT: Final = re.compile(r"(?i)\d[\d.,_]{,11}[km]?i?")
#: Options whose value is a text for a model.
_TEXT: Final = re.compile(
    r"--(?:prompt|system|default-(?:chat-template-kwargs|sampling))", re.IGNORECASE
)
#: Characters around names and values in a header or a JSON text.
_QUOTES: Final = "{}'\",:"
#: Ends of a word whose secret is the next word, though the word is no option.
_BEFORE_SECRET: Final = (":", "Bearer", "bearer")
#: The shortest secret, in characters, that is searched for in a text.
_SHORTEST: Final = 4


def without_secrets(words: Sequence[str], *, texts: bool = False) -> list[str]:
    """Return the words of a command line with ``***`` in place of each secret.

    ``texts``: texts for a model, such as a prompt, are hidden too.
    """
    return [shown for shown, _ in _split(words, texts=texts)]


def hide_secrets(text: str, words: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return a text with ``***`` in place of the secrets of a command line and an environment.

    The command line's texts for a model are hidden, too. Secrets of up to three characters, and
    secrets from a file, stay.
    """
    secrets = {secret for _, found in _split(words, texts=True) for secret in found}
    for name, value in environ.items():
        if _NAME.search(name):
            secrets.update(map(str.strip, value.split(",")))
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return USER.sub(HIDDEN, text)


def _split(words: Sequence[str], *, texts: bool = False) -> Iterator[Shown]:
    """Yield each word with its secrets hidden, and a list of these secrets.

    The value of a secret option follows ``=`` or is the next word. All words up to the next option
    are values of an option in the plural, such as LMDeploy's ``--api-keys``. A number after a name
    such as ``--max-tokens`` is no secret. A word may be a pasted command line, a header or a JSON
    text, and may contain several secrets.
    """
    next_is_secret = rest_are_secrets = may_be_count = False
    for word in words:
        if may_be_count and _COUNT.fullmatch(word.strip(_QUOTES)):
            next_is_secret = rest_are_secrets = may_be_count = False
            yield word, []
            continue
        if next_is_secret or (rest_are_secrets and not word.startswith("-")):
            next_is_secret = may_be_count = False
            yield HIDDEN, [word, word.strip(_QUOTES), *_secrets(word)]
            continue
        name, equals, value = word.partition("=")
        field = name.strip(_QUOTES)
        names_secret = _NAME.search(field) is not None and len(field.split()) < 2
        may_be_count = names_secret and field.lower().endswith("tokens")
        names_secret = names_secret and not (may_be_count and _COUNT.fullmatch(value))
        is_secret = names_secret or (texts and bool(_TEXT.fullmatch(field)))
        rest_are_secrets = is_secret and field[:1] == "-" and name.endswith("s")
        awaits = field[:1] == "-" or name.endswith(_BEFORE_SECRET)
        next_is_secret = is_secret and awaits and not equals + value
        has_value = is_secret and bool(equals + value)
        yield _named(name + equals, value, word) if has_value else _plain(word)


def _inside(word: str) -> list[Shown]:
    """Return the words of a text with their secrets hidden; an empty list for a single word."""
    parts = word.split()
    return list(_split(parts)) if len(parts) > 1 else []


def _secrets(word: str) -> list[str]:
    return [secret for _, found in _inside(word) for secret in found]


def _named(name: str, value: str, word: str) -> Shown:
    """Hide the value in a word that contains both the secret's name and its value."""
    return f"{name}{HIDDEN}", [value, value.strip(_QUOTES), *_secrets(word)]


def _plain(word: str) -> Shown:
    """Hide the secrets inside a text of several words, and the user in a URL."""
    if inside := _inside(word):
        return " ".join(shown for shown, _ in inside), _secrets(word)
    return USER.sub(HIDDEN, word), ["".join(USER.findall(word))]

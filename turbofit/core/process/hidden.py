"""Secrets in command lines and in texts: nothing that turbofit writes or prints shows one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    #: A word as it is shown, and the secrets in it.
    Shown = tuple[str, list[str]]

#: What stands in the place of a secret.
HIDDEN: Final = "***"
#: Options and variables whose value is a secret; argparse takes LMDeploy's by its beginning, too.
_NAME: Final = re.compile(r"(?i)(?:token|key|password|secret)s?$|^--api(?:-(?:ke?)?)?$|^bearer$")
#: What a header and a JSON text have around names and values, and what a name ends with there.
_QUOTES: Final = "{}'\",:"
_BEFORE_SECRET: Final = (":", "Bearer", "bearer")
#: A count of tokens: digits, of which a key has more.
_COUNT: Final = re.compile(r"(?i)\d[\d.,_]{,11}[km]?i?")
#: Who asks, in an address.
_USER: Final = re.compile(r"(?<=://)[^\s/@]+(?=@)")
#: sshpass's option, whose value may stand in the same word.
_PASSWORD: Final = "-p"
#: Characters of the shortest secret that is looked for in a text.
_SHORTEST: Final = 4

#: Keys that a line may hold, by their beginnings, and what follows the words for one.
_KEY: Final = re.compile(
    r"(?<=://)[^\s/@]+(?=@)|\b(?:hf_|ghp_|AKIA)[A-Za-z0-9]{12,}"
    r"|\b(?:sk-|github_pat_|glpat-|xox[bp]-)[\w-]{12,}"
    r"|(?<=Bearer )[^\s'\"]+|(?<=Basic )[\w+/=]{8,}"
    r"|(?i:(?<=token=)|(?<=password=)|(?<=secret=))[\w.~+/-]{8,}"
    r"|(?i:(?<=api_key)|(?<=api-key)|(?<=apikey)|(?<=password))['\"]?[:=] ?['\"]?[\w.~+/-]{6,}"
)


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line, with ``***`` in the place of each secret."""
    return [shown for shown, _ in _split(words)]


def hide_secrets(text: str, words: Sequence[str], environ: Mapping[str, str]) -> str:
    """A text without what is a secret in a command line or an environment.

    Under: a secret of three characters, or one that was read from a file.
    """
    secrets = {secret for _, found in _split(words) for secret in found}
    for name, value in environ.items():
        if _NAME.search(name):
            secrets.update(value.split(","))
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _USER.sub(HIDDEN, text)


def without_keys(text: str) -> str:
    """A line of a log, with ``***`` in the place of each key."""
    return _KEY.sub("***", text)


def _split(words: Sequence[str]) -> Iterator[Shown]:
    """Each word as it is shown, and the secrets in it.

    A secret's option may have its value behind ``=`` or in the next word, and one of several, such
    as LMDeploy's ``--api-keys``, in all words up to the next option. A pasted line is one word of
    many, and so is a header or a JSON text.
    """
    next_is_one = others_are = passes = False
    for word in words:
        if next_is_one or (others_are and not word.startswith("-")):
            next_is_one = False
            yield _secret(word, several=others_are)
            continue
        passes = passes or word.endswith("sshpass")
        name, equals, value = _parts(word, passes=passes)
        field = name.strip(_QUOTES)
        is_one = _is_name(field, passes=passes)
        others_are = is_one and field[:1] == "-" and name.endswith("s")
        awaits = field[:1] == "-" or name.endswith(_BEFORE_SECRET)
        next_is_one = is_one and awaits and not equals + value
        has_one = is_one and bool(equals + value)
        yield _named(name + equals, value, word) if has_one else _plain(word)


def _parts(word: str, *, passes: bool) -> tuple[str, str, str]:
    """A word's name, the sign behind it, and its value; sshpass takes its own without a sign."""
    if passes and word.startswith(_PASSWORD):
        return _PASSWORD, "", word.removeprefix(_PASSWORD)
    return word.partition("=")


def _is_name(field: str, *, passes: bool) -> bool:
    """Whether a secret belongs to the name."""
    named = _NAME.search(field) is not None and len(field.split()) < 2
    return named or (passes and field == _PASSWORD)


def _inside(word: str) -> list[Shown]:
    """The words of a text; nothing for a single word."""
    parts = word.split()
    return list(_split(parts)) if len(parts) > 1 else []


def _secrets(word: str) -> list[str]:
    return [secret for _, found in _inside(word) for secret in found]


def _secret(word: str, *, several: bool) -> Shown:
    """A word that stands where a secret does; one of several may be a count of tokens."""
    if several and _COUNT.fullmatch(word):
        return word, []
    return HIDDEN, [word, word.strip(_QUOTES), *_secrets(word)]


def _named(name: str, value: str, word: str) -> Shown:
    """A word with a secret behind its name."""
    return f"{name}{HIDDEN}", [value, value.strip(_QUOTES), *_secrets(word)]


def _plain(word: str) -> Shown:
    """A word that is none: a text may have some, and an address a user."""
    if inside := _inside(word):
        return " ".join(shown for shown, _ in inside), _secrets(word)
    return _USER.sub(HIDDEN, word), ["".join(_USER.findall(word))]

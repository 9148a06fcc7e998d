"""Hides keys in the lines of logs."""

from __future__ import annotations

import re
from typing import Final

#: The text that replaces a secret.
HIDDEN: Final = "***"
#: The user name and password in a URL.
USER: Final = re.compile(r"(?<=://)[^\s/@]+(?=@)")
#: Keys in a line: texts with the beginning of a key, and texts after a word such as ``token=``.
_KEY: Final = re.compile(
    USER.pattern + r"|\b(?:hf_|ghp_|AKIA)[A-Za-z0-9]{12,}"
    r"|\b(?:sk-|github_pat_|glpat-|xox[bp]-)[\w-]{12,}"
    r"|(?<=Bearer )[^\s'\"]+|(?<=Basic )[\w+/=]{8,}"
    r"|(?i:(?<=token=)|(?<=password=)|(?<=secret=))[\w.~+/-]{8,}"
    r"|(?i:(?<=api_key)|(?<=api-key)|(?<=apikey)|(?<=password))['\"]?[:=] ?['\"]?[\w.~+/-]{6,}"
)


def without_keys(text: str) -> str:
    """Return a line of a log with ``***`` in place of each key."""
    return _KEY.sub(HIDDEN, text)

"""Whether a model thinks before it answers, unless a request tells it not to.

Then its answers have thousands of tokens where others have hundreds.
"""

from __future__ import annotations

import re
from typing import Final

#: Names of models whose own chat templates let them think by default.
_THINKING: Final = re.compile(
    r"thinking|gpt-oss|deepseek-r1|glm-4\.[5-9]|kimi-k2\.[56]|intern-s1|qwen3(\.\d)?-\d",
    re.IGNORECASE,
)
#: Names of their variants that do not.
_NOT: Final = re.compile(r"instruct|coder|qwen3\.5-(0\.8|2)b", re.IGNORECASE)
#: What a template asks where thinking is on, and where it is off, until a request says otherwise.
_ON: Final = ("enable_thinking is false", "not enable_thinking")
_OFF: Final = ("enable_thinking is true",)


def thinks(name: str, template: str = "") -> bool:
    """Return whether a model thinks by default: by its chat template, else by its name."""
    if any(question in template for question in _ON):
        return True
    if any(question in template for question in _OFF):
        return False
    return bool(_THINKING.search(name)) and not _NOT.search(name)

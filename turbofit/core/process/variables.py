"""turbofit's own environment variables, validated; `docs/environment.md` lists them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from turbofit.core.errors import UsageError

#: Variables of the keys that a server accepts; a client sends the first key. `keys_in` reads them.
SERVER_KEYS: Final = ("TURBOFIT_API_KEY", "TURBOFIT_API_KEYS")
#: Variables of the keys that the servers behind a gateway want. `keys_in` reads them.
UPSTREAM_KEYS: Final = ("TURBOFIT_UPSTREAM_KEY", "TURBOFIT_UPSTREAM_KEYS")
_LEASES: Final = "TURBOFIT_LEASES"


def keys_in(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys in the first of these environment variables that has a key.

    Commas separate keys. Messages do not show a key, since it is a secret.

    Raises:
        UsageError: a character of a key is no visible ASCII character, or a variable has commas
            alone: its keys are missing, and a server would be open to all.
    """
    for name in names:
        text = os.environ.get(name, "").strip()
        keys = tuple(filter(None, map(str.strip, text.split(","))))
        for key in keys:
            bad = next((place for place, char in enumerate(key, 1) if not "!" <= char <= "~"), 0)
            if bad:
                raise UsageError(
                    f"{name}: character {bad} of a key of {len(key)} is no visible ASCII"
                    " character, which an HTTP header cannot carry",
                    hint="use letters, digits and -_.~+/=; commas separate keys",
                )
        if keys:
            return keys
        if text:
            raise UsageError(f"{name} has no key", hint=f"write a key into it, or unset {name}")
    return ()


def leases_folder() -> Path | None:
    """Return the folder that ``TURBOFIT_LEASES`` names; None if the variable is unset or empty.

    Raises:
        UsageError: the path is not absolute, or is the path of a file.
    """
    text = os.environ.get(_LEASES, "").strip()
    if not text:
        return None
    folder = Path(os.path.expanduser(text))
    if not folder.is_absolute() or os.path.isfile(folder):
        what = "a file" if os.path.isfile(folder) else "not an absolute path"
        raise UsageError(
            f"{_LEASES} {text!r} is {what}: all turbofits of a machine share this folder",
            hint=f"give a folder such as {_LEASES}=/tmp/turbofit-leases, the same one everywhere",
        )
    return folder

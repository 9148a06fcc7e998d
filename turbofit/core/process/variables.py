"""turbofit's own environment variables, validated; `docs/environment.md` lists them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from turbofit.core.errors import UsageError
from turbofit.core.process.variable_names import NAMES, PREFIX
from turbofit.core.validation import Validated, parsed


def _key(text: str, name: str) -> str:
    """Check a key of the variable ``name``, and return it without white space around.

    Messages do not show the key, since it is a secret.

    Raises:
        UsageError: a character of the key is no visible ASCII character.
    """
    key = text.strip()
    bad = next((place for place, char in enumerate(key, 1) if not "!" <= char <= "~"), None)
    if bad is not None:
        raise UsageError(
            f"{name}: character {bad} of a key of {len(key)} is no visible ASCII character, which"
            " an HTTP header cannot carry",
            hint="use letters, digits and -_.~+/=; commas separate the keys of TURBOFIT_API_KEYS",
        )
    return key


def _keys(text: str, name: str) -> tuple[str, ...]:
    return tuple(key for part in text.split(",") if (key := _key(part, name)))


def _folder(text: str, name: str) -> Path:
    folder = Path(os.path.expanduser(text))
    if not folder.is_absolute() or os.path.isfile(folder):
        what = "a file" if os.path.isfile(folder) else "not an absolute path"
        raise UsageError(
            f"{name} {text!r} is {what}: all turbofits of a machine meet in this folder",
            hint=f"give a folder such as {name}=/tmp/turbofit-leases, the same one everywhere",
        )
    return folder


class EnvironmentVariables(Validated):
    """The variables that people set; an unset or empty one has its default."""

    api_keys: Annotated[tuple[str, ...], parsed(_keys)] = ()
    api_key: Annotated[str, parsed(_key)] = ""
    upstream_keys: Annotated[tuple[str, ...], parsed(_keys)] = ()
    upstream_key: Annotated[str, parsed(_key)] = ""
    leases: Annotated[Path | None, parsed(_folder)] = None
    node_spec: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a server accepts; a client sends the first."""
        return (self.api_key,) if self.api_key else self.api_keys


def variables(environ: Mapping[str, str] | None = None) -> EnvironmentVariables:
    """Read turbofit's variables from an environment; None is this process's environment.

    Raises:
        UsageError: a value is not valid.
    """
    environ = os.environ if environ is None else environ
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name in NAMES
        if (value := environ.get(name, "")).strip()
    }
    return EnvironmentVariables.of_options(given, lambda field: PREFIX + field.upper())

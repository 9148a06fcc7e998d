"""Errors that a person can cause or fix; each names its cause, and has a hint and an exit code.

The exit code stands behind the name, if it differs from the class above::

    TurbofitError            1
        UsageError           2
        DoesNotFitError      3
            NoKernelError
            UnservedError
        MachineError         4
            NoGpuError
        LaunchError          5
        OutOfMemoryError     6
        PackageError         7

Rooms below have classes of their own under these, such as `model.hub.HubUnreachableError` under
`UsageError`. Any other exception is a bug in turbofit, and ends the process with exit code 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from keyword import iskeyword
from typing import Any, ClassVar, Final

#: A marked option in a text, with its value: `--on SPEC`. The command line and Python spell marked
#: options in different ways.
_MARKED: Final = re.compile("`--([a-z][a-z-]*)(?: ([^`]*))?`")


def spelled_in_shell(text: str) -> str:
    """Return a text with its marked options as people type them: ``--on SPEC``."""
    return _MARKED.sub(lambda mark: mark[0].strip("`"), text)


def _keyword(mark: re.Match[str]) -> str:
    """Return a marked option as a keyword in Python: ``tp``, ``tp=4``, ``on=SPEC``, ``on="l4"``."""
    name, value = _field(mark), mark[2] or ""
    counts = value.isdigit() and name != "on"  # a card may have a name of digits, as 4090 has
    if not value or counts or value.isupper():
        return "=".join(filter(None, (name, value)))
    return f'{name}="{value}"'


def _field(mark: re.Match[str]) -> str:
    name = mark[1].replace("-", "_")
    return f"{name}_" if iskeyword(name) else name


def option_of(setting: str) -> str:
    """Return the command-line option of a setting, from the setting's name."""
    return "--" + setting.rstrip("_").replace("_", "-")


class TurbofitError(Exception):
    """Base of every expected failure.

    Args:
        message: one line that names the cause.
        hint: one line that says how to remove the cause.
        options: the fields of the wrong options; the options that both lines mark are added to
            them. A mark is an option with its value in back ticks: ```--on SPEC```.

    The lines spell marked options for the command line; `name_keywords` spells them for Python.
    Text without a mark, such as a command of `turbofit`, stays unchanged.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str, options: Sequence[str] = ()) -> None:
        # White space is folded, since a quoted file or exception must not break the line.
        self._marked = [" ".join(message.split()), " ".join(hint.split())]
        named = map(_field, _MARKED.finditer(" ".join(self._marked)))
        self.options = tuple(dict.fromkeys([*options, *named]))
        self._set_lines(*map(spelled_in_shell, self._marked))

    def _set_lines(self, message: str, hint: str) -> None:
        self.message, self.hint = message, hint
        super().__init__(message)
        self.__notes__ = [f"hint: {hint}"]  # a traceback shows notes from Python 3.11 on

    def name_keywords(self) -> None:
        """Spell the marked options as keywords: ``tp=4`` instead of ``--tp 4``."""
        self._set_lines(*(_MARKED.sub(_keyword, line) for line in self._marked))

    def to_dict(self) -> dict[str, Any]:
        """Return the error as the JSON document that ``--json`` prints."""
        names = ("kind", "message", "hint", "exit_code")
        return {"error": {name: getattr(self, name) for name in names}}


class UsageError(TurbofitError):
    """An option, SPEC, file or model name is wrong."""

    exit_code = 2
    kind = "usage"


class DoesNotFitError(TurbofitError):
    """The model cannot serve: the plan does not fit, or the engine dies or hangs."""

    exit_code = 3
    kind = "does_not_fit"


class NoKernelError(DoesNotFitError):
    """The engine has no kernel that the model needs on this card."""

    kind = "no_kernel"


class UnservedError(DoesNotFitError):
    """A server does not answer, or answered no request of a load."""

    kind = "unserved"


class MachineError(TurbofitError):
    """The machine cannot be read, or has no GPU."""

    exit_code = 4
    kind = "machine"


class NoGpuError(MachineError):
    """No GPU can be measured on this machine; a person can still describe a machine."""


class LaunchError(TurbofitError):
    """The engine could not be started, or could not be stopped."""

    exit_code = 5
    kind = "launch"


class OutOfMemoryError(TurbofitError):
    """The memory was not enough, even after all retries."""

    exit_code = 6
    kind = "out_of_memory"


class PackageError(TurbofitError):
    """A needed package is missing, or its version is not supported."""

    exit_code = 7
    kind = "package"


def error_from(document: dict[str, Any]) -> TurbofitError:
    """Make the error that another process reported.

    ``document`` is the value of ``error`` in the result of `to_dict`.
    """
    kinds = {error.exit_code: error for error in TurbofitError.__subclasses__()}
    kind = kinds.get(int(document.get("exit_code", 0)), LaunchError)
    return kind(str(document.get("message", "")), hint=str(document.get("hint", "")))

"""Errors that a person can cause or fix; each names its cause, and has a hint and an exit code.

Any other exception is a bug in turbofit, and ends the process with exit code 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


def option_of(setting: str) -> str:
    """Return the command-line option of a setting, from the setting's name."""
    return "--" + setting.rstrip("_").replace("_", "-")


class TurbofitError(Exception):
    """Base of every expected failure.

    Args:
        message: one line that names the cause.
        hint: one line that says what to do about it.
        options: the fields of the options that both lines name, the wrong option first. The lines
            spell them as the command line does; `name_keywords` changes that for Python.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str, options: Sequence[str] = ()) -> None:
        # White space is folded, since a quoted file or exception must not break the line.
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())
        self.options = tuple(options)
        super().__init__(self.message)
        if hasattr(self, "add_note"):  # from Python 3.11 on, for the traceback
            self.add_note(f"hint: {self.hint}")

    @property
    def option(self) -> str | None:
        """The name of the field whose option is wrong; None if no option is wrong."""
        return self.options[0] if self.options else None

    def name_keywords(self) -> None:
        """Spell this error's options as keywords: ``tp`` instead of ``--tp``."""
        lines = [self.message, self.hint]
        for name in sorted(self.options, key=len, reverse=True):
            lines = [line.replace(option_of(name), name) for line in lines]
        self.__dict__.pop("__notes__", None)
        TurbofitError.__init__(self, lines[0], hint=lines[1], options=self.options)

    def to_dict(self) -> dict[str, Any]:
        """Return the error as the JSON document that ``--json`` prints."""
        names = ("kind", "message", "hint", "exit_code")
        return {"error": {name: getattr(self, name) for name in names}}


class UsageError(TurbofitError):
    """An option, SPEC, file or model name is wrong."""

    exit_code = 2
    kind = "usage"


class DoesNotFitError(TurbofitError):
    """The model would not serve: it does not fit, it would die, or it would hang."""

    exit_code = 3
    kind = "does_not_fit"


class NoKernelError(DoesNotFitError):
    """The engine has no code for what the model needs on this card."""

    kind = "no_kernel"


class UnservedError(DoesNotFitError):
    """A server does not answer, or it answered no request of a load."""

    kind = "unserved"


class MachineError(TurbofitError):
    """The machine cannot be read, or has no GPU."""

    exit_code = 4
    kind = "machine"


class NoGpuError(MachineError):
    """No GPU can be measured on this machine; a person can still describe a machine."""

    def __init__(self, message: str, *, hint: str, options: Sequence[str] = ("on",)) -> None:
        super().__init__(message, hint=hint, options=options)


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

    ``document`` is what stands under ``error`` in the result of `to_dict`.
    """
    kinds = {error.exit_code: error for error in TurbofitError.__subclasses__()}
    kind = kinds.get(int(document.get("exit_code", 0)), LaunchError)
    return kind(str(document.get("message", "")), hint=str(document.get("hint", "")))

"""``turbofit``: finds the command, runs it, and turns errors into one line and a hint."""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any, Final

import click

import turbofit
from turbofit.cli.manual import COMMANDS, overview
from turbofit.cli.options.untyped import ROOT
from turbofit.cli.terminal.output import (
    INTERRUPTED,
    UnwrittenError,
    answer,
    complain,
    prepare_streams,
)
from turbofit.cli.words import split_rest
from turbofit.core.errors import PackageError, TurbofitError, UsageError
from turbofit.core.process.interpreter import collect_after

if TYPE_CHECKING:
    from collections.abc import Sequence

    from click.shell_completion import CompletionItem

    from turbofit.cli.command import CliCommand

#: The extra that installs a package, by the name under which the package is imported.
_EXTRAS: Final = {
    **dict.fromkeys(("aiohttp", "httptools", "PIL", "pybase64", "uvicorn", "uvloop"), "gateway"),
    "ray": "ray", "lmdeploy": "lmdeploy", "accelerate": "fallback", "transformers": "fallback",
}  # fmt: skip

#: The package that a command needs besides the packages of the extra ``gateway``. The extra of the
#: same name as this package installs all of them.
_BEHIND_GATEWAY: Final = {
    **dict.fromkeys(("serve", "calibrate", "tune"), "lmdeploy"), "cluster": "ray",
}  # fmt: skip

#: New objects before the first garbage collection; a plan makes about 60,000.
_OBJECTS_BEFORE_COLLECTION: Final = 100_000

_FAILED: Final = 1
#: The module of each command that has no module of its own name.
_FILES: Final = {
    "predict": "plan", "cluster": "ps", "rehearse": "plan", "which": "plan", "logs": "ps",
    "stop": "ps", "gpus": "models", "machine": "models", "completion": "models",
    "calibrate": "tune", "bench": "tune", "diagnose": "doctor",
}  # fmt: skip
SHELLS: Final = ("bash", "zsh", "fish")
#: The environment variable by which a shell asks `turbofit` for completions.
COMPLETE_VARIABLE: Final = "_TURBOFIT_COMPLETE"


def entry() -> None:
    """Run this process's command line and exit.

    The garbage collector begins late. Objects made at start-up stay until the process ends, so an
    early collection finds nothing, and takes a sixth of a plan's time.
    """
    collect_after(_OBJECTS_BEFORE_COLLECTION)
    code = main(sys.argv[1:])
    gc.freeze()
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; only ``SystemExit`` is raised."""
    prepare_streams()
    as_json = "--json" in split_rest(argv)[0]
    try:
        return _run(list(argv))
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except TurbofitError as exc:
        complain(exc.to_dict(), as_json=as_json and not isinstance(exc, UnwrittenError))
        return exc.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as exc:  # noqa: BLE001 - the last resort: a bug of ours is reported as one
        missing = _missing_package(exc, argv)
        complain(_bug_report(exc, argv) if missing is None else missing.to_dict(), as_json=as_json)
        return _FAILED if missing is None else missing.exit_code


def _run(argv: list[str]) -> int:
    """Run a command line and return its exit code; errors are raised."""
    if COMPLETE_VARIABLE in os.environ:
        return complete(os.environ[COMPLETE_VARIABLE])
    if not argv or argv[0] in ("-h", "--help"):
        answer(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        answer(f"turbofit {turbofit.__version__}\n")
        return 0
    if argv[0] not in COMMANDS:
        raise unknown_command(argv)
    with TURBOFIT.make_context("turbofit", argv, auto_envvar_prefix=ROOT) as ctx:
        return int(TURBOFIT.invoke(ctx))


def _missing_package(exc: Exception, argv: Sequence[str]) -> PackageError | None:
    """Return the error for a missing package of an extra, with a hint; None for other errors."""
    package = (exc.name or "").partition(".")[0] if isinstance(exc, ModuleNotFoundError) else ""
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    from turbofit.core.installation import install_command, installed

    behind = _BEHIND_GATEWAY.get("".join(argv[:1]))
    if extra == "gateway" and behind is not None and installed(behind) is None:
        extra = behind
    return PackageError(
        f"this needs {package}, which is not installed",
        hint=f"install it with {install_command(extra)}",
    )


def _bug_report(exc: Exception, argv: Sequence[str]) -> dict[str, Any]:
    """Return the error document of a bug; write its traceback to the state folder."""
    import traceback

    from turbofit.core.process.files import new_path
    from turbofit.serving.process.hidden import hide_secrets, without_secrets

    words = " ".join(without_secrets(argv, texts=True))
    text = hide_secrets("".join(traceback.format_exception(exc)), argv, os.environ)
    try:
        path = new_path("crashes", "traceback", ".txt")
        path.write_text(f"turbofit {turbofit.__version__} {words}\n{text}", encoding="utf-8")
        hint = f"please report it with {path}"
    except OSError:
        print(text, file=sys.stderr)  # noqa: T201 - without a state folder only stderr is left
        hint = "please report it with the traceback above"
    first = hide_secrets(" ".join(str(exc).split()), argv, os.environ)
    message = f"a bug in turbofit: {type(exc).__name__}: {first}"
    return {"error": {"kind": "bug", "message": message, "hint": hint, "exit_code": _FAILED}}


class Turbofit(click.Group):
    """The group of all commands; a command is imported when it is named."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _: click.Context, name: str) -> CliCommand | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"turbofit.cli.commands.{_FILES.get(name, name)}")
        command: CliCommand = getattr(module, name)
        command.help = COMMANDS[name]
        return command

    def shell_complete(self, _: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [
            CompletionItem(name, help=text)
            for name, text in COMMANDS.items()
            if name.startswith(incomplete)
        ]


#: The most characters of a first word that a message repeats.
_SHOWN: Final = 80
TURBOFIT: Final = Turbofit("turbofit", add_help_option=False)


def unknown_command(words: list[str]) -> UsageError:
    """Return the error for a first word that is not a command."""
    from turbofit.cli.pasted_lines import pasted_line
    from turbofit.cli.usage_errors import unknown_word
    from turbofit.core.messages import guess, neighbours
    from turbofit.serving.process.hidden import without_secrets

    (name,) = without_secrets(words[:1])
    if line := pasted_line(name):
        model = "MODEL " if "".join(line.words[:1]).startswith("-") else ""
        hint = f"turbofit plan {model}{shlex.quote(name)}, or turbofit serve with the same words"
        return UsageError(f"{name[:_SHOWN]!r}: a command stands first", hint=hint)
    first = "".join(name.split()[:1])  # of a whole line in quotes
    if name.startswith("-") or "=" in first:
        command = next((word for word in words if word in COMMANDS), "COMMAND")
        what, hint = "a command stands first", f"write turbofit {command} OPTIONS"
        if not name.startswith("-"):
            hint = f"a variable stands before turbofit: {name} turbofit {command} OPTIONS"
        return UsageError(f"{name!r}: {what}", hint=hint)
    hint = neighbours()["commands"].get(first) or guess(name, COMMANDS, 3) or unknown_word(words[0])
    return UsageError(
        f"unknown command {name!r}", hint=hint or "turbofit --help lists the commands"
    )


def complete(instruction: str) -> int:
    """Print what a shell asks for: its completion script, or completions at a TAB.

    ``instruction`` is what the shell asks for, such as ``bash_source``.

    Raises:
        UsageError: no shell gives such an instruction.
    """
    from click.shell_completion import shell_complete

    if shell_complete(TURBOFIT, {}, "turbofit", COMPLETE_VARIABLE, instruction) != 0:
        raise UsageError(
            f"{COMPLETE_VARIABLE}={instruction[:40]} is nothing that a shell asks for",
            hint=f"unset {COMPLETE_VARIABLE}: the script of turbofit completion bash sets it",
        )
    return 0

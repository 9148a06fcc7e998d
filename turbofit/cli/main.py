"""``turbofit``: finds the command, runs it, and turns what goes wrong into one line and a hint."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import turbofit
from turbofit.cli.output import answer, complain, prepare_streams, verbose_log
from turbofit.cli.parser import Parser
from turbofit.core.errors import PackageError, TurbofitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "entry", "main"]

#: Each command is ``turbofit.cli.NAME`` with ``add_arguments(parser)`` and ``run(args) -> int``.
COMMANDS: Final[dict[str, str]] = {
    "plan": "the best plan for a model on a machine: settings, ledger, command",
    "predict": "what given settings would do, without a search",
    "rehearse": "LMDeploy's real engine on pretend GPUs with the plan's settings",
    "pretend": "any command on pretend GPUs: memory by process, card and phase, peak, death",
    "serve": "measure, plan, launch LMDeploy and watch it",
    "cluster": "what a Ray cluster serves, another plan for it, a node that leaves",
    "watch": "a running server, live: memory against the forecast, queue, tokens a second",
    "calibrate": "launch, drive the worst case, measure, and let later plans know",
    "gateway": "hold every request to a plan, in front of any LMDeploy",
    "merge": "a LoRA into its checkpoint; LLaVA's original format into the hf format",
    "machine": "GPUs, who uses them, how they reach each other",
    "export": "a plan as a systemd unit, a Compose file or Kubernetes objects",
    "report": "a plan, a rehearsal or a run again: text, Markdown, JSON, one HTML page",
    "compare": "two plans side by side",
    "doctor": "check this machine and its environment, each finding with a fix",
    "diagnose": "explain a crash log: what, where, how many bytes, what would have worked",
    "models": "models that turbofit knows by name",
    "gpus": "GPUs that turbofit knows by name",
    "completion": "what makes bash, zsh or fish complete commands, options and presets",
}

#: Packages that only an extra brings, by the name under which they are imported.
_EXTRAS: Final = {
    **dict.fromkeys(("aiohttp", "httptools", "PIL", "pybase64", "uvicorn", "uvloop"), "gateway"),
    "ray": "ray", "lmdeploy": "lmdeploy", "accelerate": "fallback", "transformers": "fallback",
}  # fmt: skip

#: What runs programs under watch, or reads /proc.
_NOT_ON_WINDOWS: Final = ("calibrate", "doctor", "gateway", "pretend", "rehearse", "serve")
_WINDOWS: Final = os.name == "nt"

_FAILED: Final = 1
_INTERRUPTED: Final = 130


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code. Nothing but ``SystemExit`` gets out."""
    prepare_streams()
    as_json = "--json" in _before_dashes(argv)
    try:
        return _run(list(argv))
    except TurbofitError as exc:
        complain(exc.to_dict(), as_json=as_json)
        return exc.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except ModuleNotFoundError as exc:
        missing = _missing(exc)
        complain(_bug(exc, argv) if missing is None else missing.to_dict(), as_json=as_json)
        return _FAILED if missing is None else missing.exit_code
    except Exception as exc:  # noqa: BLE001 - the last resort: a bug of ours, said as one
        complain(_bug(exc, argv), as_json=as_json)
        return _FAILED


def _run(argv: list[str]) -> int:
    if not argv:
        raise UsageError("no command", hint="turbofit --help lists the commands")
    name = argv[0]
    if name in ("-h", "--help"):
        answer(_help())
        return 0
    if name in ("-V", "--version"):
        answer(f"turbofit {turbofit.__version__}\n")
        return 0
    if name not in COMMANDS:
        raise _unknown(name)
    module = importlib.import_module(f"turbofit.cli.{name}")
    parser = Parser(prog=f"turbofit {name}", description=COMMANDS[name])
    module.add_arguments(parser)
    parser.add_verbose()
    own, after = _split(argv[1:])
    args = parser.parse_args(own)
    args.after = after
    if after and not getattr(module, "TAKES_REST", False):
        raise UsageError(
            f"`turbofit {name}` takes nothing after --", hint=f"see turbofit {name} --help"
        )
    if _WINDOWS and name in _NOT_ON_WINDOWS and not getattr(args, "dry_run", False):
        raise UsageError(
            f"turbofit {name} does not run on Windows",
            hint="run it on Linux, or in WSL 2; plan, predict, machine and report work here",
        )
    with verbose_log(args.verbose):
        code: int = module.run(args)
    return code


def _missing(exc: ModuleNotFoundError) -> PackageError | None:
    """What to install for a package of an extra; None where it is no such package."""
    package = (exc.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    if extra is None:
        return None
    return PackageError(
        f"this needs {package}, which is not installed",
        hint=f'install it with pip install "turbofit[{extra}]"',
    )


def _before_dashes(argv: Sequence[str]) -> Sequence[str]:
    return _split(argv)[0]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what comes after ``--``."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: turbofit [--help] [--version] COMMAND ...",
            "",
            "Plans, launches and checks LMDeploy vision-language servers so that they never run",
            "out of GPU memory.",
            "",
            "commands:",
            *lines,
            "",
            "turbofit COMMAND --help tells more: options, examples, exit codes, what it touches.",
            "",
        ]
    )


def _unknown(name: str) -> UsageError:
    import difflib

    if name.startswith("-"):
        return UsageError(
            f"unknown option {name!r} before the command",
            hint="write turbofit COMMAND OPTIONS; turbofit --help lists the commands",
        )
    near = difflib.get_close_matches(name, COMMANDS, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(COMMANDS)}"
    return UsageError(f"unknown command {name!r}", hint=hint)


def _bug(exc: Exception, argv: Sequence[str]) -> dict[str, Any]:
    """The error document of a bug; the traceback goes to a file of the state folder."""
    import traceback

    from turbofit.core.state import new_file

    text = "".join(traceback.format_exception(exc))
    try:
        path = new_file("crashes", "traceback", ".txt")
        path.write_text(f"turbofit {turbofit.__version__} {list(argv)}\n{text}", encoding="utf-8")
        hint = f"please report it with {path}"
    except OSError:
        print(text, file=sys.stderr)  # noqa: T201 - no state folder: this is all that is left
        hint = "please report it with the traceback above"
    first = " ".join(str(exc).split())
    message = f"a bug in turbofit: {type(exc).__name__}: {first}"
    return {"error": {"kind": "bug", "message": message, "hint": hint, "exit_code": _FAILED}}

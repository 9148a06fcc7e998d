"""``turbofit completion SHELL``: what makes a shell complete commands, options and presets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    import argparse

    from turbofit.cli.parser import Parser

__all__ = ["add_arguments", "run"]

SHELLS: Final = ("bash", "zsh", "fish")
#: How many cards of a kind `--on` offers.
_COUNTS: Final = (1, 2, 4, 8)
#: Options that name a file, and those that name a folder.
_FILES: Final = ("plan", "save", "html", "ssl_certfile", "ssl_keyfile", "access_log")
_FOLDERS: Final = ("keep", "vision_tower")
#: Positionals that name files: a plan, a log.
_FILE_WORDS: Final = ("what", "a", "b", "log")


def add_arguments(parser: Parser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=SHELLS, help="the shell to complete in")


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        PackageError: shtab is missing.
    """
    from turbofit.cli.output import answer

    try:
        import shtab
    except ImportError:
        raise PackageError("shtab is not installed", hint="pip install shtab") from None
    answer(shtab.complete(_whole(shtab), shell=args.shell) + "\n")
    return 0


def _whole(shtab: Any) -> Parser:
    """All commands in one parser, their options told what they take."""
    import importlib

    from turbofit.cli.main import COMMANDS
    from turbofit.cli.parser import Parser
    from turbofit.core.presets import load_yaml, preset_path
    from turbofit.machine.presets import preset_names

    models = _words("models", sorted(load_yaml(preset_path("models", "aliases"))))
    specs = _words("specs", [f"{n}x{name}" for name in preset_names() for n in _COUNTS])
    parser = Parser(prog="turbofit")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, text in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        importlib.import_module(f"turbofit.cli.{name}").add_arguments(own)
        own.add_verbose()
        for action in own._actions:
            _tell(action, shtab, models, specs)
    return parser


def _tell(action: Any, shtab: Any, models: Any, specs: Any) -> None:
    """What an argument takes, by its name."""
    positional = not action.option_strings
    if action.dest == "model":
        action.complete = models
    elif action.dest == "on":
        action.complete = specs
    elif action.dest in (_FILE_WORDS if positional else _FILES):
        action.complete = shtab.FILE
    elif action.dest == "folders" or action.dest in _FOLDERS:
        action.complete = shtab.DIRECTORY


def _words(name: str, words: list[str]) -> dict[str, Any]:
    """Words, or a path: for shtab, in each shell's own way."""
    function, joined = f"_turbofit_{name}", " ".join(words)
    both = f"_alternative '{name}:{name}:({joined})' 'files:file:_files'"
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{ compgen -W "{joined}" -- "$1"; compgen -f -- "$1"; }}',
            "zsh": f"{function}() {{ {both} }}",
            "fish": f"function {function}\n  printf '%s\\n' {joined}\n"
            "  __fish_complete_path (commandline -ct)\nend",
        },
    }

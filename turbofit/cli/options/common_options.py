"""Options that several commands share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.command import PATH, Argument, Option, option_name
from turbofit.core.errors import UsageError
from turbofit.core.process.ports import DEFAULT_PORT, LAST_PORT

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from turbofit.core.json_types import Options


__all__ = [
    "FORMS",
    "FULL",
    "HTML",
    "JSON",
    "PORT",
    "SERVER_OPTIONS",
    "machine_options",
    "model_argument",
    "planning_keywords",
    "planning_options",
    "refuse_beside_cluster",
    "server_of",
    "setting_options",
]

_KEEP: Final = "LMDeploy settings to keep"

#: The type of a port among options that fill no field of a request.
PORT: Final = click.IntRange(1, LAST_PORT)

JSON: Final = Option(
    "--json", "as_json", is_flag=True, form=True, help="one JSON document on stdout"
)
FULL: Final = Option("--full", is_flag=True, form=True, help="everything, on the terminal")
#: The forms of the answer; no command takes both.
FORMS: Final = (JSON, Option("--md", is_flag=True, form=True, help="Markdown on stdout"))
HTML: Final = Option("--html", metavar="FILE", form=True, type=PATH, help="one page; - for stdout")

_SERVER: Final = f"http://127.0.0.1:{DEFAULT_PORT}"
#: A server that runs, by `server_of`, and its model.
SERVER_OPTIONS: Final = (
    Argument(
        "url", metavar="URL", required=False, explained=f"the server's address (default {_SERVER})"
    ),
    Option("--model", help="the model's name (default: the first that the server lists)"),
    Option("--api-key", metavar="KEY", help="the server's key (default: $TURBOFIT_API_KEY)"),
)


def server_of(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """The address and the key of the server that `SERVER_OPTIONS` name.

    Raises:
        UsageError: the address is none.
    """
    from turbofit.cli.usage_errors import unknown_word
    from turbofit.core.process.variables import variables

    address = url or _SERVER
    if not re.match(r"https?://[^/]", address):
        hint = unknown_word(address) or f"write it as http://{address}"
        raise UsageError(f"{address} is no address of a server", hint=hint)
    return address, api_key or next(iter(variables().keys), None)


def model_argument(
    *, required: bool = True, profile: bool = False, several: bool = False
) -> list[click.Parameter]:
    """The model, or several, and its revision; ``profile``: with ``-f FILE``, which may name it."""
    from turbofit.cli.commands.completion import complete_model
    from turbofit.cli.options.fields import options_of
    from turbofit.cli.options.profile_options import ModelArgument, profile_option
    from turbofit.planning.request import PlanRequest

    explained = PlanRequest.model_fields["model"].description or ""
    kind = ModelArgument if profile else Argument
    model = kind(
        "model", explained=explained, required=required, nargs=-1 if several else 1,
        metavar="MODEL..." if several else "MODEL", shell_complete=complete_model,
    )  # fmt: skip
    options = [profile_option()] if profile else []
    return [model, *options, *options_of(PlanRequest, ["revision"])]


def machine_options() -> list[click.Parameter]:
    """Which machine, and which of its GPUs."""
    from turbofit.cli.commands.completion import complete_spec
    from turbofit.cli.options.fields import options_of
    from turbofit.planning.request import PlanRequest

    return [
        *options_of(PlanRequest, ["on"], shell_complete=complete_spec),
        *options_of(PlanRequest, ["gpus"]),
    ]


def planning_options() -> list[click.Parameter]:
    """Shape, workload, limits and budgets, and the settings of LMDeploy that are fixed."""
    from turbofit.cli.options.fields import grouped_options
    from turbofit.planning.request import GROUPS, PlanRequest

    return [*grouped_options(PlanRequest, GROUPS), *setting_options()]


def setting_options() -> list[click.Parameter]:
    """LMDeploy's own options; what is set of them is never changed."""
    from turbofit.cli.options.fields import options_of
    from turbofit.planning.request import ENGINE_OPTIONS, PlanRequest

    return [*options_of(PlanRequest, ENGINE_OPTIONS, group=_KEEP)]


def planning_keywords(given: Options) -> Options:
    """Those of the options given that a plan is asked for with, checked and typed.

    Raises:
        UsageError: a value is wrong.
    """
    from turbofit.cli.options.fields import filled
    from turbofit.planning.request import PlanRequest

    request = filled(PlanRequest, {**given, "model": "-"})
    return {name: value for name, value in request.given().items() if name != "model"}


def refuse_beside_cluster(names: Iterable[str], given: Container[str], instead: str) -> None:
    """Stop where an option of one machine is given beside --cluster; ``instead`` is what to do.

    Raises:
        UsageError: one of these names of fields is among the given ones.
    """
    for name in names:
        if name in given:
            option = option_name(name)
            raise UsageError(
                f"{option} is of one machine, and --cluster names several",
                hint=f"leave {option} out{instead}",
            )

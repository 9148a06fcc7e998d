"""Options that several commands share: the answer's form, a model, a machine, a server."""

from __future__ import annotations

import re
import sys
from typing import Final

import click

from turbofit.cli.command import PATH, Argument, Option
from turbofit.cli.options import field_options as fields
from turbofit.cli.options.untyped import use_file
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.process.network import DEFAULT_PORT, LAST_PORT
from turbofit.core.struct import Options

_KEEP: Final = "LMDeploy settings to keep"
#: The most bytes of a SPEC; nvidia-smi's table of eight GPUs has 6,000.
_LONGEST_SPEC: Final = 1 << 20

PORT: Final = click.IntRange(1, LAST_PORT)

JSON: Final = Option(
    "--json", "as_json", is_flag=True, form=True, help="one JSON document on stdout"
)
FULL: Final = Option("--full", is_flag=True, form=True, help="everything, on the terminal")
#: Options that set the form of the answer; a command line may have one of these options.
FORMS: Final = (JSON, Option("--md", is_flag=True, form=True, help="Markdown on stdout"))
HTML: Final = Option("--html", metavar="FILE", form=True, type=PATH, help="one page; - for stdout")

#: The argument for a run of `serve`; `read_run` reads the run.
RUN: Final = Argument(
    "run", metavar="RUN", required=False, type=PATH,
    explained="a run's folder or name, its model, or its server's address (default: the newest)",
)  # fmt: skip
API_KEY: Final = Option(
    "--api-key", metavar="KEY", help="the server's key (default: $TURBOFIT_API_KEY)"
)

#: An address without its scheme: a port, or a host and a port.
_BARE: Final = re.compile(r"(?:(?P<host>[\w.-]+|\[[\da-f:]+\]):)?(?P<rest>\d{2,5}(?:/.*)?)")
_SERVER: Final = f"http://127.0.0.1:{DEFAULT_PORT}"
#: Address, model and key of a running server; `server_of` reads address and key.
SERVER_OPTIONS: Final = (
    Argument(
        "url",
        metavar="URL",
        required=False,
        explained=f"the server's address (default: the only server that runs here, else {_SERVER})",
    ),
    Option("--model", help="the model's name (default: the first that the server lists)"),
    API_KEY,
)


def server_of(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """Return the address and the key of the server that `SERVER_OPTIONS` name.

    The default is the only running server of this user, else port 23333 of this machine. A port
    alone is of this machine.

    Raises:
        UnservedError: the only server is still starting.
        UsageError: the text is no address of a server.
    """
    from turbofit.cli.usage_errors import unknown_word
    from turbofit.core.process.variables import SERVER_KEYS, keys_in

    if url is None and sys.platform == "linux":
        url = _own_server()
    address = url or _SERVER
    if bare := _BARE.fullmatch(address):
        address = f"http://{bare['host'] or '127.0.0.1'}:{bare['rest']}"
    if not re.match(r"https?://[^/]", address):
        host = re.fullmatch(r"localhost\S*|[\w\[]\S*[.:]\S*", address.rpartition("//")[2])
        hint = unknown_word(address) or f"write it as {f'http://{host[0]}' if host else _SERVER}"
        raise UsageError(f"{address} is no address of a server", hint=hint)
    return address, api_key or next(iter(keys_in(SERVER_KEYS)), None)


def _own_server() -> str | None:
    """Return the address of this user's only server; None if there is none.

    Raises:
        UnservedError: no server is ready, but at least one is still starting.
        UsageError: several servers run, and none listens on the usual port.
    """
    from turbofit.serving.runs import live_servers

    runs = live_servers()
    running = [one for run in runs for one in run.record.urls[:1]]
    if not running and (starting := [r.name for r in runs if r.record.state == "starting"]):
        raise UnservedError(
            f"{starting[0]} is still starting",
            hint='a server says "ready at" when it answers; turbofit logs shows its progress',
        )
    if len(running) > 1 and _SERVER not in running:
        raise UsageError(f"{len(running)} servers run here", hint=f"name one: {', '.join(running)}")
    return running[0] if len(running) == 1 else None


def model_argument(*, required: bool = True, file: bool = False) -> list[click.Parameter]:
    """Make the argument MODEL and ``--revision``; with ``file`` also ``-f FILE``."""
    from turbofit.planning.request import PlanRequest

    explained = PlanRequest.model_fields["model"].description or ""
    model = Argument(
        "model", explained=explained, required=required, metavar="MODEL",
        shell_complete=fields.complete_model,
    )  # fmt: skip
    from_file = Option(
        "-f", "--file", metavar="FILE", type=PATH, is_eager=True, expose_value=False,
        callback=use_file, help="a YAML file of options; command line and variables override it",
    )  # fmt: skip
    return [model, *([from_file] if file else []), *fields.options_of(PlanRequest, ["revision"])]


def spec_option() -> Option:
    """Make the option ``--on`` of a command that plans nothing."""
    return Option("--on", metavar="SPEC", shell_complete=fields.complete_spec, callback=_read_spec)


def _read_spec(ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Return the value of ``--on``, or the text of stdin if the value is ``-``."""
    if value != "-" or ctx.resilient_parsing:
        return value
    return sys.stdin.buffer.read(_LONGEST_SPEC).decode("utf-8", "replace")


def machine_options() -> list[click.Parameter]:
    from turbofit.planning.request import PlanRequest

    return [
        *fields.options_of(
            PlanRequest, ["on"], shell_complete=fields.complete_spec, callback=_read_spec
        ),
        *fields.options_of(PlanRequest, ["gpus"]),
    ]


def planning_options() -> list[click.Parameter]:
    """Make the options of planning: shape, workload, limits, budgets, LMDeploy's settings."""
    from turbofit.planning.request import ENGINE_OPTIONS, GROUPS, PlanRequest

    kept = fields.options_of(PlanRequest, ENGINE_OPTIONS, group=_KEEP)
    return [*fields.grouped_options(PlanRequest, GROUPS), *kept]


def planning_keywords(given: Options) -> Options:
    """Return the given options that belong to a plan's request, checked and typed."""
    from turbofit.planning.request import PlanRequest

    request = fields.filled(PlanRequest, {**given, "model": "-"})
    return {name: value for name, value in request.given().items() if name != "model"}

"""The common part of all ways to serve: the command line, and messages of an open server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.cli.terminal import output
from turbofit.core.errors import UsageError, option_of
from turbofit.serving import options as launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.options import GatewayOptions
    from turbofit.planning.request import PlanRequest
    from turbofit.serving.config import ServeConfig
    from turbofit.serving.passthrough import PassedOptions


PRETEND: Final = (
    "PRETEND GPUs: memory, admission, errors and death are real; the words of answers mean nothing"
)
#: The model of a request without one: a saved plan has its own.
NO_MODEL: Final = "-"


class Arguments(NamedTuple):
    """The command line of `serve`, read once; ``passed`` are the options after ``--``."""

    request: PlanRequest
    options: launch.ServeOptions
    public: GatewayOptions
    passed: PassedOptions

    def gateway(self) -> GatewayConfig:
        """The settings of the gateway in front of the engines.

        Raises:
            UsageError: options of the gateway follow ``--``, or contradict each other.
        """
        if self.passed.public:
            raise UsageError(
                f"{self.passed.public[0]} after -- would not reach clients: the gateway faces them",
                hint=f"give {self.passed.public[0]} before --, or use --no-gateway",
            )
        return public_side(self.public)

    def saved_plan(self) -> Plan:
        """The plan of ``--plan``, which allows no option of planning.

        Raises:
            UsageError: the plan cannot be read, or an option of planning is given, too.
        """
        from turbofit.report.stored_documents import read_plan

        assert self.options.plan is not None
        given = self.request.given()
        if given.pop("model") != NO_MODEL or given:
            what = option_of(next(iter(given))) if self.request.model == NO_MODEL else "a model"
            raise UsageError(f"--plan and {what} do not go together", hint="give one of the two")
        return read_plan(self.options.plan)


def public_side(options: GatewayOptions, *, upstream_key: str | None = None) -> GatewayConfig:
    """The settings of a gateway; prints a warning if keys cross the network unencrypted."""
    from turbofit.gateway.http.connections import is_loopback

    config = options.config(upstream_key=upstream_key)
    if not config.ssl_certfile and not is_loopback(config.host):
        output.note("warning: without --ssl-certfile, keys and prompts cross the network in clear")
    return config


def say_open(urls: Sequence[str], config: ServeConfig, model: str, form: output.Form) -> None:
    """Print that a server is open: its addresses, and lines for a shell, for Python, for a chat."""
    from turbofit.gateway.http.welcome import client_lines

    if form.as_json:
        return
    output.answer("".join(f"{url}\n" for url in urls))
    gateway = config.gateway
    if gateway is not None and gateway.front_keys and not gateway.api_keys:
        return  # a node, which accepts no client's key: its front prints the lines
    key = bool(config.api_key) if gateway is None else bool(gateway.api_keys)
    for line in client_lines(urls[0], model, key=key):
        output.say(f"to ask: {line}")
    output.say(f"to chat: turbofit chat {urls[0]}")
    page = "" if gateway is None else ", which is a page to chat in a browser"
    output.say(f"ready at {urls[0]}{page}")

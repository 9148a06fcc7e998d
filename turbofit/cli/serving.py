"""What stands for a plan on the command line of `serve`, and `serve --cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.cli.command import CliCommand, option_name, refuse_together
from turbofit.cli.options.common_options import planning_keywords, setting_options
from turbofit.cli.terminal.output import Form, answer, exit_code, note, run_until_signal, say
from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.process.ports import LAST_PORT
from turbofit.core.struct import to_builtins, to_json

if TYPE_CHECKING:
    from turbofit.cli.options.gateway_options import GatewayOptions
    from turbofit.cli.options.launch_options import ServeOptions
    from turbofit.core.plan import Plan
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.serve.config import ClusterServeConfig, ServeConfig
    from turbofit.launch.serve.passthrough import PassedOptions
    from turbofit.planning.request import PlanRequest

PRETEND: Final = (
    "PRETEND GPUs: memory, admission, errors and death are real; the words of answers mean nothing"
)
#: Options after ``--`` that are the gateway's business while there is one.
_PUBLIC: Final = (
    "--api-keys", "--allow-origins", "--allow-credentials", "--allow-methods", "--allow-headers",
    "--proxy-url",
)  # fmt: skip
#: The model of a request that names none: a saved plan has its own.
NO_MODEL: Final = "-"


class ServeArguments(NamedTuple):
    """The command line of `serve`, read once.

    ``request`` is what stands before ``--``, ``passed`` what follows.
    """

    request: PlanRequest
    options: ServeOptions
    public: GatewayOptions
    passed: PassedOptions

    def gateway(self) -> GatewayConfig:
        """The public side.

        Raises:
            UsageError: open by accident, or options of the engine's own public side.
        """
        for name in _PUBLIC:
            if name in self.passed.argv:
                raise UsageError(
                    f"{name} after -- would not reach clients: the gateway faces them",
                    hint="use --api-key and --allow-origins before --, or --no-gateway",
                )
        return self.public.config()


def refuse_elsewhere(request: PlanRequest, does: str, beside: str = "") -> None:
    """Stop where a machine is described to a command that works on the GPUs here.

    Raises:
        UsageError: it is.
    """
    if request.on is not None:
        if isinstance(request.on, str):
            from turbofit.machine.source import machine_from

            machine_from(request.on)  # what is no machine is said as that
        raise UsageError(
            f"{does} the machine here, so --on does not go with it",
            hint=f"add --pretend to try it on pretend GPUs{beside}; turbofit plan MODEL --on "
            f"{request.on} plans for that machine",
        )


def show_commands(arguments: ServeArguments, form: Form) -> int:
    """Print instead of launching: the commands as somebody would run them without a gateway."""
    import msgspec

    from turbofit.cli.commands.plan import show_plan
    from turbofit.planning.commands import commands
    from turbofit.planning.plan import plan as best_plan
    from turbofit.planning.plan import refusal
    from turbofit.report.views.figures import shell_words, unheld

    if arguments.options.plan:
        plan = read_saved(arguments, arguments.options.plan)
    else:
        plan = best_plan(with_passed(arguments))
    passed, port = arguments.passed, arguments.public.port
    name = arguments.options.model_name
    if port + plan.parallel.replicas - 1 > LAST_PORT:
        raise UsageError(
            f"{plan.parallel.replicas} engines from port {port} on go beyond {LAST_PORT}",
            hint="choose a lower --port",
        )
    shown_commands = commands(plan, port=port, name=name, options=passed.argv)
    if form.as_json or form.md:
        serve = plan.serve
        if serve is not None:
            named = ("--model-name", name) if name else ()
            rest = ("--", *passed.argv) if passed.argv else ()
            serve = msgspec.structs.replace(serve, argv=(*serve.argv, *named, *rest))
        shown = msgspec.structs.replace(plan, serve=serve, commands=shown_commands)
        return show_plan(shown, "serve", form)
    if not plan.fits:
        raise refusal(plan)
    for text in plan.model.warnings:
        say(f"warning: {text}")
    behind = (
        "" if arguments.options.no_gateway else "turbofit serve starts this behind its gateway: "
    )
    head = f"# {behind}{unheld(plan)}\n"
    texts = [shell_words(command.argv, command.env) + "\n" for command in shown_commands]
    answer(head + "\n".join(texts))
    return 0


def with_passed(arguments: ServeArguments) -> PlanRequest:
    """The request with the options after ``--`` that are planned with.

    Raises:
        UsageError: one of them is given twice.
    """
    request, more = arguments.request, _modelled(arguments.passed)
    given = request.given()
    for name, value in more.items():
        if given.get(name, value) != value:
            raise UsageError(
                f"{option_name(name)} is given twice, before and after --",
                hint="leave one of the two out",
            )
    return request.changed(**more) if more else request


def read_saved(arguments: ServeArguments, file: str) -> Plan:
    """A saved plan: it is complete, so that no option of planning may stand beside it.

    Raises:
        UsageError: something is.
    """
    from turbofit.report.stored_documents import read_plan

    given = arguments.request.given()
    if given.pop("model") != NO_MODEL or given:
        what = option_name(next(iter(given))) if arguments.request.model == NO_MODEL else "a model"
        raise UsageError(f"--plan and {what} do not go together", hint="give one of the two")
    plan = read_plan(file)
    settings_of_groups = [to_builtins(group.settings) for group in plan.each()]
    for name, value in _modelled(arguments.passed).items():
        planned = list(dict.fromkeys(settings.get(name) for settings in settings_of_groups))
        if planned != [value]:
            planned_text = " and ".join(map(str, planned))
            raise UsageError(
                f"{option_name(name)} after -- is {value}, the plan was made for {planned_text}",
                hint="plan again with it before --",
            )
    return plan


def to_ask(url: str, config: ServeConfig, model: str) -> list[str]:
    """What is said once a server is open: lines for a shell and for Python, and the address last.

    Without a gateway they are for the first engine.
    """
    from turbofit.gateway.http.welcome import client_lines

    gateway = config.gateway
    key = bool(config.api_key) if gateway is None else bool(gateway.api_keys)
    lines = [f"to ask: {line}" for line in client_lines(url, model, key=key)]
    browser = "" if gateway is None else f", or in a browser: {url}"
    return [*lines, f"to chat: turbofit chat {url}{browser}"]


def _modelled(passed: PassedOptions) -> dict[str, Any]:
    """Options after ``--`` that are planned with, read as turbofit's own are."""
    reader = CliCommand(lambda: 0, setting_options())
    with reader.make_context("turbofit serve", list(passed.modelled)) as ctx:
        return planning_keywords(ctx.params)


# ``turbofit serve MODEL --cluster ray``: the machines of a Ray cluster instead of this one.


#: Options of one machine, of the plan and of the launch.
_ONE_MACHINE: Final = (
    "on", "gpus", "plan", "dry_run", "no_gateway", "forget", "lease", "front_key_file",
    "record_trace",
)  # fmt: skip
_NOT_OF_NODES: Final = ("cluster", "name", "node_port", "no_rehearse", "unplanned")


def ray_address(text: str) -> str | None:
    """Ray's address in ``ray`` or ``ray:ADDRESS``; None is the cluster of this host."""
    kind, _, address = text.partition(":")
    if kind != "ray":
        raise UsageError(f"--cluster {text[:60]!r} is no Ray cluster", hint="ray, or ray:HOST:6379")
    return address or None


def serve_on_cluster(arguments: ServeArguments, form: Form) -> int:
    """Serve until a signal; 0 once one ended it in order."""
    from turbofit.launch.cluster.controller import serve_cluster

    request, options, public, _ = arguments
    if options.pretend:
        note(PRETEND)
    gateway = arguments.gateway()
    given = {*request.given(), *options.given(), *public.given()}
    instead = "; turbofit plan --cluster shows what would be served"
    refuse_together({name: name in given for name in _ONE_MACHINE}, "--cluster", instead)
    config = _config(arguments, gateway)
    assert isinstance(config.request.model, Model)
    name = config.client_name(config.request.model)

    def opened(urls: list[str]) -> None:
        if not form.as_json:
            answer("".join(f"{url}\n" for url in urls))
            for line in to_ask(urls[0], config, name):
                say(line)

    ended = run_until_signal(lambda stop: serve_cluster(config, stop, say=say, on_open=opened))
    if form.as_json:
        answer(to_json({"ended": ended.name}))
    say("nothing of it is left on the cluster")
    return exit_code(ended)


def _config(arguments: ServeArguments, gateway: GatewayConfig) -> ClusterServeConfig:
    """What the options ask for; the model is read here, so that no node has to."""
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.planning.resolve import model_of

    options, request = arguments.options, with_passed(arguments)
    assert options.cluster is not None
    return ClusterServeConfig.of(
        request=request.changed(model=model_of(request)),
        gateway=gateway,
        address=ray_address(options.cluster),
        name=options.name,
        node_port=options.node_port,
        node_words=_node_words(arguments),
        access_log=arguments.public.access_log,
        options=tuple(arguments.passed.argv),
        **options.config_fields(),
    )


def _node_words(arguments: ServeArguments) -> tuple[str, ...]:
    """What each node's `turbofit serve` is told beside its plan: what a front does not do."""
    words, public = arguments.options.option_arguments(_NOT_OF_NODES), arguments.public
    of_nodes = ("allowed_media_domains", "default_chat_template_kwargs", "default_sampling")
    names = (name for name in type(public).model_fields if name not in of_nodes)
    words += public.option_arguments(tuple(names))
    passed = arguments.passed.argv
    return (*words, *(("--unplanned", "--", *passed) if passed else ()))

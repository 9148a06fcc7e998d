"""``turbofit serve MODEL``: measures, plans, launches, opens the gateway, watches."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from turbofit.cli.command import Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.options import field_options as fields
from turbofit.cli.options import untyped
from turbofit.cli.terminal import output
from turbofit.cli.terminal.output import exit_code, run_until_signal
from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import PRETEND, counted, refuse_together
from turbofit.core.process.network import LAST_PORT
from turbofit.core.struct import to_json
from turbofit.gateway.config import GatewayOptions
from turbofit.planning.request import ENGINE_OPTIONS, PlanRequest
from turbofit.serving import options as launch

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.core.plan import Plan
    from turbofit.core.process.signals import StopSignal
    from turbofit.core.struct import Options
    from turbofit.gateway.config import GatewayConfig
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.passthrough import PassedOptions
    from turbofit.serving.run import Run

#: What a server says whose clients have several keys: with a prefix cache, and without one.
SHARED_CACHE: Final = (
    "the prefix cache is one for all API keys: a fast first token tells a client that another has"
    " sent this text or picture before (docs/security.md)"
)
CACHE_IS_OFF: Final = (
    "the prefix cache is off: several API keys would share it (docs/security.md;"
    " --enable-prefix-caching asks for it)"
)
#: The warning of a server without a key, and its differences from LMDeploy's server.
OPEN_TO_ALL: Final = (
    "everybody who reaches {host} may use this server, as with LMDeploy (--api-key KEY closes it);"
    " unlike LMDeploy, it refuses pictures by address and web pages of others"
    " (--allowed-media-domains, --allow-origins)"
)
#: Stands for the model in the request of `serve --plan FILE`, since the saved plan has a model.
NO_MODEL: Final = "-"
_LAUNCH: Final = (
    "dry_run", "pretend", "check", "no_standby", "no_rehearse", "forget", "no_gateway",
    "unplanned", "drain", "liveness", "clock", "idle", "cluster",
)  # fmt: skip
#: The options that most people use, in the order of the help page.
_FIRST: Final = (
    "tp", "images", "image_size", "context", "concurrency", "budget", "host", "port", "api_key",
    "plan", "file", "detach", "pretend", "dry_run",
)  # fmt: skip
#: Options that the help page leaves out: LMDeploy's own options, options that the help text of
#: `--cluster` names, options that every command has, and two options that only the manual explains.
_NOT_IN_HELP: Final = (
    *ENGINE_OPTIONS, "async", "revision", "model_name", "allow_origins", "allowed_media_domains",
    "allowed_media_networks", "max_concurrent_requests", "name", "node_port", "front_key_file",
    "quiet", "verbose", "help", "no_standby", "no_tuned",
)  # fmt: skip
#: Options that belong to one machine.
_ONE_MACHINE: Final = (
    "on", "gpus", "plan", "dry_run", "no_gateway", "forget", "front_key_file",
    "max_concurrent_requests",
)  # fmt: skip
_NOT_OF_NODES: Final = ("cluster", "name", "node_port", "no_rehearse", "unplanned")
#: Options of the gateway that the nodes of a cluster apply, and their front does not.
_OF_NODES: Final = (
    "allowed_media_domains", "allowed_media_networks", "default_chat_template_kwargs",
    "default_sampling",
)  # fmt: skip


class Arguments(NamedTuple):
    """The command line of `serve`, read once; ``passed`` are the options after ``--``."""

    request: PlanRequest
    options: launch.ServeOptions
    public: GatewayOptions
    passed: PassedOptions

    def gateway(self) -> GatewayConfig:
        """Return the settings of the gateway in front of the engines.

        Raises:
            UsageError: options of the gateway follow ``--``, or contradict each other.
        """
        if self.passed.public:
            raise UsageError(
                f"{self.passed.public[0]} after -- has no effect on clients, which ask the gateway",
                hint=f"give {self.passed.public[0]} before --, or use --no-gateway",
            )
        return public_side(self.public)

    def saved_plan(self) -> Plan:
        """Read the plan of ``--plan``; an option of planning beside ``--plan`` is refused.

        It is read once, since the file may be a pipe.

        Raises:
            UsageError: the plan cannot be read, or an option of planning is given, too.
        """
        from turbofit.report.stored_documents import read_plan

        assert self.options.plan is not None
        given = self.request.given()
        if given.pop("model") != NO_MODEL or given:
            what = option_of(next(iter(given))) if self.request.model == NO_MODEL else "a model"
            raise UsageError(f"--plan and {what} do not go together", hint="give one of the two")
        plan = read_plan(self.options.plan)
        if plan.prefix_caching and self.several_keys():
            output.note(f"warning: {SHARED_CACHE}")
        return plan

    def several_keys(self) -> bool:
        """Return whether clients have several keys, so that one could learn what others sent."""
        from turbofit.gateway.options import configured

        if self.options.no_gateway:
            return False
        config = configured(self.public)
        return len(config.api_key) > 1 or bool(config.front_keys)


def _apart_by_key(arguments: Arguments) -> Arguments:
    """Return the arguments without a prefix cache, if clients have several keys.

    The time of a first token would tell a client what others have sent. The person may ask for the
    cache all the same. A saved plan stays as it is.
    """
    request = arguments.request
    asked = request.enable_prefix_caching
    if asked is False or arguments.options.plan or not arguments.several_keys():
        return arguments
    if asked:
        output.note(f"warning: {SHARED_CACHE}")
        return arguments
    output.note(CACHE_IS_OFF)
    return arguments._replace(request=request.changed(enable_prefix_caching=False))


def public_side(options: GatewayOptions, *, upstream_key: str | None = None) -> GatewayConfig:
    """Return the settings of a gateway; warn if keys cross the network unencrypted."""
    from turbofit.gateway.http.connections import is_loopback
    from turbofit.gateway.options import configured

    config = configured(options, upstream_key=upstream_key)
    if is_loopback(config.host):
        return config
    if not config.api_key and not config.front_keys:
        output.note(f"warning: {OPEN_TO_ALL.format(host=config.host)}")
    elif not config.ssl_certfile:
        output.note("warning: without --ssl-certfile, keys and prompts cross the network in clear")
    return config


@command(
    *common.model_argument(required=False, file=True),
    *fields.options_of(launch.ServeOptions, ["plan"]),
    Option("-d", "--detach", is_flag=True),
    *common.machine_options(),
    common.JSON,
    *fields.options_of(launch.ServeOptions, _LAUNCH, group="launch"),
    *fields.options_of(GatewayOptions, group="gateway"),
    *fields.options_of(launch.ServeOptions, ["model_name", "name", "node_port"]),
    *common.planning_options(),
    first=_FIRST,
    unnamed=_NOT_IN_HELP,
    takes_rest=True,
    only_linux=True,
    usage="(MODEL | -f FILE | --plan FILE) [OPTIONS] [LMDEPLOY'S OPTIONS] [-- NEWER]",
)
def serve(
    *, model: str | None, detach: bool, form: output.Form, rest: Sequence[str], **given: Any
) -> int:
    """Plan (or read a plan), check, launch and serve; return 0 if a signal ended it normally."""
    from turbofit.serving.passthrough import sort_options
    from turbofit.serving.runs import DETACHED

    if DETACHED in os.environ:  # this is the process in the background
        detach = False
    options = fields.filled(launch.ServeOptions, given)
    public = fields.filled(GatewayOptions, given)
    passed = sort_options(rest, unplanned=options.unplanned)
    request = fields.filled(PlanRequest, {**given, "model": model or NO_MODEL})
    _refuse_contradictions(model, request, options, public)
    arguments = _apart_by_key(Arguments(request, options, public, passed))
    if detach and not options.dry_run:
        if options.plan == "-":
            raise UsageError(
                "--plan - is standard input, which no server in the background has",
                hint="save the plan first: turbofit plan MODEL --json > plan.json",
            )
        return _serve_detached(form, options.cluster)
    if options.cluster is not None:
        return serve_on_cluster(arguments, form)
    if options.dry_run:
        if not options.no_gateway:
            arguments.gateway()  # raises the error that a start would raise
        return _show_commands(arguments, form)
    config = _serve_config(arguments)
    if options.idle is not None:
        return _serve_with_idle(config, options.idle, form)
    return _serve_model(config, arguments, form)


def _refuse_contradictions(
    model: str | None,
    request: PlanRequest,
    options: launch.ServeOptions,
    public: GatewayOptions,
) -> None:
    """Refuse options that do not go together, and a command without a model.

    Raises:
        UsageError: as it says; of a cluster its name is checked first.
    """
    if options.cluster is not None:
        _refuse_beside_cluster(model, options, {**request.given(), **public.given()})
    elif not options.dry_run and not options.pretend:
        launch.refuse_elsewhere(request, "serve launches on", ", or --dry-run to see the commands")
    options.refuse_alone()
    if options.no_gateway:
        public.refuse_unused()
    if not model and not options.plan:
        raise UsageError("serve needs a model", hint="turbofit serve MODEL, -f FILE or --plan FILE")


def _refuse_beside_cluster(
    model: str | None, options: launch.ServeOptions, others: Options
) -> None:
    """Refuse what does not go with ``--cluster``; ``others`` are given options of other requests.

    Raises:
        UsageError: the cluster is none, no model is named, or an option belongs to one machine.
    """
    cluster = options.cluster or ""
    launch.ray_address(cluster)
    line = shlex.join([model or "MODEL", "--cluster", cluster])
    given = {*others, *options.given()}
    instead = f"; turbofit plan {line} shows what would be served"
    refuse_together({name: name in given for name in _ONE_MACHINE}, "--cluster", instead)
    if not model:
        raise UsageError("--cluster needs a model", hint=f"turbofit serve {line}")


def _serve_detached(form: output.Form, cluster: str | None) -> int:
    """Run the same command in the background, and wait until its server is ready.

    Return 0 if the server is ready; if the command ends first, return its exit code.
    """
    from turbofit.serving.runs import serve_detached

    words = click.get_current_context().meta[untyped.WORDS]
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word not in ("-d", "--detach", "--json")]
    output.say("starting in the background; Ctrl-C ends it")
    server = serve_detached([*kept, *words[end:]], output.note)
    if server.exit_code is not None:
        return server.exit_code
    # `turbofit ps` lists no engines of other machines.
    how = "turbofit ps, logs and stop"
    if cluster is not None:
        how = f"turbofit cluster status --cluster {cluster} shows it, kill {server.pid} ends it"
    document = {"url": server.url, "pid": server.pid, "log": str(server.log)}
    form.tell(document, f"{server.url}\n")
    output.say(f"ready at {server.url}: process {server.pid} serves, log {server.log}; {how}")
    output.say_here_only()
    return 0


def _serve_with_idle(config: ServeConfig, idle: float, form: output.Form) -> int:
    """Serve a model whose engines end while nobody uses it."""
    from turbofit.serving.serve_idle import Served, serve_idle

    def opened(url: str, model: str) -> None:
        output.say_open([url], config, model, form)

    def body(stop: StopSignal) -> Served:
        return serve_idle(config, idle, stop, output.say, opened)

    served = run_until_signal(body)
    if not isinstance(served, Served):
        return exit_code(served)
    if form.as_json:
        runs = [str(folder) for folder in served.folders]
        output.answer(to_json({"ended": served.ended.name, "runs": runs, "cut": served.cut}))
    output.say_cut(served.cut)
    return exit_code(served.ended)


def _serve_config(arguments: Arguments) -> ServeConfig:
    """Make the configuration of a run; with ``--forget``, remove the model's learned documents."""
    from turbofit.model.source import refuse_missing_folder
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.planner import forget_learned, launch_request

    _, options, public, passed = arguments
    request = plan = None
    if options.plan:
        plan = arguments.saved_plan()
        refuse_missing_folder(plan.model.hub_id or plan.model.name)
    if options.forget:
        model = arguments.request.model if plan is None else plan.model
        output.say(f"forgot {counted(forget_learned(model, pretend=options.pretend), 'document')}")
    if plan is None:
        request = launch_request(arguments.request, pretend=options.pretend)
    return ServeConfig.of(
        request=request,
        plan=plan,
        gateway=None if options.no_gateway else arguments.gateway(),
        port=public.port,
        api_key=passed.api_keys[0] if passed.api_keys else None,
        access_log=public.access_log,
        options=tuple(passed.argv),
        unplanned=tuple(passed.unplanned),
        timing=options.timing,
        **options.run_fields(),
    )


def _serve_model(config: ServeConfig, arguments: Arguments, form: output.Form) -> int:
    """Serve one model on this machine until a signal; return the exit code."""
    from turbofit.serving.engine.standby import standby_of
    from turbofit.serving.planner import leases_for
    from turbofit.serving.run import Run
    from turbofit.serving.start import follow

    def body(stop: StopSignal) -> signal.Signals:
        def opened(urls: list[str]) -> None:
            output.say_open(urls, config, config.client_name(plan.model), form)

        with leases_for(config) as leases, standby_of(config, output.say) as standby:
            run = Run(config, leases, output.say, on_open=opened, standby=standby)
            plan = run.prepare()
            folder = run.begin()
            stop.on_hangup = _reloader(run, arguments)
            ended = follow(run, stop)
        cut = 0 if run.public is None else run.public.cut
        if form.as_json:
            output.answer(to_json({"ended": ended.name, "run": str(folder), "cut": cut}))
        output.say_cut(cut)
        return ended

    return exit_code(run_until_signal(body))


def _reloader(run: Run, arguments: Arguments) -> Callable[[], None] | None:
    """Return the function that SIGHUP calls, which reads the file of options again.

    Return None if the command has no ``-f FILE``.
    """
    ctx = click.get_current_context(silent=True)  # no context if a program calls this function
    if ctx is None or untyped.FILE not in ctx.meta:
        return None

    def read() -> tuple[Options, GatewayConfig]:
        options = untyped.read_again(ctx)
        now = arguments._replace(public=fields.filled(GatewayOptions, options))
        return options, now.gateway()

    from turbofit.serving.run import Reloader

    return Reloader(run, ctx.params, read).begin


def _show_commands(arguments: Arguments, form: output.Form) -> int:
    """Print the engines' commands, which a person can run without a gateway.

    With ``--json`` or ``--md``, show the whole plan with these commands.
    """
    import msgspec

    from turbofit.cli.commands.plan import show_plan
    from turbofit.model.source import refuse_missing_folder
    from turbofit.planning.commands import commands
    from turbofit.planning.plan import plan as best_plan
    from turbofit.planning.plan import refusal
    from turbofit.report.views.figures import limits_not_kept, shell_words
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.process.hidden import without_secrets

    refuse_missing_folder(arguments.request.model)
    plan = arguments.saved_plan() if arguments.options.plan else best_plan(arguments.request)
    passed, port = without_secrets(arguments.passed.argv), arguments.public.port
    name = arguments.options.model_name
    ServeConfig(model_name=name).refuse_names(plan)
    if port + plan.replicas - 1 > LAST_PORT:
        raise UsageError(
            f"{plan.replicas} engines need ports from {port} on, and {LAST_PORT} is the last port",
            hint="choose a lower --port",
        )
    shown_commands = commands(plan, port=port, name=name, options=passed)
    if form.as_json or form.md:
        serve = plan.serve
        if serve is not None:
            named = ("--model-name", name) if name else ()
            rest = ("--", *passed) if passed else ()
            serve = msgspec.structs.replace(serve, argv=(*serve.argv, *named, *rest))
        shown = msgspec.structs.replace(plan.with_commands(shown_commands), serve=serve)
        return show_plan(shown, "serve", form)
    if not plan.fits:
        raise refusal(plan)
    for text in plan.model.warnings:
        output.say(f"warning: {text}")
    host = f"[{arguments.public.host}]" if ":" in arguments.public.host else arguments.public.host
    behind = f"turbofit serve starts this behind its gateway at {host}:{port}: "
    head = f"# {'' if arguments.options.no_gateway else behind}{limits_not_kept(plan)}\n"
    texts = [shell_words(command.argv, command.env) + "\n" for command in shown_commands]
    output.answer(head + "\n".join(texts))
    return 0


def serve_on_cluster(arguments: Arguments, form: output.Form) -> int:
    """Serve on a cluster until a signal; return 130 after Ctrl-C, 0 after another signal."""
    from turbofit.planning.resolve import model_of
    from turbofit.serving.cluster.controller import serve_cluster
    from turbofit.serving.options import ClusterServeConfig

    request, options, public, passed = arguments
    if options.pretend:
        output.note(PRETEND)
    assert options.cluster is not None
    model = model_of(request)  # read once, so that no node reads the model again
    # Options for the `turbofit serve` of each node.
    words = (
        "--port", str(options.node_port), *options.option_arguments(_NOT_OF_NODES),
        *public.option_arguments(tuple({*type(public).model_fields} - {*_OF_NODES})),
        *(("--unplanned", "--", *passed.argv) if passed.argv else ()),
    )  # fmt: skip
    config = ClusterServeConfig.of(
        request=request.changed(model=model),
        gateway=arguments.gateway(),
        address=launch.ray_address(options.cluster),
        name=options.name or model.name,
        node_words=words,
        access_log=public.access_log,
        options=tuple(passed.argv),
        timing=options.timing,
        **options.run_fields(),
    )

    def opened(urls: list[str]) -> None:
        output.say_open(urls, config, config.client_name(model), form)

    ended = run_until_signal(
        lambda stop: serve_cluster(config, stop, say=output.say, on_open=opened)
    )
    if form.as_json:
        output.answer(to_json({"ended": ended.name}))
    output.say("the run has left nothing on the cluster")
    return exit_code(ended)

"""``turbofit serve MODEL``: measure, plan, launch, open the gateway, watch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.command import Option, command
from turbofit.cli.options.common_options import (
    FORMS,
    filled,
    machine_options,
    model_argument,
    options_of,
    planning_options,
)
from turbofit.cli.options.gateway_options import GatewayOptions
from turbofit.cli.options.launch_options import ModelsOptions, ServeOptions, refuse_repeated
from turbofit.cli.serving import (
    NO_MODEL,
    PRETEND,
    ServeArguments,
    read_saved,
    refuse_elsewhere,
    serve_on_cluster,
    show_commands,
    to_ask,
    with_passed,
)
from turbofit.cli.terminal.output import (
    Form,
    answer,
    exit_code,
    note,
    run_until_signal,
    say,
    say_cut,
)
from turbofit.cli.usage_errors import WORDS
from turbofit.core.errors import UsageError
from turbofit.core.process.progress import under_way
from turbofit.core.struct import to_json
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from turbofit.core.json_types import Options
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.run import Run
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.supervisor import StopSignal

_LAUNCH: Final = (
    "dry_run", "pretend", "pretend_taken", "pretend_fail", "no_check", "no_rehearse", "forget",
    "no_gateway", "unplanned", "drain", "liveness", "lease",
)  # fmt: skip
_CLUSTER: Final = ("cluster", "name", "node_port")


@command(
    *model_argument(required=False, profile=True, several=True),
    *options_of(ServeOptions, ["plan"], is_eager=True),  # a model is looked for where there is none
    Option("-d", "--detach", is_flag=True),
    *machine_options(),
    *FORMS,
    *options_of(ServeOptions, _LAUNCH, group="launch"),
    *options_of(ServeOptions, ["model_name"], group="gateway"),
    *options_of(GatewayOptions, group="gateway"),
    *options_of(ModelsOptions, group="sleep, and several models"),
    *options_of(ServeOptions, _CLUSTER, group="cluster"),
    *planning_options(),
    takes_rest=True,
    only_linux=True,
    usage="(MODEL... | -f FILE | --plan FILE) [OPTIONS] [-- LMDEPLOY OPTIONS]",
)
def serve(
    *,
    model: tuple[str, ...],
    detach: bool,
    form: Form,
    rest: Sequence[str],
    **given: Any,
) -> int:
    """Plan or read the plan, check, launch; 0 once a signal ended it in order."""
    from turbofit.launch.serve.passthrough import sort_options
    from turbofit.launch.serve.runs import DETACHED, end_without_lease

    if DETACHED in os.environ:
        detach = False
    options = filled(ServeOptions, given)
    public = filled(GatewayOptions, given)
    models = filled(ModelsOptions, given)
    passed = sort_options(rest, unplanned=options.unplanned)
    options = options.named(passed.model_name)
    request = filled(PlanRequest, {**given, "model": model[0] if model else NO_MODEL})
    if not options.dry_run and not options.pretend:
        refuse_elsewhere(request, "serve launches on", ", or --dry-run to see the commands")
    options.check()
    if options.no_gateway:
        public.refuse_unused()
    refuse_repeated(model)
    models.check(model, options)
    arguments = ServeArguments(request, options, public, passed)
    if not model and not options.plan:
        if options.cluster is not None:
            raise UsageError("--cluster needs a model", hint="turbofit serve MODEL --cluster ray")
        raise UsageError("serve needs a model", hint="turbofit serve MODEL, or --plan FILE")
    if detach and not options.dry_run:
        return _detached(form, options.cluster)
    if options.cluster is not None:
        return serve_on_cluster(arguments, form)
    if options.dry_run:
        return show_commands(arguments, form)
    config = _config(arguments)
    if options.lease is not None:
        end_without_lease(Path(options.lease))
    if models.idle is not None or len(model) > 1:
        return _models(config, models, model, form)
    return _one_model(config, arguments, form)


def _detached(form: Form, cluster: str | None) -> int:
    """The same command in the background; its exit code where it does not open."""
    import click

    from turbofit.launch.serve.runs import serve_detached

    words = click.get_current_context().meta[WORDS]
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word not in ("-d", "--detach", "--json")]
    say("starting in the background; Ctrl-C ends it")
    with under_way("starting in the background"):
        server = serve_detached([*kept, *words[end:]])
    if server.exit_code is not None:
        for line in server.last_lines():
            note(line)
        return server.exit_code
    # Engines on other machines are no runs of this one.
    how = "turbofit ps, logs and stop"
    if cluster is not None:
        how = f"turbofit cluster status --cluster {cluster} shows it, kill {server.pid} ends it"
    say(f"process {server.pid} serves; {how}; what it says is in {server.log}")
    if form.as_json:
        answer(to_json({"url": server.url, "pid": server.pid, "log": str(server.log)}))
    else:
        answer(f"{server.url}\n")
    return 0


def _models(config: ServeConfig, options: ModelsOptions, names: Sequence[str], form: Form) -> int:
    """Several models, or one whose engines end while nobody asks for it."""
    import click

    from turbofit.cli.options.common_options import each_model
    from turbofit.launch.serve.planner import preview
    from turbofit.launch.serve_models import (
        ModelsPolicy,
        PlannedModel,
        ServedModels,
        in_turns,
        serve_models,
        side_by_side,
    )

    def opened(url: str, models: Sequence[str]) -> None:
        if not form.as_json:
            answer(f"{url}\n")
            for line in to_ask(url, config, models[0]):
                say(line)
            say(f"models: {', '.join(models)}")

    def body(stop: StopSignal) -> ServedModels:
        if len(names) < 2:
            planned = [PlannedModel(config, preview(config))]
            at_once = 1
        else:
            of_models = each_model(click.get_current_context(), names)
            if options.swap:
                planned, at_once = in_turns(config, of_models, say)
            else:
                planned = side_by_side(config, of_models, say)
                at_once = len(planned)
        if config.pretend:
            note(PRETEND)
        policy = ModelsPolicy(at_once=at_once, **options.policy_fields())
        return serve_models(planned, policy, stop, say, opened, wait=options.wait_seconds)

    served = run_until_signal(body)
    if not isinstance(served, ServedModels):
        return exit_code(served)
    if form.as_json:
        runs = [str(folder) for folder in served.folders]
        answer(to_json({"ended": served.ended.name, "runs": runs, "cut": served.cut}))
    say_cut(served.cut)
    return exit_code(served.ended)


def _config(arguments: ServeArguments) -> ServeConfig:
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.planner import launch_request

    _, options, public, passed = arguments
    request = plan = None
    if options.plan:
        plan = read_saved(arguments, options.plan)
    else:
        request = launch_request(with_passed(arguments), pretend=options.pretend)
    return ServeConfig.of(
        request=request,
        plan=plan,
        gateway=None if options.no_gateway else arguments.gateway(),
        port=public.port,
        api_key=passed.api_keys[0] if passed.api_keys else None,
        access_log=public.access_log,
        options=tuple(passed.argv),
        unplanned=tuple(passed.unplanned),
        forget=options.forget,
        **options.config_fields(),
    )


def _one_model(config: ServeConfig, arguments: ServeArguments, form: Form) -> int:
    from turbofit.launch.run import Run
    from turbofit.launch.serve.leases import Leases

    def body(stop: StopSignal) -> signal.Signals:
        lines: list[str] = []

        def opened(urls: list[str]) -> None:
            if form.as_json:
                return
            answer("".join(f"{url}\n" for url in urls))
            if not lines:
                lines.extend(to_ask(urls[0], config, config.client_name(plan.model)))
                for line in lines:
                    say(line)

        with Leases() as leases:
            run = Run(config, leases, say, on_open=opened)
            if config.pretend:
                note(PRETEND)
            plan = run.prepare()
            folder = run.begin()
            stop.on_hangup = _reloads(run, arguments)
            ended = run.follow(stop)
        cut = 0 if run.public is None else run.public.cut
        if form.as_json:
            answer(to_json({"ended": ended.name, "run": str(folder), "cut": cut}))
        say_cut(cut)
        return ended

    return exit_code(run_until_signal(body))


def _reloads(run: Run, arguments: ServeArguments) -> Callable[[], None] | None:
    """What SIGHUP does where the options are a profile's; without one it ends the run."""
    import click

    from turbofit.cli.options.common_options import profile_of, read_again
    from turbofit.launch.run import Reloader

    ctx = click.get_current_context(silent=True)  # None where a program calls it
    if ctx is None or profile_of(ctx) is None:
        return None

    def read() -> tuple[Options, GatewayConfig]:
        options = read_again(ctx)
        now = arguments._replace(public=filled(GatewayOptions, options))
        return options, now.gateway()

    return Reloader(run, ctx.params, read).begin

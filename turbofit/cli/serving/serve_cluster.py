"""``turbofit serve MODEL --cluster ray``: the machines of a Ray cluster instead of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.cli.options.common_options import refuse_beside_cluster
from turbofit.cli.serving.serve_plan import to_ask, with_passed
from turbofit.cli.terminal.interrupt import exit_code, run_until_signal
from turbofit.core.errors import UsageError
from turbofit.core.model import Model

if TYPE_CHECKING:
    from turbofit.cli.options.gateway_options import GatewayOptions
    from turbofit.cli.serving.serve_plan import ServeArguments
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.serve.config import ClusterServeConfig

__all__ = ["ray_address", "serve_on_cluster"]

#: Options of one machine, of the plan and of the launch.
_ONE_MACHINE: Final = (
    "on", "gpus", "plan", "dry_run", "no_gateway", "forget", "lease", "front_key_file",
    "record_trace",
)  # fmt: skip
#: Of the public side what each node does.
_OF_NODES: Final = ("allowed_media_domains", "default_chat_template_kwargs", "default_sampling")
_NOT_OF_NODES: Final = ("cluster", "name", "node_port", "no_rehearse", "unplanned")


def ray_address(text: str) -> str | None:
    """Ray's address in ``ray`` or ``ray:ADDRESS``; None is the cluster of this host."""
    kind, _, address = text.partition(":")
    if kind != "ray":
        raise UsageError(f"--cluster {text[:60]!r} is no Ray cluster", hint="ray, or ray:HOST:6379")
    return address or None


def serve_on_cluster(
    arguments: ServeArguments, gateway: GatewayConfig, public: GatewayOptions, *, as_json: bool
) -> int:
    """Serve until a signal; 0 once one ended it in order."""
    from turbofit.cli.terminal.output import answer, say
    from turbofit.launch.cluster.controller import serve_cluster

    given = {*arguments.request.given(), *arguments.options.given(), *public.given()}
    instead = "; turbofit plan --cluster shows what would be served"
    refuse_beside_cluster(_ONE_MACHINE, given, instead)
    config = _config(arguments, gateway, public)
    assert isinstance(config.request.model, Model)
    name = config.client_name(config.request.model)

    def opened(urls: list[str]) -> None:
        if not as_json:
            answer("".join(f"{url}\n" for url in urls))
            for line in to_ask(urls[0], config, name):
                say(line)

    ended = run_until_signal(lambda stop: serve_cluster(config, stop, say=say, on_open=opened))
    if as_json:
        import json

        answer(json.dumps({"ended": ended.name}, indent=2) + "\n")
    say("nothing of it is left on the cluster")
    return exit_code(ended)


def _config(
    arguments: ServeArguments, gateway: GatewayConfig, public: GatewayOptions
) -> ClusterServeConfig:
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
        node_words=_node_words(arguments, public),
        access_log=public.access_log,
        options=tuple(arguments.passed.argv),
        **options.config_fields(),
    )


def _node_words(arguments: ServeArguments, public: GatewayOptions) -> tuple[str, ...]:
    """What each node's `turbofit serve` is told beside its plan: what a front does not do."""
    words = arguments.options.option_arguments(_NOT_OF_NODES)
    names = (name for name in type(public).model_fields if name not in _OF_NODES)
    words += public.option_arguments(tuple(names))
    passed = arguments.passed.argv
    return (*words, *(("--unplanned", "--", *passed) if passed else ()))

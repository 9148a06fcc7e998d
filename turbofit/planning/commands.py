"""Makes command lines from plans: one for each group of GPUs, and ``turbofit serve``."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import UsageError, option_of
from turbofit.core.plan import SPECULATIVE, Command, ServeCommand, config_names
from turbofit.core.presets import read_preset
from turbofit.core.process.network import DEFAULT_PORT
from turbofit.core.struct import Struct, to_builtins
from turbofit.memory import versions
from turbofit.memory.engines import engine_of
from turbofit.memory.versions import OLDEST_SERVED, release
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from turbofit.core.cluster import ClusterPlan
    from turbofit.core.machine import Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Backend, EnginePlan, Plan, Settings
    from turbofit.core.promise import Promise


#: Fields of a request that a command line has without an option, or not at all.
_UNSAID: Final = ("model", "on")
_MEASURED: Final = "nvml"
_HOST: Final = "127.0.0.1"
#: The first word of a cluster's source if Ray reported the cluster.
_RAY: Final = "ray "
#: Settings that a command only contains if they are set.
_WHERE_SET: Final = frozenset({
    "model_format", "enable_prefix_caching", "language_model_only", "num_gpu_blocks", "eager_mode",
    "cudagraph_capture_batch_sizes", "distributed_executor_backend", "hf_overrides",
    "prefix_cache_state_budget", "adapters", *SPECULATIVE,
})  # fmt: skip
#: The server for Transformers, run with ``python -m``.
_FALLBACK_MODULE: Final = "turbofit.serving.fallback_server"

#: Words of a command: one option with its values, or the whole command.
Words = tuple[str, ...]
_LAYER: Final = re.compile(r"(.+\.layers)\.(\d+)")
_RUN: Final = re.compile(r"(.+\.layers)\.(\d{1,4})-(\d{1,4})")
_MAP_HINT: Final = 'write it as {"model.embed_tokens": 0, "model.layers.0-15": 0, ...}'


def commands(
    plan: Plan,
    *,
    port: int = DEFAULT_PORT,
    name: str | None = None,
    options: Sequence[str] = (),
) -> tuple[Command, ...]:
    """Return one command for each group of the plan, on consecutive ports from ``port`` on.

    ``name`` is the model's name for clients. ``options`` are options of LMDeploy that each command
    passes on. A caller may replace the first word of a command by ``python -m`` and `module_of`.

    Raises:
        UsageError: there are options for LMDeploy, which does not run the plan.
    """
    ports = [port + number for number in range(len(plan.groups))]
    option = "--model-name" if plan.backend.of_lmdeploy else "--served-name"
    return _commands(plan, ports, [option, name] if name else [], options)


def private_commands(
    plan: Plan,
    ports: Sequence[int],
    folder: str,
    name: str,
    options: Sequence[str] = (),
    *,
    held: bool = True,
) -> tuple[Command, ...]:
    """Return the engines' commands behind a gateway: on loopback, without docs and web pages.

    ``ports`` has one port for each group, and ``folder`` is the model folder for the engine;
    ``name`` and ``options`` are as for `commands`. ``held``: engines that can limit their own
    memory are limited to the bytes in their ledgers.
    """
    closed: list[str] = []
    if plan.backend.of_lmdeploy:
        # The command line allows no empty list, and the default admits every web page.
        closed = ["--disable-fastapi-docs", "--allow-origins", "https://closed.invalid"]
    source = replace(plan.model.source, checkpoint=folder)
    model = replace(plan.model, source=source, hub_id=name)
    return _commands(replace(plan, model=model), ports, closed, options, held=held)


def _commands(
    plan: Plan,
    ports: Sequence[int],
    more: Sequence[str],
    options: Sequence[str],
    *,
    held: bool = False,
) -> tuple[Command, ...]:
    """Return the command lines of a plan's engines.

    Each command ends with the words ``more`` and ``options``; ``held`` is as for
    `private_commands`.
    """
    if options and not plan.backend.of_lmdeploy:
        raise UsageError(
            f"{options[0]} is an option of LMDeploy, which the plan does not run",
            hint="leave out what follows --",
        )
    account = engine_of(plan)
    arguments = _lmdeploy_arguments if plan.backend.of_lmdeploy else _fallback_arguments
    return tuple(
        Command(
            env={
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "CUDA_VISIBLE_DEVICES": visible_devices(plan.machine, engine.gpus),
                **account.environment(plan.model, engine.settings, engine.ledgers if held else ()),
            },
            argv=(*arguments(plan, engine, str(port)), *more, *options),
        )
        for engine, port in zip(plan.engines, ports, strict=True)
    )


def module_of(engine: Backend) -> str:
    """Return the module for ``python -m`` that replaces the first word of an engine's command."""
    return "lmdeploy" if engine.of_lmdeploy else _FALLBACK_MODULE


def visible_devices(machine: Machine, group: tuple[int, ...]) -> str:
    """Return a group's ``CUDA_VISIBLE_DEVICES``: UUIDs, or indices if no UUIDs are known."""
    uuids = [machine.gpu(index).uuid for index in group]
    if machine.source != "preset" and all(u.startswith(("GPU-", "MIG-")) for u in uuids):
        return ",".join(uuids)
    return ",".join(map(str, group))


def model_path(model: Model) -> str:
    """Return the model for LMDeploy: the checkpoint on disk, else the hub id, else the name."""
    return model.source.checkpoint or model.hub_id or model.name


def ratio(value: float) -> str:
    """Write a cache ratio with three decimals; a user's finer ratio is not rounded."""
    short = f"{value:.3f}"
    return short if float(short) == value else repr(value)


def _lmdeploy_arguments(plan: Plan, engine: EnginePlan, port: str) -> Words:
    """Return the words of LMDeploy's command; options that its version lacks are left out."""
    options = [*_options(plan, engine), ("--server-name", _HOST), ("--server-port", port)]
    options.append(("--log-level", "WARNING"))
    known = (option for option in options if came_later(option, plan.backend.version) is None)
    return ("lmdeploy", "serve", "api_server", model_path(plan.model), *chain.from_iterable(known))


def _options(plan: Plan, engine: EnginePlan) -> Iterator[Words]:
    """Yield the options of LMDeploy for an engine of the plan, each with its values."""
    model, path = plan.model, model_path(plan.model)
    yield "--backend", plan.backend.name
    for name, _ in config_names(plan.backend.name):
        value = getattr(engine.settings, name)
        if value or name not in _WHERE_SET:
            yield option_words(name, value)
    if model.hub_id and path != model.hub_id:
        # Clients use this name; LMDeploy's default would be the path.
        yield "--model-name", model.hub_id
    if model.revision and path == model.hub_id:
        yield "--revision", model.revision
    if model.needs_remote_code:
        yield ("--trust-remote-code",)


def option_words(name: str, value: object) -> Words:
    """Return the words of one option and its value."""
    if value is True:
        return (option_of(name),)
    values = value if isinstance(value, tuple) else (value,)
    return option_of(name), *(ratio(v) if isinstance(v, float) else str(v) for v in values)


def left_out(plan: Plan, usual: Settings) -> str | None:
    """Return a warning about the plan's options that its LMDeploy does not know, or None.

    Options with the value that they have in the ``usual`` settings do not count: LMDeploy takes
    these values without an option.
    """
    version = plan.backend.version
    engine, unnamed = plan.engines[0], replace(plan, model=replace(plan.model, revision=None))
    silent = set(_options(unnamed, replace(engine, settings=usual)))
    lacking = [
        f"{' '.join(option)} (from {came} on)"
        for option in _options(plan, engine)
        if option not in silent and (came := came_later(option, version))
    ]
    if not lacking:
        return None
    return (
        f"lmdeploy serve api_server of LMDeploy {version} has no {', '.join(lacking)}: the command"
        " leaves these options out, and so does not start what is predicted here"
    )


def option_since(option: Sequence[str]) -> str | None:
    """Return the release that introduced an option; None if it is unknown.

    If ``option`` also has a value, the release that introduced the value is returned.
    """
    known, words = _releases(), " ".join(option)
    return known.values.get(words) if len(option) > 1 else known.options.get(words)


class _Releases(Struct, forbid_unknown_fields=True):
    """The releases of `lmdeploy serve api_server` that introduced an option, or a value of it."""

    options: dict[str, str]
    values: dict[str, str]


def came_later(option: Words, version: str) -> str | None:
    """Return the release that introduced an option or value, if ``version`` is older, else None."""
    if not versions.is_legacy(version):
        return None
    known = _releases()
    last = known.values.get(" ".join(option)) or known.options.get(option[0])
    later = last is not None and (versions.parse(last) or ()) > (versions.parse(version) or ())
    return last if later else None


@cache
def _releases() -> _Releases:
    return read_preset("engines", "option-releases", _Releases)


def _fallback_arguments(plan: Plan, engine: EnginePlan, port: str) -> Words:
    """Return the words of the command for Transformers' server.

    Raises:
        UsageError: the plan has no device map.
    """
    if engine.device_map is None:
        raise UsageError(
            "the plan has no device map, without which the fallback engine loads nothing",
            hint="plan with `--engine transformers`",
        )
    model, settings = plan.model, engine.settings
    return (
        "turbofit-fallback",
        "--model", model_path(model),
        "--served-name", model.hub_id or model.name,
        "--device-map", folded(engine.device_map),
        "--dtype", settings.dtype,
        "--session-len", str(settings.session_len),
        "--host", _HOST,
        "--port", port,
    )  # fmt: skip


def folded(placed: Mapping[str, int | str]) -> str:
    """Write a device map as JSON.

    Adjacent layers on one device share an entry, such as ``model.layers.0-15``.
    """
    folded_map: dict[str, int | str] = {}
    entries = [(_LAYER.fullmatch(name), name, where) for name, where in placed.items()]
    for (is_layer, where), run in groupby(entries, key=lambda row: (row[0] is not None, row[2])):
        members = list(run)
        first, last = members[0][0], members[-1][0]
        if is_layer and first and last and len(members) > 1:
            folded_map[f"{first[1]}.{first[2]}-{last[2]}"] = where
        else:
            folded_map.update({name: where for _, name, _ in members})
    return json.dumps(folded_map, separators=(",", ":"))


def read_map(text: str) -> dict[str, int | str]:
    """Read a device map from JSON; ``model.layers.0-15`` becomes an entry for each layer.

    Raises:
        UsageError: the map is invalid.
    """
    try:
        data = msgspec.json.decode(text, type=dict[str, int | Literal["cpu", "disk"]])
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"the device map cannot be read: {exc}", hint=_MAP_HINT) from None
    placed: dict[str, int | str] = {}
    for name, where in data.items():
        if run := _RUN.fullmatch(name):
            layers = range(int(run[2]), int(run[3]) + 1)
            if not layers:
                raise UsageError(f"the device map has no layers in {name}", hint=_MAP_HINT)
            placed.update({f"{run[1]}.{layer}": where for layer in layers})
        else:
            placed[name] = where
    return placed


def serve_command(plan: Plan, request: PlanRequest) -> ServeCommand | None:
    """Return the `turbofit serve` command for a plan; None if `serve` refuses the plan.

    If the plan was not made for a measured machine, the command states the context and the image
    limits. With these options, a machine with less free memory refuses to serve; it does not
    promise less.
    """
    old = plan.backend.of_lmdeploy and release(plan.backend.version) < OLDEST_SERVED
    if not plan.fits or old:
        return None
    model = _model_word(plan.model, request.model)
    served = request_of(plan, model).changed(revision=plan.model.revision, gpus=request.gpus)
    if not is_prediction(plan) and plan.machine.source != _MEASURED:
        served = _with_limits(served, plan.model, plan.promise)
    return _serving(model, served)


def cluster_serve_command(plan: ClusterPlan, request: PlanRequest) -> ServeCommand | None:
    """Return the command with which one of the nodes serves a cluster's plan.

    Returns None if the plan does not fit. If the cluster was not reported by Ray, the command
    states the context and the image limits, as in `serve_command`.
    """
    if not plan.fits or plan.promise is None:
        return None
    model, cluster = _model_word(plan.model, request.model), "ray"
    if plan.source.startswith(_RAY):
        cluster = plan.source.replace(" ", ":", 1)
    else:
        request = _with_limits(request, plan.model, plan.promise)
    return _serving(model, request, "--cluster", cluster)


def request_of(plan: Plan, model: str) -> PlanRequest:
    """Return the request that a plan answers; the request names no machine.

    If the plan is from `predict`, all its settings are options of the request.
    """
    options = {} if plan.options is UNSET else plan.options
    request = PlanRequest.again(options, model=model, on=None, gpus=None)
    if not is_prediction(plan):
        return request
    settings = to_builtins(plan.engines[0].settings)  # a prediction's engines have equal settings
    names = [
        name for name, _ in config_names(plan.backend.name) if name not in ("tp", "model_format")
    ]
    predicted = {name: settings[name] for name in names if settings.get(name)}
    predicted["enable_prefix_caching"] = plan.prefix_caching
    shape = {"engine": plan.backend.name, "tp": settings["tp"]}
    return request.changed(**{"context": None, **shape, **predicted})


def is_prediction(plan: Plan) -> bool:
    """Return whether the settings were given or are LMDeploy's defaults, not chosen by a search."""
    return plan.backend.of_lmdeploy and not plan.considered


def _serving(model: str, request: PlanRequest, *words: str) -> ServeCommand:
    """Return the ``turbofit serve`` command for this model, with the request's options."""
    fields = set(type(request).model_fields) - set(PlanRequest.model_fields)
    options = request.option_arguments((*_UNSAID, *fields))
    return ServeCommand(argv=("turbofit", "serve", model, *options, *words))


def _model_word(model: Model, given: str | Model) -> str:
    """Return the model's word in a command line: a folder's full path, else the given name."""
    if model.source.kind == "folder" and model.source.checkpoint:
        return model.source.checkpoint
    return given if isinstance(given, str) else model.hub_id or model.name


def _with_limits(request: PlanRequest, model: Model, promise: Promise) -> PlanRequest:
    """Return the request with the promised context and image limits as options.

    A context that the request gives is kept. If the request gives an image size, no image limit is
    added.
    """
    more: dict[str, Any] = {}
    if not request.given().keys() & {"context", "session_len"}:
        more["context"] = promise.context
    rule = model.image_rule if promise.takes_images else None
    if rule is not None:
        more["images"] = promise.images
        # The limit is left out if the image size determines it, or if the rule has only one limit.
        if promise.image_limit is not None and rule.varies_by_limit and not request.image_size:
            more[rule.limit_name] = promise.image_limit
    return request.changed(**more)

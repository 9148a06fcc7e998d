"""``-f FILE``: a profile's values, for options in neither the command line nor the environment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from click.core import ParameterSource

from turbofit.cli.command import PATH, Option
from turbofit.cli.options.field_options import explain_fields, filled, syntax_of
from turbofit.cli.usage_errors import WORDS
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click

    from turbofit.cli.options.profile import Profile, ProfileSection
    from turbofit.core.json_types import Options


_META: Final = "turbofit.profile"
#: Sources of values that a profile does not override.
_BEFORE_PROFILES: Final = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def sections() -> dict[str, ProfileSection]:
    """The sections of a profile by heading: the fields from which the command line is made."""
    from turbofit.cli.options.profile import ProfileSection
    from turbofit.gateway.options import GatewayOptions
    from turbofit.launch.serve.options import ModelsOptions, ServeOptions
    from turbofit.planning.request import ENGINE_OPTIONS, GROUPS, PlanRequest

    serve = tuple(name for name in ServeOptions.model_fields if name != "plan")
    gateway = tuple(GatewayOptions.model_fields)
    by_heading = {
        "model": ProfileSection(PlanRequest, ("model", "revision"), of_model=True),
        "machine": ProfileSection(PlanRequest, ("on", "gpus")),
        **{
            heading.partition(" ")[0]: ProfileSection(PlanRequest, fields, of_model=True)
            for heading, fields in GROUPS.items()
        },
        "settings": ProfileSection(PlanRequest, ENGINE_OPTIONS, of_model=True),
        "serve": ProfileSection(ServeOptions, serve),
        "sleep": ProfileSection(ModelsOptions, tuple(ModelsOptions.model_fields)),
        "gateway": ProfileSection(GatewayOptions, gateway, secret=frozenset({"api_key"})),
    }
    for heading, section in by_heading.items():
        explain_fields(section.kind, "serve")
        fields = section.kind.model_fields
        lists = frozenset(name for name in section.fields if syntax_of(fields[name]).several)
        by_heading[heading] = section._replace(lists=lists)
    return by_heading


def profile_option() -> Option:
    """The option ``-f``; the command line and the environment override the profile's values."""

    def read(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value is not None and not ctx.resilient_parsing:
            _use(ctx, Path(value))

    return Option(
        "-f", "--file", metavar="FILE", type=PATH, is_eager=True, expose_value=False,
        callback=read, help="a profile, for what stands neither here nor in the environment",
    )  # fmt: skip


def profile_of(ctx: click.Context) -> Profile | None:
    profile: Profile | None = ctx.meta.get(_META)
    return profile


def read_again(ctx: click.Context) -> Options:
    """The options of a command from its words and the profile as it is now."""
    words = list(ctx.meta[WORDS])
    prefix = ctx.auto_envvar_prefix
    with ctx.command.make_context(ctx.info_name, words, auto_envvar_prefix=prefix) as again:
        left_out = ("quiet", "verbose")  # these are not options of the run
        return {name: value for name, value in again.params.items() if name not in left_out}


def _use(ctx: click.Context, path: Path) -> None:
    """Read a profile, and make its values the defaults of the command line."""
    from turbofit.cli.options.profile import read_profile

    profile = read_profile(path, sections())
    ctx.meta[_META] = profile
    values = defaults(profile)
    if profile.models:
        values["model"] = [entry["model"] for entry in profile.models]
    if ctx.info_name == "serve" and "on" in values:
        on, pretend = values["on"], values.get("pretend")
        # `serve` measures the GPUs here whatever machine the profile names, unless it only
        # pretends.
        elsewhere = ("pretend", "dry_run")
        values["on"] = lambda: on if pretend or any(map(ctx.params.get, elsewhere)) else None
    ctx.default_map = values


def each_model(ctx: click.Context, names: Sequence[str]) -> list[Options]:
    """The options of each model: its name, and its values in the profile.

    Raises:
        UsageError: one of several models has a budget of its own.
    """
    from turbofit.planning.request import PlanRequest

    profile = profile_of(ctx)
    if profile is None or ctx.get_parameter_source("model") is not ParameterSource.DEFAULT_MAP:
        return [{"model": name} for name in names]
    per_model = []
    for entry in profile.models:
        if len(profile.models) > 1 and "budget" in entry:
            raise UsageError(
                f"{profile.path}: budget is for all models together",
                hint="give it once, beside models: and not in it",
            )
        values = {
            name: value
            for name, value in entry.items()
            if name == "model" or ctx.get_parameter_source(name) not in _BEFORE_PROFILES
        }
        per_model.append(filled(PlanRequest, values).given())
    return per_model


def defaults(profile: Profile) -> Options:
    """The values of a profile as click's defaults; a secret is read when it is needed.

    The environment's keys override the profile's.
    """
    from turbofit.cli.options.profile import secret_of
    from turbofit.core.process.variables import variables

    values = dict(profile.of_model(0) if len(profile.models) == 1 else profile.values)
    if references := values.pop("api_key", ()):
        folder, where = profile.path.parent, f"{profile.path}: gateway.api_key"
        values["api_key"] = lambda: tuple(secret_of(entry, folder, where) for entry in references)
    if variables().keys:
        values.pop("api_key", None)
    return values

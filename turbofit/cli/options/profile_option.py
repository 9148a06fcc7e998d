"""``-f FILE``: a profile's values, for options in neither the command line nor the environment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from turbofit.cli.command import PATH, Option
from turbofit.cli.options.field_options import explain_fields, syntax_of
from turbofit.cli.usage_errors import WORDS

if TYPE_CHECKING:
    import click

    from turbofit.cli.options.profile import Profile, ProfileSection
    from turbofit.core.json_types import Options


_META: Final = "turbofit.profile"


def sections() -> dict[str, ProfileSection]:
    """The sections of a profile by heading: the fields from which the command line is made."""
    from turbofit.cli.options.profile import ProfileSection
    from turbofit.gateway.options import GatewayOptions
    from turbofit.launch.serve.options import ServeOptions
    from turbofit.planning.request import ENGINE_OPTIONS, GROUPS, PlanRequest

    serve = tuple(name for name in ServeOptions.model_fields if name != "plan")
    gateway = tuple(GatewayOptions.model_fields)
    by_heading = {
        "model": ProfileSection(PlanRequest, ("model", "revision")),
        "machine": ProfileSection(PlanRequest, ("on", "gpus")),
        **{
            heading.partition(" ")[0]: ProfileSection(PlanRequest, fields)
            for heading, fields in GROUPS.items()
        },
        "settings": ProfileSection(PlanRequest, ENGINE_OPTIONS),
        "serve": ProfileSection(ServeOptions, serve),
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
    if ctx.info_name == "serve" and "on" in values:
        on, pretend = values["on"], values.get("pretend")
        # `serve` measures the GPUs here whatever machine the profile names, unless it only
        # pretends.
        elsewhere = ("pretend", "dry_run")
        values["on"] = lambda: on if pretend or any(map(ctx.params.get, elsewhere)) else None
    ctx.default_map = values


def defaults(profile: Profile) -> Options:
    """The values of a profile as click's defaults; a secret is read when it is needed.

    The environment's keys override the profile's.
    """
    from turbofit.cli.options.profile import secret_of
    from turbofit.core.process.variables import variables

    values = dict(profile.values)
    if references := values.pop("api_key", ()):
        folder, where = profile.path.parent, f"{profile.path}: gateway.api_key"
        values["api_key"] = lambda: tuple(secret_of(entry, folder, where) for entry in references)
    if variables().keys:
        values.pop("api_key", None)
    return values

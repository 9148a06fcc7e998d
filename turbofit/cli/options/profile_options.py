"""``-f FILE``: a profile's values where the command line has none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from turbofit.cli.command import PATH, WORDS, Argument, Option
from turbofit.cli.terminal.output import say
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.json_types import Options
    from turbofit.core.profile import Profile, ProfileSection

#: What is read where neither a model nor a profile is named.
PROFILE: Final = "turbofit.yaml"
_META: Final = "turbofit.profile"
#: Where a value stands that a profile does not change.
_BEFORE_PROFILES: Final = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def sections() -> dict[str, ProfileSection]:
    """What may stand in a profile, by its heading: the fields that the command line is made of."""
    from turbofit.cli.options.gateway_options import GatewayOptions
    from turbofit.cli.options.launch_options import ModelsOptions, ServeOptions, SharesOptions
    from turbofit.core.profile import ProfileSection
    from turbofit.planning.request import ENGINE_OPTIONS, GROUPS, PlanRequest

    serve = tuple(name for name in ServeOptions.model_fields if name != "plan")
    gateway = tuple(GatewayOptions.model_fields)
    found = {
        "model": ProfileSection(PlanRequest, ("model", "revision"), of_model=True),
        "machine": ProfileSection(PlanRequest, ("on", "gpus")),
        **{
            heading.partition(" ")[0]: ProfileSection(PlanRequest, fields, of_model=True)
            for heading, fields in GROUPS.items()
        },
        "settings": ProfileSection(PlanRequest, ENGINE_OPTIONS, of_model=True),
        "serve": ProfileSection(ServeOptions, serve),
        "sleep": ProfileSection(ModelsOptions, tuple(ModelsOptions.model_fields)),
        "several": ProfileSection(SharesOptions, tuple(SharesOptions.model_fields)),
        "gateway": ProfileSection(GatewayOptions, gateway, secret=frozenset({"api_key"})),
    }
    return {heading: one._replace(lists=_lists(one)) for heading, one in found.items()}


def _lists(section: ProfileSection) -> frozenset[str]:
    from turbofit.cli.options.common_options import form_of

    fields = section.kind.model_fields
    return frozenset(name for name in section.fields if form_of(fields[name]).several)


def profile_option() -> Option:
    """The option; what is read stands behind the command line and the environment."""

    def read(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value is not None and not ctx.resilient_parsing:
            _use(ctx, Path(value))

    return Option(
        "-f", "--file", metavar="FILE", type=PATH, is_eager=True, expose_value=False,
        callback=read, help="a profile, for what stands neither here nor in the environment "
        f"(default: {PROFILE}, where no MODEL is given)",
    )  # fmt: skip


class ModelArgument(Argument):
    """The model; where none is named, that of ``turbofit.yaml``, if there is one."""

    def consume_value(self, ctx: click.Context, opts: Mapping[str, object]) -> Any:
        """The words of the command line, or else what a profile has."""
        if not opts.get(self.name or ""):  # no word is an empty tuple where there may be several
            opts = {name: one for name, one in opts.items() if name != self.name}
        value, source = super().consume_value(ctx, opts)
        named = source is not ParameterSource.DEFAULT or ctx.params.get("plan") is not None
        if named or ctx.resilient_parsing or _META in ctx.meta or not Path(PROFILE).is_file():
            return value, source
        say(f"reading {PROFILE}")
        _use(ctx, Path(PROFILE))
        return super().consume_value(ctx, opts)


def profile_of(ctx: click.Context) -> Profile | None:
    found: Profile | None = ctx.meta.get(_META)
    return found


def read_again(ctx: click.Context) -> Options:
    """The options of a command as they are now: its words, and the profile as it is now.

    Raises:
        UsageError: something in the profile is wrong.
    """
    words = list(ctx.meta[WORDS])
    made = ctx.command.make_context(ctx.info_name, words, auto_envvar_prefix=ctx.auto_envvar_prefix)
    with made as again:
        left_out = ("quiet", "verbose")  # no options of the run
        return {name: value for name, value in again.params.items() if name not in left_out}


def _use(ctx: click.Context, path: Path) -> None:
    """Read a profile, and let its values stand where the command line has none.

    Raises:
        UsageError: something in it is wrong, or it names several models where one is meant.
    """
    from turbofit.core.profile import read_profile

    profile = read_profile(path, sections())
    several = next((one.nargs == -1 for one in ctx.command.params if one.name == "model"), False)
    if len(profile.models) > 1 and not several:
        raise UsageError(
            f"{profile.path} names {len(profile.models)} models, and this command is of one",
            hint="leave all but one of them out",
        )
    ctx.meta[_META] = profile
    found = defaults(profile)
    if several and profile.models:
        found["model"] = [entry["model"] for entry in profile.models]
    elif several and "model" in found:
        found["model"] = [found["model"]]
    if ctx.info_name == "serve" and "on" in found:
        on, pretend = found["on"], found.get("pretend")
        # `serve` measures the GPUs here whatever the profile names, unless it is not for them.
        elsewhere = ("pretend", "dry_run")
        found["on"] = lambda: on if pretend or any(map(ctx.params.get, elsewhere)) else None
    ctx.default_map = found


def each_model(ctx: click.Context, names: Sequence[str]) -> list[Options]:
    """What is asked of each model alone: its name, and what the profile says of it.

    Raises:
        UsageError: a value is wrong, or is for all models together.
    """
    from turbofit.cli.options.common_options import filled
    from turbofit.planning.request import PlanRequest

    profile = profile_of(ctx)
    if profile is None or ctx.get_parameter_source("model") is not ParameterSource.DEFAULT_MAP:
        return [{"model": name} for name in names]
    found = []
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
        found.append(filled(PlanRequest, values).given())
    return found


def defaults(profile: Profile) -> Options:
    """The values of a profile, as click takes defaults; of a secret what finds it when needed.

    The environment's keys come before its.
    """
    from turbofit.core.process.variables import variables
    from turbofit.core.profile import secret_of

    values = dict(profile.of_model(0) if len(profile.models) == 1 else profile.values)
    if references := values.pop("api_key", ()):
        folder, where = profile.path.parent, f"{profile.path}: gateway.api_key"
        values["api_key"] = lambda: tuple(secret_of(one, folder, where) for one in references)
    if variables().keys:
        values.pop("api_key", None)
    return values

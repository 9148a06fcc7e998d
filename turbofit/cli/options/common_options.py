"""Options made from the fields of what they fill, those that several share, and profiles."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import click
from click.core import ParameterSource

from turbofit.cli.command import PATH, Argument, Option
from turbofit.cli.usage_errors import WORDS
from turbofit.core.errors import UsageError
from turbofit.core.messages import option_of
from turbofit.core.process.ports import DEFAULT_PORT, LAST_PORT
from turbofit.core.validation import Metavar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

    from turbofit.cli.options.profile import Profile, ProfileSection
    from turbofit.core.json_types import Options
    from turbofit.core.validation import Validated

T = TypeVar("T", bound="Validated")


class _Text(click.ParamType):  # type: ignore[type-arg] # generic in newer clicks only
    """A text that the field's own type reads; ``choices``, or files, are offered at a TAB."""

    name = "text"

    def __init__(self, choices: tuple[str, ...], *, path: bool) -> None:
        self.choices, self.path = choices, path

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[Any]:
        return _candidates_or_files(self.choices, incomplete) if self.choices or self.path else []


class _Syntax(NamedTuple):
    """What an annotation says of the words that an option takes."""

    metavar: str = "TEXT"
    choices: tuple[str, ...] = ()
    flag: bool = False
    optional: bool = False
    several: bool = False
    repeatable: bool = False


def options_of(
    kind: type[Validated], fields: Iterable[str] = (), *, group: str = "", **attributes: Any
) -> Iterator[Option]:
    """Options of these fields, or of all, in a help group; what is not given keeps its default."""
    for name in fields or kind.model_fields:
        yield _option(name, kind.model_fields[name], group, attributes)


def grouped_options(kind: type[Validated], groups: Mapping[str, Iterable[str]]) -> Iterator[Option]:
    for group, fields in groups.items():
        yield from options_of(kind, fields, group=group)


def filled(kind: type[T], given: Options) -> T:
    """The class filled with those of the options that are its fields; errors name the option."""
    values = {
        name: value
        for name in kind.model_fields
        if (value := given.get(name)) is not None and value != ()
    }
    try:
        return kind.of_options(values, option_of)
    except UsageError:
        ctx = click.get_current_context(silent=True)
        explain_fields(kind, (ctx and ctx.info_name) or "serve")
        return kind.of_options(values, option_of)  # says now what the option is for


def explain_fields(kind: type[Validated], command: str) -> None:
    """Describe the fields that have no description, as the command's options."""
    from turbofit.cli.manual import option_texts

    texts = option_texts(command)
    for name, field in kind.model_fields.items():
        field.description = field.description or texts.get(option_of(name))


def syntax_of(field: FieldInfo) -> _Syntax:
    return _syntax(field.annotation, field.metadata)


def _option(name: str, field: FieldInfo, group: str, attributes: dict[str, Any]) -> Option:
    syntax, option = syntax_of(field), option_of(name)
    attributes = {"default": None, "help": field.description, "group": group, **attributes}
    if field.default not in (None, False, ()) and not field.is_required():
        attributes["usual"] = f" (default {_typed(field.default)})"
    if syntax.flag:
        if syntax.optional:
            option += f"/--no-{option.removeprefix('--')}"
        return Option(option, name, is_flag=True, **attributes)
    several = syntax.several and not syntax.repeatable
    return Option(
        option, name, type=_Text(syntax.choices, path=syntax.metavar == "FILE"),
        metavar=f"{syntax.metavar}..." if several else syntax.metavar, several=several,
        multiple=syntax.several, **attributes,
    )  # fmt: skip


def _typed(default: Any) -> str:
    """A default as a person types it: ``1024x768`` of a size, or of several."""
    if not isinstance(default, tuple):
        return str(default)
    nested = default and isinstance(default[0], tuple)
    return " ".join(map(_typed, default)) if nested else "x".join(map(str, default))


def _syntax(annotation: Any, metadata: Iterable[Any] = ()) -> _Syntax:
    for item in metadata:
        if isinstance(item, Metavar):
            return _syntax(annotation)._replace(metavar=item.text, repeatable=item.repeatable)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _syntax(parts[0], parts[1:])
    if origin in (Union, UnionType):
        inner = next(part for part in parts if part is not NoneType)
        return _syntax(inner)._replace(optional=NoneType in parts)
    if origin is Literal:
        choices = tuple(map(str, parts))
        return _Syntax(f"[{'|'.join(choices)}]", choices)
    if origin is tuple:
        inner = _syntax(parts[0])
        return inner._replace(several=len(parts) == 2 and parts[1] is Ellipsis)
    return _Syntax(flag=annotation is bool)


# What is offered at a TAB.


#: How many cards of a kind `--on` offers.
_COUNTS: Final = (1, 2, 4, 8)


def complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from turbofit.core.presets import load_yaml, preset_path

    return _candidates_or_files(sorted(load_yaml(preset_path("models", "aliases"))), incomplete)


def complete_spec(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    from turbofit.machine.presets import preset_names

    names = [f"{n}x{name}" for name in preset_names() for n in _COUNTS]
    return _candidates_or_files(names, incomplete)


def _candidates_or_files(candidates: Iterable[str], incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    items = [CompletionItem(word) for word in candidates if word.startswith(incomplete)]
    return items or [CompletionItem(incomplete, type="file")]


# Options that several commands share.


_KEEP: Final = "LMDeploy settings to keep"

PORT: Final = click.IntRange(1, LAST_PORT)

JSON: Final = Option(
    "--json", "as_json", is_flag=True, form=True, help="one JSON document on stdout"
)
FULL: Final = Option("--full", is_flag=True, form=True, help="everything, on the terminal")
#: The forms of the answer; no command takes both.
FORMS: Final = (JSON, Option("--md", is_flag=True, form=True, help="Markdown on stdout"))
HTML: Final = Option("--html", metavar="FILE", form=True, type=PATH, help="one page; - for stdout")

#: A run of `serve`, by `read_run`.
RUN: Final = Argument(
    "run", metavar="RUN", required=False, type=PATH,
    explained="a run's folder or name, or its model (default: the newest run)",
)  # fmt: skip
API_KEY: Final = Option(
    "--api-key", metavar="KEY", help="the server's key (default: $TURBOFIT_API_KEY)"
)

_SERVER: Final = f"http://127.0.0.1:{DEFAULT_PORT}"
#: A server that runs, by `server_of`, and its model.
SERVER_OPTIONS: Final = (
    Argument(
        "url", metavar="URL", required=False, explained=f"the server's address (default {_SERVER})"
    ),
    Option("--model", help="the model's name (default: the first that the server lists)"),
    API_KEY,
)


def server_of(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """The address and the key of the server that `SERVER_OPTIONS` name."""
    from turbofit.cli.usage_errors import unknown_word
    from turbofit.core.process.variables import variables

    address = url or _SERVER
    if not re.match(r"https?://[^/]", address):
        host = re.search(r"localhost.*|[\w\[].*[.:].*", address.rpartition("://")[2])
        hint = unknown_word(address) or f"write it as {f'http://{host[0]}' if host else _SERVER}"
        if " " in address:
            hint = f"write one as {_SERVER}; questions are typed, or come by stdin, once it answers"
        raise UsageError(f"{address} is no address of a server", hint=hint)
    return address, api_key or next(iter(variables().keys), None)


def model_argument(
    *, required: bool = True, profile: bool = False, several: bool = False
) -> list[click.Parameter]:
    """The model, or several, and its revision; ``profile``: with ``-f FILE``."""
    from turbofit.planning.request import PlanRequest

    explained = PlanRequest.model_fields["model"].description or ""
    model = Argument(
        "model", explained=explained, required=required, nargs=-1 if several else 1,
        metavar="MODEL..." if several else "MODEL", shell_complete=complete_model,
        callback=_each_once if several else None,
    )  # fmt: skip
    options = [profile_option()] if profile else []
    return [model, *options, *options_of(PlanRequest, ["revision"])]


def _each_once(_ctx: click.Context, _param: click.Parameter, names: tuple[str, ...]) -> Any:
    if len(set(names)) < len(names):
        raise UsageError("a model is named twice", hint="name each model once")
    return names


def spec_option() -> Option:
    """``--on`` of a command that plans nothing."""
    return Option("--on", metavar="SPEC", shell_complete=complete_spec, callback=_spec)


def _spec(ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """A SPEC; of ``-`` what comes by stdin (``nvidia-smi | turbofit plan MODEL --on -``)."""
    if value != "-" or ctx.resilient_parsing:
        return value
    return sys.stdin.buffer.read(_LONGEST_SPEC).decode("utf-8", "replace")


def machine_options() -> list[click.Parameter]:
    from turbofit.planning.request import PlanRequest

    return [
        *options_of(PlanRequest, ["on"], shell_complete=complete_spec, callback=_spec),
        *options_of(PlanRequest, ["gpus"]),
    ]


def planning_options() -> list[click.Parameter]:
    """Shape, workload, limits and budgets, and the settings of LMDeploy that are fixed."""
    from turbofit.planning.request import GROUPS, PlanRequest

    return [*grouped_options(PlanRequest, GROUPS), *setting_options()]


def setting_options() -> list[click.Parameter]:
    """LMDeploy's own options; what is set of them is never changed."""
    from turbofit.planning.request import ENGINE_OPTIONS, PlanRequest

    return [*options_of(PlanRequest, ENGINE_OPTIONS, group=_KEEP)]


def planning_keywords(given: Options) -> Options:
    """Those of the options given that a plan is asked for with, checked and typed."""
    from turbofit.planning.request import PlanRequest

    request = filled(PlanRequest, {**given, "model": "-"})
    return {name: value for name, value in request.given().items() if name != "model"}


# ``-f FILE``: a profile's values where the command line has none.


#: Bytes of a SPEC; nvidia-smi's table of eight GPUs has 6,000.
_LONGEST_SPEC: Final = 1 << 20
#: What a profile is called.
PROFILE: Final = "turbofit.yaml"
_META: Final = "turbofit.profile"
#: Where a value stands that a profile does not change.
_BEFORE_PROFILES: Final = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def sections() -> dict[str, ProfileSection]:
    """What may stand in a profile, by its heading: the fields that the command line is made of."""
    from turbofit.cli.options.launch_options import GatewayOptions, ModelsOptions, ServeOptions
    from turbofit.cli.options.profile import ProfileSection
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
    """The option; what is read stands behind the command line and the environment."""

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
    """The options of a command: its words, and the profile as it is now."""
    words = list(ctx.meta[WORDS])
    prefix = ctx.auto_envvar_prefix
    with ctx.command.make_context(ctx.info_name, words, auto_envvar_prefix=prefix) as again:
        left_out = ("quiet", "verbose")  # no options of the run
        return {name: value for name, value in again.params.items() if name not in left_out}


def _use(ctx: click.Context, path: Path) -> None:
    """Read a profile, and let its values stand where the command line has none."""
    from turbofit.cli.options.profile import read_profile

    profile = read_profile(path, sections())
    ctx.meta[_META] = profile
    values = defaults(profile)
    if profile.models:
        values["model"] = [entry["model"] for entry in profile.models]
    if ctx.info_name == "serve" and "on" in values:
        on, pretend = values["on"], values.get("pretend")
        # `serve` measures the GPUs here whatever the profile names, unless it is not for them.
        elsewhere = ("pretend", "dry_run")
        values["on"] = lambda: on if pretend or any(map(ctx.params.get, elsewhere)) else None
    ctx.default_map = values


def each_model(ctx: click.Context, names: Sequence[str]) -> list[Options]:
    """What is asked of each model alone: its name, and what the profile says of it."""
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
    """The values of a profile, as click takes defaults; a secret is looked for when needed.

    The environment's keys come before the profile's.
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

"""The options of a batch except its input and output, and the server that answers."""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple

from pydantic import Field

from turbofit.core.errors import UsageError
from turbofit.core.messages import option_of
from turbofit.core.process.variables import variables
from turbofit.core.validation import SECONDS, Metavar, Validated
from turbofit.gateway.limits.defaults import JsonArguments, JsonSampling
from turbofit.planning.request import PlanRequest, Tokens

Seconds = Annotated[float, Field(gt=0, lt=1e7), SECONDS, Metavar("SECONDS")]

#: Tokens of an answer to an image or a row, which state no limit.
ANSWER_TOKENS: Final = 512
IMAGE_COLUMN: Final = "image"
#: Options of a batch that are passed to the server which it starts.
LAUNCH_OPTIONS: Final = (
    "allowed_media_domains", "default_chat_template_kwargs", "default_sampling", "pretend",
    "no_rehearse",
)  # fmt: skip
#: Requests at once to a server whose capacity is unknown.
_AT_ONCE: Final = 64


class BatchSpec(Validated):
    """One batch: each field is an option."""

    prompt: str | None = Field(
        default=None,
        description="of images: the prompt, with {name}, {stem} and {path} of the file; of rows: "
        "with {COLUMN} (default {prompt})",
    )
    image_column: tuple[Annotated[str, Metavar("COLUMN")], ...] = Field(
        default=(),
        description="columns with an image: a path, an address or, in Parquet, its bytes "
        f"(default {IMAGE_COLUMN}, where it is there)",
    )
    max_tokens: Tokens | None = Field(
        default=None,
        description="tokens of an answer, for items that state none (default "
        f"{ANSWER_TOKENS}; of a JSONL file: none)",
    )
    retry_failed: bool = Field(default=False, description="items that failed before are sent again")
    timeout: Seconds = Field(default=3600.0, description="the longest that one answer may take")
    patience: Seconds = Field(
        default=600.0,
        description="with --url: how long a server that does not answer is waited for",
    )
    allowed_media_domains: tuple[Annotated[str, Metavar("DOMAIN")], ...] = Field(
        default=(),
        description="without --url: the server fetches images from these: example.com, "
        "*.example.com",
    )
    default_chat_template_kwargs: JsonArguments | None = Field(
        default=None, description="without --url: of the server, as serve's"
    )
    default_sampling: JsonSampling | None = Field(
        default=None, description="without --url: of the server, as serve's"
    )
    pretend: bool = Field(
        default=False, description="without --url: on pretend GPUs, where nothing is computed"
    )
    no_rehearse: bool = Field(
        default=False, description="without --url: do not run the plan on pretend GPUs first"
    )

    @property
    def most_tokens(self) -> int | None:
        """The limit of answers to items that state none; None leaves it to the kind of input."""
        return self.max_tokens or (self.default_sampling or {}).get("max_tokens")

    def check(self, *, url: str | None) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: an option is for the other kind of server.
        """
        if url is None:
            if "patience" in self.model_fields_set:
                raise UsageError(
                    "--patience is for a server that --url names",
                    hint="leave --patience out: turbofit's server is waited for",
                )
            return
        for name in LAUNCH_OPTIONS:
            if getattr(self, name):
                raise UsageError(
                    f"{option_of(name)} is for a server that is started, and --url names one that"
                    " runs",
                    hint=f"leave {option_of(name)} out, or give --model instead of --url",
                )


class BatchTarget(NamedTuple):
    """A running server at ``url``, or a server that is planned for ``request``.

    ``at_once``: requests at once; 0 means as many as the planned server runs, and a few that wait.
    """

    url: str | None = None
    key: str | None = None
    model: str | None = None
    at_once: int = _AT_ONCE
    request: PlanRequest | None = None


def target_of(url: str | None, key: str | None, request: PlanRequest | None) -> BatchTarget:
    """The server that answers: a running one, by default with the environment's key, or a new one.

    Raises:
        UsageError: neither is given, or options of a plan are given for a running server.
    """
    if url is None:
        if request is None or not request.model:
            raise UsageError(
                "nobody is named who answers",
                hint="add --url http://127.0.0.1:23333 of a server, or --model MODEL to start one",
            )
        if key is not None:
            raise UsageError("--api-key is for a server that --url names", hint="leave it out")
        return BatchTarget(request=request, at_once=request.concurrency or 0)
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{url} is no address of a server", hint=f"write it as http://{url}")
    given = {} if request is None else request.given()
    at_once = given.pop("concurrency", _AT_ONCE)
    model = given.pop("model", None) or None
    if given:
        option = option_of(next(iter(given)))
        raise UsageError(
            f"{option} is of a plan, and --url names a server that runs already",
            hint=f"leave {option} out, or give --model alone instead of --url",
        )
    return BatchTarget(url, key or next(iter(variables().keys), None), model, at_once)

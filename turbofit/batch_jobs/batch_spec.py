"""The options of a batch besides its input and output."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from turbofit.core.validation import SECONDS, Metavar, Validated
from turbofit.planning.request import Positive, Tokens

Seconds = Annotated[float, Field(gt=0, lt=1e7), SECONDS, Metavar("SECONDS")]

#: Tokens of an answer to an image of a folder, which states no limit.
ANSWER_TOKENS: Final = 512


class BatchSpec(Validated):
    """One batch: each field is an option."""

    url: Annotated[str | None, Metavar("URL")] = Field(
        default=None, description="a server that runs (else --model is served, and ends with it)"
    )
    model: str | None = Field(
        default=None,
        description="what to serve; with --url the name to ask for (default: each item's, or the "
        "first that the server lists)",
    )
    prompt: str | None = Field(
        default=None,
        description="of a folder's images: what to ask, with {name}, {stem} and {path} of the file",
    )
    max_tokens: Tokens | None = Field(
        default=None,
        description="tokens of an answer, for items that state none (default "
        f"{ANSWER_TOKENS}; of a JSONL file: none)",
    )
    concurrency: Positive | None = Field(
        default=None,
        description="items under way at once (default: what a server of this machine runs, and an "
        "eighth more; else 64)",
    )
    timeout: Seconds = Field(default=3600.0, description="the longest that one answer may take")
    patience: Seconds = Field(
        default=600.0,
        description="with --url: how long a server that does not answer is waited for",
    )

"""What a person may ask of `turbofit page`: the choices that the site offers."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field
from typing_extensions import Self

from turbofit.core.errors import UsageError
from turbofit.core.units import GIB
from turbofit.core.validation import Metavar, Validated, parsed
from turbofit.planning.request import Bytes, PlanRequest, Positive, Tokens

__all__ = ["SiteRequest"]

#: The most used models, small to large. Others are left out only to save minutes.
_MODELS: Final = (
    "internvl3-2b", "internvl3-8b", "internvl3.5-8b", "internvl3-38b-awq", "qwen2.5-vl-3b",
    "qwen2.5-vl-7b", "qwen2.5-vl-7b-awq", "qwen2.5-vl-72b-awq", "qwen3-vl-8b", "gemma-3-12b",
)  # fmt: skip
_CARDS: Final = (
    "rtx3060", "rtx4060ti-16g", "rtx3090", "rtx4090", "rtx5090", "t4", "l4", "a10", "l40s",
    "a100-80g", "h100",
)  # fmt: skip


def _load(text: str, name: str) -> tuple[int, tuple[int, int] | None]:
    """``4@1280x720`` is four images of that size, ``2`` two of the worst size."""
    count, at, size = text.partition("@")
    if not re.fullmatch(r"\d{1,9}", count) or bool(at) != bool(size):
        raise UsageError(f"{name} {text!r} is not N or N@WxH", hint="write it as 4@1280x720")
    values = {"model": "-", "images": count, **({"image_size": size} if size else {})}
    request = PlanRequest.of_options(values, lambda _: name)
    return request.images, request.image_size


Names = Annotated[tuple[Annotated[str, Metavar("NAME")], ...], Field(strict=False)]
Counts = Annotated[tuple[Positive, ...], Field(strict=False)]
Sizes = Annotated[tuple[Bytes, ...], Field(strict=False)]
Contexts = Annotated[tuple[Tokens, ...], Field(strict=False)]
Load = Annotated[
    tuple[int, tuple[int, int] | None], Field(strict=False), parsed(_load), Metavar("N@WxH")
]
Loads = Annotated[tuple[Load, ...], Field(strict=False)]


class SiteRequest(Validated):
    """The points of the site; every combination of them is planned. Empty is the default."""

    all: bool = Field(
        default=False,
        description="more of each list that is not given: 17,820 plans, some minutes",
    )

    models: Names = Field(
        default=(), description=f"names that `turbofit models` lists (default: {' '.join(_MODELS)})"
    )
    cards: Names = Field(
        default=(), description=f"names that `turbofit gpus` lists (default: {' '.join(_CARDS)})"
    )
    counts: Counts = Field(default=(), description="GPUs of a machine (default: 1 2 4)")
    used: Sizes = Field(
        default=(),
        description="memory of each GPU that others hold, beside none (with --all: 2GiB)",
    )
    images: Loads = Field(
        default=(),
        description="images a request and their size, beside one of the worst size (default: "
        "1@1920x1080; with --all 4@1280x720 too)",
    )
    contexts: Contexts = Field(
        default=(),
        description="tokens of a request, beside what turbofit chooses (default: 8192; with --all "
        "32768 too)",
    )
    concurrencies: Counts = Field(
        default=(),
        description="requests at once, beside what turbofit chooses (with --all: 8 32)",
    )

    def complete(self) -> Self:
        """The same with the default for all that is empty."""
        defaults = {**_DEFAULTS, **(_MORE if self.all else {})}
        return self.model_copy(
            update={name: value for name, value in defaults.items() if not getattr(self, name)}
        )


_DEFAULTS: Final[dict[str, object]] = {
    "models": _MODELS,
    "cards": _CARDS,
    "counts": (1, 2, 4),
    "images": ((1, (1920, 1080)),),
    "contexts": (8192,),
}
_MORE: Final[dict[str, object]] = {
    "used": (2 * GIB,),
    "images": ((1, (1920, 1080)), (4, (1280, 720))),
    "contexts": (8192, 32768),
    "concurrencies": (8, 32),
}

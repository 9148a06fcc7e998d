"""Options of `plan` and `serve` for several models on the same cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from turbofit.core.errors import UsageError
from turbofit.core.validation import Metavar, Validated, parsed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SharesOptions"]

_MOST_SHARE: Final = 1e6


def _shares(text: str, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        model, sign, value = part.strip().rpartition("=")
        try:
            share = float(value) if sign else 0.0
        except ValueError:
            share = 0.0
        if not model or not 0 < share < _MOST_SHARE or model in found:
            raise UsageError(
                f"{name} {part.strip()!r} is no share, or stands twice",
                hint="write it as MODEL=2,MODEL=1",
            )
        found[model] = share
    return found


class SharesOptions(Validated):
    """How several models divide the cards."""

    share: Annotated[dict[str, float] | None, parsed(_shares), Metavar("MODEL=N,...")] = Field(
        default=None,
        description="requests that each model's cache holds, beside the others' (default: as many "
        "for each): A=2,B=1",
    )

    def of_models(self, models: Sequence[str]) -> tuple[float, ...]:
        """Each model's share; 1 where none is given.

        Raises:
            UsageError: a share of a model that is not there or alone, or a model stands twice.
        """
        for name in self.share or {}:
            if name not in models:
                raise UsageError(
                    f"--share names {name}, which is not among the models",
                    hint=f"they are {', '.join(models)}",
                )
        if self.share and len(models) == 1:
            raise UsageError(
                "--share divides cards between models, and there is one",
                hint="leave --share out, or name the other models",
            )
        if len(set(models)) < len(models):
            raise UsageError("a model is named twice", hint="name each model once")
        return tuple((self.share or {}).get(name, 1.0) for name in models)

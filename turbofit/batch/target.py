"""Who answers a batch, from what a person gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.process.variables import variables

if TYPE_CHECKING:
    from turbofit.planning.request import PlanRequest

__all__ = ["AT_ONCE", "BatchTarget", "target_of"]

#: Requests at once to a server of which nothing is known.
AT_ONCE: Final = 64


class BatchTarget(NamedTuple):
    """A server that runs, by its ``url``, or one that is planned by ``request``."""

    url: str | None = None
    key: str | None = None
    model: str | None = None
    at_once: int = AT_ONCE
    request: PlanRequest | None = None


def target_of(url: str | None, key: str | None, request: PlanRequest | None) -> BatchTarget:
    """Who answers.

    Args:
        url: of a server that runs.
        key: its API key; None is the environment's.
        request: the plan that is wanted; of a server that runs only the model and the number of
            requests at once mean something. None, or without a name, where no model is named.

    Raises:
        UsageError: neither or too much is given.
    """
    if url is None:
        if request is None or not request.model:
            raise UsageError(
                "nobody is named who answers",
                hint="add --url http://127.0.0.1:23333 of a server, or --model MODEL to start one",
            )
        if key is not None:
            raise UsageError("--api-key is for a server that --url names", hint="leave it out")
        return BatchTarget(request=request)
    if not url.startswith(("http://", "https://")):
        raise UsageError(
            f"{url} is no address of a server", hint="write it as http://127.0.0.1:23333"
        )
    given = {} if request is None else request.given()
    at_once = given.pop("concurrency", AT_ONCE)
    model = given.pop("model", None) or None
    if given:
        option = f"--{next(iter(given)).rstrip('_').replace('_', '-')}"
        raise UsageError(
            f"{option} is of a plan, and --url names a server that runs already",
            hint=f"leave {option} out, or give --model alone instead of --url",
        )
    return BatchTarget(url, key or next(iter(variables().keys), None), model, at_once)

"""Promises of a plan that its engine did not keep, although nothing died."""

from __future__ import annotations

from turbofit.core.json_types import Document
from turbofit.core.plan import End

__all__ = ["broken_promise", "refused_in"]


def broken_promise(case: str, why: str) -> End:
    """The end of a rehearsal in which nothing died, and a promise was not kept in a case."""
    return End(kind="refused", phase=f"case {case}", where=why)


def refused_in(case: Document, beyond: int) -> End | None:
    """A sentence that says which promised requests the engine refused; None: it took all.

    Args:
        case: its ``name`` and ``statuses``, how many requests ended how.
        beyond: requests that are longer than the plan promises: they may be refused.
    """
    refused = {name: count for name, count in case["statuses"].items() if name != "finished"}
    if sum(refused.values()) <= beyond:
        return None
    said = ", ".join(f"{count} {name}" for name, count in refused.items())
    why = f"the engine refused requests that the plan promises: {said}"
    return broken_promise(case["name"], why)

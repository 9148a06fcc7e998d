"""What a rank launcher (torchrun, srun, mpirun) would do to an engine over several GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["rank_warning"]


def rank_warning(tp: int, environ: Mapping[str, str]) -> str | None:
    """What happens when a rank launcher (torchrun, srun, mpirun) starts an engine with tp > 1.

    TurboMind drives all GPUs of a group from one process: each rank would start a whole engine.
    """
    if tp < 2:
        return None
    world = _number(environ.get("WORLD_SIZE"))
    rank = environ.get("LOCAL_RANK")
    if world is not None and world > 1:
        seen, engines = f"WORLD_SIZE={world}", f"{world} whole engines"
    elif rank is not None:
        seen, engines = f"LOCAL_RANK={rank}", "a whole engine"
    else:
        return None
    return (
        f"{seen} is set, so a rank launcher like torchrun runs this: with tp {tp} its ranks would "
        f"start {engines} on the same cards; start it once, without the launcher"
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None

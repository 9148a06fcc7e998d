"""The result of the search for one engine, before it is put into words."""

from __future__ import annotations

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import HostMemory, Settings, Throughput
from turbofit.core.struct import Struct
from turbofit.memory.account import Account
from turbofit.memory.engine import Engine
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.explain.plan_document import accounts_of, host_of, host_problem
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.search import Found, search
from turbofit.tuner.speed.throughput import total

__all__ = ["EngineFit", "fit_of", "fit_on_host"]


class EngineFit(Struct):
    """The best shape of one engine, with its accounts and what it takes of the host.

    ``fewer`` says why there are fewer engines than the GPUs hold, where that is so.
    """

    request: ResolvedRequest
    engine: Engine
    found: Found
    vision_load: VisionLoad
    accounts: tuple[Account, ...]
    host: HostMemory
    host_problem: str | None
    fewer: str = ""

    @property
    def fits(self) -> bool:
        """Whether GPUs and host hold it."""
        return self.found.best.fits and self.host_problem is None

    @property
    def settings(self) -> Settings:
        """The engine's options; of the weakest group where each has its own."""
        return self.found.best.settings

    @property
    def limit(self) -> int | None:
        """The image limit that is promised; None where no images are."""
        best = self.found.best
        return best.shape.limit if best.vision_load.units_per_image else None

    @property
    def tokens(self) -> int:
        """KV tokens of the smallest cache."""
        return min(
            account.tokens_at(account.settings.cache_max_entry_count) for account in self.accounts
        )

    @property
    def at_once(self) -> int:
        """Requests that all engines together run at once."""
        return sum(account.settings.max_batch_size for account in self.accounts)

    @property
    def throughput(self) -> Throughput | None:
        """The forecast of speed of all groups; None where there is none."""
        speeds = self.found.best.speeds
        return total(speeds, self.request.machine.measured) if speeds else None


def fit_of(request: ResolvedRequest, engine: Engine) -> EngineFit:
    """Search for one engine.

    Raises:
        UsageError: something asked for cannot be used here at all.
    """
    found = search(request, engine)
    best = found.best
    vision_load = replace(best.vision_load, units_per_forward=best.shape.units_per_forward)
    groups = best.shape.groups
    settings = [best.of_group(group).settings for group in groups]
    accounts = accounts_of(request, settings, groups, vision_load, engine)
    host = host_of(request, accounts, engine)
    return EngineFit(
        request=request,
        engine=engine,
        found=found,
        vision_load=vision_load,
        accounts=accounts,
        host=host,
        host_problem=host_problem(host),
    )


def fit_on_host(request: ResolvedRequest, engine: Engine) -> EngineFit:
    """The result for the engine, with fewer copies where host memory does not suffice for all.

    Where no such number of copies fits, the one that holds the most requests at once.

    Raises:
        UsageError: something asked for cannot be used here at all.
    """
    made = fit_of(request, engine)
    if made.host_problem is None or request.replicas is not None or request.groups is not None:
        return made
    planned, most = made.found.best.shape.replicas, made
    for replicas in range(planned - 1, 0, -1):
        try:
            fewer = fit_of(replace(request, replicas=replicas), engine)
        except TurbofitError:
            continue
        if fewer.host_problem is not None or not fewer.found.best.serves:
            continue
        fewer = replace(fewer, fewer=f"replicas {replicas}: host memory does not do for {planned}")
        if fewer.fits:
            return fewer
        if most is made or fewer.found.best.held > most.found.best.held:
            most = fewer
    return most

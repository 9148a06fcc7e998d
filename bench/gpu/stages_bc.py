"""Stages b, c and t, and the one of a that needs an engine: what is tried, of which model.

A stage that needs another's result says so where that is missing. Each is one document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu.acts import beside, bisect, free_seen, rehearsed, trial
from bench.gpu.load import Load
from bench.gpu.run import NotRunError, Run
from bench.gpu.shapes import Shape, defaults, fixed, planned, with_ratio
from bench.gpu.tuning import T, tuned
from bench.gpu.worst import SECONDS, sized, sizes, told
from turbofit.core.errors import DoesNotFitError, PackageError, TurbofitError
from turbofit.core.plan import Plan
from turbofit.planning.checks import refuse
from turbofit.planning.examine.scene import Scene, Sources

__all__ = ["ADVICE", "B", "C", "Stages"]

#: TurboMind first, then the PyTorch engine; the smallest first.
B = (
    Shape("qwen2-vl-2b"), Shape("qwen2-vl-7b"), Shape("internvl2-8b"),
    Shape("qwen2-vl-2b", "pytorch"), Shape("llava-1.5-7b", "pytorch"),
)  # fmt: skip
C = (Shape("qwen2-vl-7b"), Shape("internvl2-8b"))
#: Ratios that people are told to take.
ADVICE = (0.5, 0.4, 0.2)
PREFILLS = (1024, 4096, 8192)
#: Tiles, or pixels, that variants hold images to.
TILES, PIXELS = (1, 6), (200704, 1003520)
#: What somebody who tries settings through would try.
GRID = tuple((ratio, prefill) for ratio in (0.6, 0.7, 0.8, 0.9) for prefill in (2048, 8192))
#: Of the last stage, where loads have as many requests as they have by default.
_WORST, _REQUESTS = 1000, 200
#: How many times a trial's seconds one tuning may take.
_TRIALS = 2


class Stages:
    """All of them.

    Args:
        run: where documents go.
        scratch: for checkpoints and logs.
        seconds: a trial may take.
        environ: of the programs.
        label: how much of the card was left, in names of documents.
        requests: of a load.
        rehearse: whether trials stand beside rehearsals too.
        step: thousandths of the ratio at which the oracle's bisection ends.
    """

    def __init__(
        self, run: Run, scratch: Path, seconds: float, environ: Mapping[str, str], label: str,
        requests: int = _REQUESTS, rehearse: bool = True, step: int = 4,
    ) -> None:  # fmt: skip
        self.run, self.scratch, self.seconds = run, scratch, seconds
        self.environ, self.label, self.requests = environ, label, requests
        self.rehearses, self.step = rehearse, step

    def all(self) -> None:
        """In order: a's free memory, b by models, c, t."""
        if self.run.wants("a"):
            self._stage("a-free-" + B[0].name, lambda: self._free(B[0]))
        for shape in B:
            if self.run.wants("b"):
                self._b(shape)
        for shape in C:
            if self.run.wants("c"):
                self._c(shape)
        for shape in T if self.run.wants("t") else ():
            self._stage(f"t-{shape.name}", lambda one=shape: self._tuned(one))

    def _tuned(self, shape: Shape) -> dict[str, Any]:
        """What tuning finds under stage c's load, in a few times a trial's seconds."""
        refuse(Scene(Sources(), "launch", plan=planned(shape, self.scratch)))
        seconds = min(_TRIALS * self.seconds, self.run.left)
        load = Load(requests=self.requests, concurrency=16, seconds=self.seconds / 2)
        return tuned(shape, self.scratch, load, seconds, self.environ)

    def _stage(self, name: str, act: Callable[[], dict[str, Any]]) -> None:
        def guarded() -> dict[str, Any]:
            try:
                return act()
            except (PackageError, DoesNotFitError) as exc:
                raise NotRunError(exc.message) from None
            except TurbofitError as exc:
                raise RuntimeError(exc.message) from None

        self.run.stage(f"{name}{self.label}", guarded)

    def _trial(self, plan: Plan, name: str, load: Load | None = None) -> dict[str, Any]:
        refuse(Scene(Sources(), "launch", plan=plan))
        whole = self.seconds
        if load is not None:  # and what warms each way up
            whole += len(load.ways) * load.seconds * (1 + 1 / load.turns)
        seconds = min(whole, self.run.left)
        if self.label not in name:
            name += self.label
        found = trial(plan, name, self.scratch, seconds, self.environ, load, self.run.out)
        if found["outcome"] == "out_of_time" and seconds < whole:
            raise NotRunError("time was over")
        return found

    def _rehearsed(self, plan: Plan, name: str) -> dict[str, Any]:
        seconds = min(self.seconds, self.run.left)
        if not seconds:
            return {"not_rehearsed": "time was over"}
        return rehearsed(plan, name, self.scratch, seconds, self.environ)

    def _measured(self, plan: Plan, name: str) -> dict[str, Any]:
        """A trial with its rehearsal and its forecast."""
        if not plan.fits:
            raise NotRunError(plan.verdict)
        found = self._trial(plan, name)
        return beside(plan, found, self._rehearsed(plan, name) if self.rehearses else None)

    def _free(self, shape: Shape) -> dict[str, Any]:
        """What the card took before the cache that no rehearsal sees, beside its estimates."""
        plan = planned(shape, self.scratch)
        if not plan.fits:
            raise NotRunError(plan.verdict)
        name = f"a-free-{shape.name}"
        found = self._trial(plan, name)
        seen = self._rehearsed(plan, name) if self.rehearses else {"not_rehearsed": "not asked for"}
        return {**found, **free_seen(plan, found, seen)}

    def _b(self, shape: Shape) -> None:
        name, scratch = f"b-{shape.name}", self.scratch

        def variant(ending: str, make: Callable[[], Plan]) -> None:
            self._stage(f"{name}-{ending}", lambda: self._measured(make(), f"{name}-{ending}"))

        variant("plan", lambda: planned(shape, scratch))
        self._stage(f"{name}-defaults", lambda: self._defaults(shape))
        for ratio in ADVICE:
            variant(
                f"ratio-{ratio}",
                lambda r=ratio: planned(
                    shape, scratch, cache_max_entry_count=r, **fixed(planned(shape, scratch))
                ),
            )
        for prefill in PREFILLS:
            variant(
                f"prefill-{prefill}",
                lambda n=prefill: planned(shape, scratch, max_prefill_token_num=n),
            )
        for limit in self._limits(shape):
            value = next(iter(limit.values()))
            variant(f"units-{value}", lambda one=limit: planned(shape, scratch, **one))
        self._stage(f"{name}-oracle", lambda: self._oracle(shape, f"{name}-oracle{self.label}"))

    def _limits(self, shape: Shape) -> list[dict[str, int]]:
        if shape.model.startswith("internvl"):
            return [{"max_dynamic_patch": n} for n in TILES]
        return [{"max_pixels": n} for n in PIXELS] if shape.model.startswith("qwen") else []

    def _defaults(self, shape: Shape) -> dict[str, Any]:
        """LMDeploy's own settings, with the worst image that an ordinary client can send."""
        plan = defaults(shape, self.scratch)
        return beside(plan, self._trial(plan, f"b-{shape.name}-defaults"), None)

    def _oracle(self, shape: Shape, name: str) -> dict[str, Any]:
        """The highest ratio that survives the plan's worst requests, all else being the plan's."""
        first = self.run.read(f"b-{shape.name}-plan{self.label}")
        if first is None or first["outcome"] != "survived":
            raise NotRunError("the plan itself did not survive, or was not run")
        plan = planned(shape, self.scratch)
        low = round(1000 * first["settings"]["cache_max_entry_count"])
        steps = self.run.steps(name)

        def try_at(thousandths: int) -> str:
            if not self.run.left:
                raise NotRunError("time was over; what is known is kept")
            found = self._trial(with_ratio(plan, thousandths / 1000), f"{name}-{thousandths}")
            outcome = str(found["outcome"])
            if outcome not in ("survived", "died"):
                raise RuntimeError(f"at {thousandths / 1000}: {outcome}: {found.get('said')}")
            self.run.keep(name, {**steps, str(thousandths): outcome})
            print(f"{name}: {thousandths / 1000:.3f} {outcome}", flush=True)
            return outcome

        best = bisect(low, 999, try_at, steps, self.step)
        return {
            "code": 0, "plan": low / 1000, "oracle": best / 1000, "share": low / best,
            "steps": steps,
        }  # fmt: skip

    def _c(self, shape: Shape) -> None:
        name, scratch = f"c-{shape.name}", self.scratch
        ways = ("direct", "gateway") if _has_gateway() else ("direct",)
        load = Load(
            requests=self.requests, concurrency=16, seconds=self.seconds / 2, ways=ways
        )  # fmt: skip

        def speed(ending: str, make: Callable[[], Plan], one: Load = load) -> None:
            def act() -> dict[str, Any]:
                plan = make()
                found = self._trial(plan, f"{name}-{ending}", one)
                return {**found, "verdict": plan.verdict, "tokens": plan.kv.tokens}

            self._stage(f"{name}-{ending}", act)

        speed("plan", lambda: self._speedy(shape))
        speed("defaults", lambda: defaults(shape, scratch))
        for ratio in ADVICE:
            speed(
                f"ratio-{ratio}",
                lambda r=ratio: defaults(shape, scratch, cache_max_entry_count=r),
            )
        for ratio, prefill in GRID:
            speed(
                f"grid-{ratio}-{prefill}",
                lambda r=ratio, n=prefill: defaults(
                    shape, scratch, cache_max_entry_count=r, max_prefill_token_num=n
                ),
            )
        self._stage(f"{name}-thousand", lambda: self._thousand(shape))

    def _thousand(self, shape: Shape) -> dict[str, Any]:
        """Worst-case requests through the gateway, of a size at which they end in four minutes."""
        if not _has_gateway():
            raise NotRunError("the gateway's packages are not here: pip install '.[gateway]'")
        wanted = _WORST * self.requests // _REQUESTS
        one = sized(partial(self._speedy, shape), sizes(shape.model), wanted)
        load = Load(
            requests=one.requests, concurrency=16, seconds=2 * SECONDS, tokens=4, worst=True,
            ways=("gateway",), warm=4, turns=1,
        )  # fmt: skip
        found = self._trial(one.plan, f"c-{shape.name}-thousand", load)
        return {
            **found, "size": told(one, wanted), "verdict": one.plan.verdict,
            "tokens": one.plan.kv.tokens,
        }  # fmt: skip

    def _speedy(self, shape: Shape, **limits: Any) -> Plan:
        made = planned(shape, self.scratch, max_batch_size=16, **limits)
        if not made.fits:
            raise NotRunError(made.verdict)
        return made


def _has_gateway() -> bool:
    return all(find_spec(name) is not None for name in ("aiohttp", "httptools", "PIL"))

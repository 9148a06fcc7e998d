"""One engine on this node, launched and watched as `turbofit serve` does, in a thread of its own.

All that concerns one machine stays as on one machine: the reservation, the last look at the GPUs,
the overlay, the worst-case requests, restarts, and the ladder where memory runs out. Only the
gateway is elsewhere: a `Forwarder` stands in its place.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.errors import DoesNotFitError, TurbofitError
from turbofit.launch.cluster.engine_spec import EngineState
from turbofit.launch.cluster.forward import Forwarder
from turbofit.launch.cluster.tls import server_context

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from turbofit.core.plan import Plan
    from turbofit.launch.cluster.engine_spec import EngineSpec
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.planner import Planner
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest

__all__ = ["HostedEngine", "prepare_environment"]

_WARNINGS: Final = 20
#: How Ray's own traffic is kept private, whichever Ray it is.
_KEPT: Final = ("RAY_AUTH", "RAY_TLS_", "RAY_USE_TLS")


def prepare_environment(plan: Plan) -> None:
    """Make this process's environment one that an engine can be started from.

    Ray shows an actor one GPU where the engine has several. And an engine that finds Ray's own
    variables, or a cluster on this host, would join that cluster and wait there for GPUs that are
    reserved for itself: LMDeploy's PyTorch engine begins a Ray of its own instead, as it does on a
    machine without a cluster.
    """
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        if not name.startswith(_KEPT):
            del os.environ[name]
    os.environ["RAY_ADDRESS"] = "local"
    for command in plan.commands:
        os.environ.update(command.env)


class HostedEngine:
    """An engine, from its specification to its end.

    Args:
        engine_spec: what to launch.
    """

    def __init__(self, engine_spec: EngineSpec) -> None:
        from turbofit.launch.serve.supervisor import StopSignal

        self._engine_spec, self.key = engine_spec, engine_spec.key
        self._peers = engine_spec.peers
        self._engine_state = EngineState(pid=os.getpid(), tokens=engine_spec.plan.kv.tokens)
        self._changed = threading.Condition()
        self._forwarder: Forwarder | None = None
        self._warnings: deque[str] = deque(maxlen=_WARNINGS)
        self._stop: StopSignal = StopSignal()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin; `follow` tells what becomes of it."""
        self._thread.start()

    def follow(self, since: int, seconds: float) -> EngineState:
        """Where it stands, as soon as that is newer than ``since``, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._engine_state.number > since, seconds)
            return self._engine_state

    def allow(self, peers: Iterable[str]) -> None:
        """From now on gateways at these addresses may reach the engine."""
        with self._changed:
            self._peers = tuple(peers)
            if self._forwarder is not None:
                self._forwarder.allow(self._peers)

    def stop(self, seconds: float) -> bool:
        """End it in order, within so many seconds; whether it has ended."""
        self._stop.end()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # The door of `session.Job`.

    def open(self, plan: Plan, urls: list[str]) -> list[str]:
        """The engine is ready."""
        from turbofit.gateway.limits.request_limits import bounds_of

        (url,) = urls
        if self._engine_spec.listen:
            port, tls = int(url.rpartition(":")[2]), server_context(os.environ)
            with self._changed:  # `allow` comes before it, or reaches it
                forwarder = Forwarder(self._engine_spec.listen, port, self._peers, tls, self._tell)
                self._forwarder = forwarder
            forwarder.start()
            url = forwarder.url
        bounds = bounds_of(plan)
        self._tell(
            state="ready", url=url, tokens=plan.kv.tokens, gate=bounds.gate, kv=bounds.kv,
        )  # fmt: skip
        return [url]

    def close(self) -> None:
        """The engine is about to end."""
        if self._forwarder is not None:
            self._forwarder.stop()
            self._forwarder = None
        self._tell(state="starting", url="")

    def _run(self) -> None:
        from turbofit.launch.serve.leases import Leases

        try:
            with Leases() as leases:
                self._serve(leases)
            self._tell(state="ended")
        except TurbofitError as exc:
            self._tell(state="failed", error=exc.to_dict()["error"])
        except BaseException as exc:  # noqa: BLE001 - a bug of ours must not look like a silence
            error = {"kind": "bug", "message": f"a bug in turbofit: {type(exc).__name__}: {exc}"}
            self._tell(state="failed", error={**error, "hint": "please report it", "exit_code": 1})

    def _serve(self, leases: Leases) -> None:
        """What `turbofit serve --plan` does, from the last look at the machine on."""
        from turbofit.launch.engine.environment import lmdeploy_if_needed
        from turbofit.launch.serve.download import WeightsFetcher
        from turbofit.launch.serve.job import Job
        from turbofit.launch.serve.planner import Planner, can_rehearse
        from turbofit.launch.serve.record import Record, run_folder
        from turbofit.launch.serve.session import run_session
        from turbofit.planning.checks import refuse
        from turbofit.planning.examine.scene import Scene, Sources

        engine_spec = self._engine_spec
        plan, config = engine_spec.plan, engine_spec.config
        lmdeploy, missing = lmdeploy_if_needed(plan.engine.name)
        if missing is not None and plan.engine.of_lmdeploy:
            raise missing
        refuse(Scene(Sources(), "launch", plan=plan, pretend=config.pretend))
        if leases.alone:
            self._say(f"warning: {leases.alone}")
        planner = Planner(
            _request(engine_spec), None if config.pretend else leases, self._say,
            rehearse=config.rehearse and not config.pretend and can_rehearse(),
        )  # fmt: skip
        plan = self._settled(planner)
        folder = run_folder(plan)
        self._tell(folder=str(folder))
        record = Record(
            folder, model=plan.model.name, pretend=config.pretend, lmdeploy=lmdeploy.version,
            member=engine_spec.name,
        )  # fmt: skip
        job = Job(
            config,
            folder=folder,
            record=record,
            say=self._say,
            on_open=lambda _urls: None,
            lmdeploy=lmdeploy,
            leases=leases,
            fetch=None if config.pretend else WeightsFetcher(self._say),
            replan=lambda changes: self._kept(planner.make(changes)),
            door=self,
        )
        run_session(job, plan, self._stop)

    def _settled(self, planner: Planner) -> Plan:
        """The plan to begin with, reserved: the specification's, or one of the node's own.

        Raises:
            DoesNotFitError: somebody took memory, and nothing else keeps the promise.
            MachineError: a GPU is gone.
        """
        ordered = self._engine_spec.plan
        if not self._engine_spec.config.rehearse or self._engine_spec.config.pretend:
            try:
                planner.take(ordered)
            except DoesNotFitError as exc:
                self._say(f"the machine changed: {exc.message}; planning again")
            else:
                return ordered
        plan = self._kept(planner.make({}))
        if not plan.fits:
            raise DoesNotFitError(plan.verdict, hint="see turbofit machine on the node")
        return plan

    def _kept(self, plan: Plan) -> Plan:
        """A plan made after a lack of memory, if it still keeps what clients were promised.

        Raises:
            DoesNotFitError: it does not.
        """
        promised = self._engine_spec.plan.kv.longest_request_tokens
        if not plan.fits:
            return plan
        if plan.kv.longest_request_tokens < promised:
            raise DoesNotFitError(
                f"it would hold {plan.kv.longest_request_tokens:,} tokens a request, "
                f"{promised:,} are promised",
                hint="turbofit cluster change --context promises less on all nodes",
            )
        for name in ("units_per_image", "units_per_request", "image_tokens_per_request"):
            if getattr(plan.limits, name) < getattr(self._engine_spec.plan.limits, name):
                raise DoesNotFitError(
                    f"{name} would be {getattr(plan.limits, name):,}, "
                    f"{getattr(self._engine_spec.plan.limits, name):,} are promised",
                    hint="turbofit cluster change promises smaller images on all nodes",
                )
        # The gateway holds requests to the promise; what meets in a forward is this plan's own.
        limits = replace(
            self._engine_spec.plan.limits, units_per_forward=plan.limits.units_per_forward
        )
        return replace(plan, limits=limits)

    def _say(self, text: str) -> None:
        if text.startswith("warning: "):
            self._warnings.append(text.removeprefix("warning: "))
        self._tell(said=text)

    def _tell(self, **facts: Any) -> None:
        with self._changed:
            forwarder = self._forwarder
            refused: Sequence[str] = () if forwarder is None else sorted(forwarder.refused)
            warnings = (
                *self._warnings,
                *(f"a connection from {one} was refused" for one in refused),
            )
            number = self._engine_state.number + 1
            self._engine_state = replace(
                self._engine_state, number=number, warnings=warnings, **facts
            )
            self._changed.notify_all()


def _request(engine_spec: EngineSpec) -> PlanRequest:
    """The request for a plan after a lack of memory: these cards, and the promise."""
    plan = engine_spec.plan
    request = engine_spec.config.request.changed(
        tp=len(plan.parallel.groups[0]), replicas=1, engine=plan.engine.name
    )
    if engine_spec.config.pretend:
        return request.changed(on=plan.machine)
    return request.changed(gpus=",".join(gpu.uuid for gpu in plan.gpus))

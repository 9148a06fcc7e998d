"""Runs a whole session over a stand-in for LMDeploy: ``session_driver.py PLAN PORT OPTIONS``.

OPTIONS is JSON: ``timing``, ``fixed`` (keywords that the user set), ``replan`` (``real`` plans
with the tuner on an 8B model, ``none`` is a plan that was given), ``gateway`` (one is at PORT, and
``model`` in ``fixed`` is a folder; else the first engine is) and ``standby`` (one is kept, whatever
memory there is). Planning is turbofit's own.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.process.signals import StoppedError, StopSignal
from turbofit.core.promise import Promise
from turbofit.gateway.config import GatewayConfig
from turbofit.planning import choose
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest
from turbofit.serving import launch_description
from turbofit.serving.engine import standby
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.lmdeploy import Lmdeploy, module_runner
from turbofit.serving.engine.standby import standby_of
from turbofit.serving.ladder import recall
from turbofit.serving.leases import Leases, end_orphans
from turbofit.serving.options import ServeConfig
from turbofit.serving.run import Run
from turbofit.serving.start import follow

#: In the folder ``standin``, which is on the path.
SERVER = "fake_server"


def say(text: str) -> None:
    """Progress, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def run(stop: StopSignal, leases: Leases, stack: ExitStack) -> str:
    """Plan, launch, follow."""
    for text in end_orphans(leases):
        say(text)
    given = json.loads(sys.argv[3])
    fixed: dict[str, Any] = given.get("fixed", {})

    request = PlanRequest(**{"model": "internvl2-8b", "on": sys.argv[1], **fixed})

    def replan(changes: dict[str, Any], promise: Promise | None = None) -> Plan:
        return best_plan(request.changed(**changes), promise=promise)

    vars(choose)["limit_costs"] = lambda *_: ()  # half of a plan's time, which nobody reads here
    plan = replan({})
    changes = recall(plan, "0.18.0", pretend=False)
    if changes:
        say(f"learned {json.dumps(changes)}")
        plan = replan(changes)
    leases.reserve(plan)
    config = ServeConfig(
        model_name="m",
        request=request,
        plan=plan if given.get("replan") == "none" else None,
        timing=Timing(**{"liveness": 0.0, "backoff": 0.1, **given.get("timing", {})}),
        gateway=GatewayConfig(port=int(sys.argv[2])) if given.get("gateway") else None,
        port=int(sys.argv[2]),
        check="auto" if given.get("check", True) else "none",
        no_standby=not given.get("standby", False),
    )
    one = Run(
        config,
        leases,
        say,
        on_open=lambda urls: say("OPEN " + " ".join(urls)),
        lmdeploy=Lmdeploy("0.18.0", module_runner(SERVER)),
        standby=stack.enter_context(standby_of(config, say)),
    )
    vars(standby)["_IMPORTS"][SERVER] = ("asyncio", "http.server")
    vars(standby)["LEAST_AVAILABLE"] = 0
    one.plan, one.changes, one.fixed = plan, changes, fixed
    vars(one.planner)["make"] = replan
    vars(launch_description)["fetched"] = lambda model, _: model  # nothing is downloaded
    one.begin()
    return follow(one, stop).name


def main() -> int:
    """The session; errors as the command line says them."""
    try:
        with StopSignal() as stop, Leases() as leases, ExitStack() as stack:
            say(f"ended {run(stop, leases, stack)}")
    except StoppedError as exc:
        say(f"ended {exc.signal.name} before the launch")
    except TurbofitError as exc:
        say(f"error: {exc.message} | {exc.hint}")
        return exc.exit_code
    return 0


sys.exit(main())

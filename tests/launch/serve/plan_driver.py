"""Plans and reserves as `serve` does, says so, and keeps its lease until its stdin closes.

``plan_driver.py MODEL KEYWORDS``; the machine is NVML's.
"""

from __future__ import annotations

import json
import sys

from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.planner import Planner
from turbofit.planning.request import PlanRequest

with Leases() as leases:
    request = PlanRequest(model=sys.argv[1], **json.loads(sys.argv[2]))
    planner = Planner(request, leases, lambda _: None, rehearse=False)
    plan = planner.make({})
    gpus = {
        gpu.uuid: {
            "need": max(gpu.peak, gpu.load_peak) - gpu.used,
            "free": gpu.free,
            "used": gpu.used,
        }
        for gpu in plan.gpus
    }
    sys.stdout.write(json.dumps({"fits": plan.fits, "verdict": plan.verdict, "gpus": gpus}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()

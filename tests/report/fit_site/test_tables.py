"""The tables: choices say what `turbofit plan --json` says."""

from __future__ import annotations

import subprocess
import sys

from tests.support.processes import gone
from turbofit.report.fit_site.choices import SiteRequest, choices_of
from turbofit.report.fit_site.site import table_of


def test_a_refusal_is_an_answer_too() -> None:
    """So many images fit no context of the model: no plan, but an answer."""
    request = SiteRequest.of(
        models=("llava-1.5-7b",), cards=("rtx4090",), counts=(1,), used=(0,),
        images=((99, None),), contexts=(4096,), concurrencies=(8,),
    )  # fmt: skip
    table = table_of(choices_of(request, "today"), "llava-1.5-7b", "rtx4090")
    said = table.answers[table.order[-1]].verdict
    assert not table.answers[table.order[-1]].fits
    assert "99" in said


def test_a_worker_ends_with_its_parent() -> None:
    begun = (
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from turbofit.report.fit_site.site import begin_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=begin_worker)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", begun], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    assert gone(worker)

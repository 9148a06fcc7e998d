"""Times a card's steps by `calibrate`, and holds plans before and after against loads on it.

    python -m bench.gpu.steps OUT MODEL [--other MODEL] [--twin] [--pretend SPEC --clock N]

Some six minutes on a real card: a start for `calibrate` of MODEL, then one of `serve` with loads
for each model; the other one is forecast by the rates that MODEL's steps show. ``--twin`` makes
checkpoints without weights of presets, for a machine without a network. More options are a plan's.
All of it ends after BUDGET seconds, a variable of the environment.

OUT gets what each command said, the document of `report --share` with the loads, and ``steps.md``:
each timed step beside the constants, and each load beside both forecasts, for as many tokens as the
server counted. It is written anew after each command: nothing is lost where one fails. On pretend
GPUs a host with more to do than it has cores slows loads down: beside each stands the host's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench.gpu import twin
from bench.page import table
from tests.support.processes import free_port
from turbofit.core.machine import Calibration
from turbofit.core.plan import Plan
from turbofit.measure.load.result import LoadResult
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_space import forecast_of
from turbofit.rehearsal.plan_clock import step_table

#: Requests at once, tokens of a prompt and of an answer: of MODEL, and of the other one.
_LOADS = (
    ((1, 512, 128), (16, 512, 128), (16, 2048, 128)), ((1, 512, 128), (16, 512, 128)),
)  # fmt: skip
_HEADS = "load | tokens/s | forecast before | forecast after | load of the host"
_LAST_SECONDS = 40


class Trial:
    """The commands of one trial, which share a state folder below ``out``."""

    def __init__(self, out: Path, options: list[str], budget: float) -> None:
        self.out, self.options, self._ends = out, options, time.monotonic() + budget
        self._page: list[str] = []
        #: Words of `bench` for a token that the server counts; a stand-in's tokenizer counts more.
        self._words = 1.0
        folders = {"XDG_STATE_HOME": out / "state", "TURBOFIT_LEASES": out / "state" / "leases"}
        self._environ = {**os.environ, **{name: str(path) for name, path in folders.items()}}

    def say(self, block: str) -> None:
        """Add a block to the page, and write it."""
        print(block, flush=True)
        self._page.append(block)
        (self.out / "steps.md").write_text("\n\n".join(self._page) + "\n")

    def run(self, name: str, *words: str) -> bytes:
        """Return the output of a turbofit command; its messages go to a log of this name."""
        with (self.out / f"{name}.log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "turbofit", *words], stdout=subprocess.PIPE, stderr=log,
                env=self._environ, check=True,
                timeout=max(1.0, self._ends - time.monotonic()),
            )  # fmt: skip
        (self.out / f"{name}.json").write_bytes(done.stdout)
        return done.stdout

    @contextmanager
    def serving(self, model: str) -> Iterator[str]:
        """Serve a model, and yield its address once it is ready."""
        port = free_port()
        with (self.out / f"serve-{Path(model).name}.log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "turbofit", "serve", model, "--no-rehearse", "--port",
                 str(port), *self.options],
                stdout=subprocess.PIPE, stderr=log, env=self._environ, text=True,
            )  # fmt: skip
            try:
                assert child.stdout is not None
                assert child.stdout.readline(), f"{model} was not served"
                yield f"http://127.0.0.1:{port}"
            finally:
                child.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_LAST_SECONDS)
                child.kill()

    def load(self, url: str, name: str, at_once: int, prompt: int, output: int) -> LoadResult:
        printed = self.run(
            name, "bench", url, "--images", "0", "--output-tokens", str(output), "--json",
            "--prompt-tokens", str(round(prompt * self._words)), "--concurrency", str(at_once),
            "--requests", str(3 * at_once),
        )  # fmt: skip
        found = msgspec.json.decode(printed, type=LoadResult)
        self._words *= prompt / (found.prompt_tokens or prompt)
        return found

    @property
    def runs(self) -> list[Path]:
        """The folders of the runs so far, in their order: `calibrate`, then `serve`."""
        return sorted((self.out / "state" / "turbofit" / "runs").iterdir())


def timed(trial: Trial, model: str) -> None:
    """Time MODEL's steps, and say each beside the constants, with the rates that they show."""
    printed = trial.run("calibrate", "calibrate", model, "--no-rehearse", "--json", *trial.options)
    kept = msgspec.convert(json.loads(printed)["calibrations"][0], Calibration)
    assert kept.steps is not None, "no step was timed"
    plan = Plan.from_json((trial.runs[-1] / "plan.json").read_bytes())
    told = step_table(plan, plan.engines[0])
    rows = [
        (point.words, *(f"{1e3 * one:.3g}" for one in (told.seconds(point), point.seconds)),
         f"{point.seconds / told.seconds(point) - 1:+.1%}", f"{point.spread:.1%}")
        for point in kept.steps.points
    ]  # fmt: skip
    trial.say(table("step | constants, ms | measured, ms | beside | spread", rows))
    trial.say("\n".join(f"- {text}" for text in kept.steps.left_out))
    rates = ((one.of, f"{one.value / 1e9:.5g}", f"{one.spread:.0%}") for one in kept.steps.rates)
    trial.say(table("rate | G/s | spread", rates))


def loaded(trial: Trial, model: str, loads: tuple[tuple[int, int, int], ...]) -> None:
    """Serve a model, and say each load beside the forecasts without and with what was timed."""
    with trial.serving(model) as url:
        after = Plan.from_json((trial.runs[-1] / "plan.json").read_bytes())
        plans = (replace(after, machine=replace(after.machine, calibrations=())), after)
        for load in loads:
            attempt(trial, partial(compared, trial, url, plans, *load))


def compared(
    trial: Trial, url: str, plans: tuple[Plan, Plan], at_once: int, prompt: int, output: int
) -> None:
    """Say a load beside the forecast of each plan."""
    model = plans[0].model.name
    found = trial.load(url, f"load-{model}-{at_once}-{prompt}", at_once, prompt, output)
    counted, speed = round(found.prompt_tokens or prompt), found.output_tokens_per_second
    asked = LoadSpec.of(images=0, prompt_tokens=counted, output_tokens=output)
    rates = (forecast_of(plan, asked, at_once).requests_per_second for plan in plans)
    beside = (f"{rate * output:.4g} ({rate * output / speed - 1:+.1%})" for rate in rates)
    row = (f"{model}, {at_once} at once, {counted} and {output} tokens", f"{speed:.4g}", *beside)
    trial.say(table(_HEADS, [(*row, os.getloadavg()[0])]))


def share(trial: Trial) -> None:
    """Write the document of `calibrate` that others may read; pretend GPUs have none."""
    loads = [word for path in trial.out.glob("load-*.json") for word in ("--load", str(path))]
    run, out = str(trial.runs[0]), str(trial.out / "card.json")
    trial.run("share", "report", run, "--share", "--out", out, *loads)


def main() -> int:
    """Run the trial; returns 1 if a part of it failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.steps", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--other", metavar="MODEL")
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--pretend", metavar="SPEC")
    parser.add_argument("--clock", default="8")
    given, options = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.pretend:
        options += ["--pretend", "--on", given.pretend, "--clock", given.clock]
    trial = Trial(given.out.resolve(), options, float(os.environ.get("BUDGET", "3600")))
    with tempfile.TemporaryDirectory() as folder:
        models = [given.model, given.other] if given.other else [given.model]
        if given.twin:
            for name in models:
                twin.main([name, str(Path(folder) / name)])
            models = [str(Path(folder) / name) for name in models]
        parts = [partial(timed, trial, models[0])]
        parts += [partial(loaded, trial, *one) for one in zip(models, _LOADS, strict=False)]
        parts += [] if given.pretend else [partial(share, trial)]
        return max([attempt(trial, part) for part in parts])


def attempt(trial: Trial, part: Callable[[], None]) -> int:
    """Run a part of the trial; returns 1, and says why on the page, if it failed."""
    try:
        part()
    except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as exc:
        trial.say(f"failed: {exc}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

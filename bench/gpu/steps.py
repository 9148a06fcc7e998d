"""Times a card's steps by `calibrate`, and holds plans before and after against loads on it.

    python -m bench.gpu.steps MODEL OUT [--pretend SPEC --clock N] [-- OPTION...]

Some eight minutes on a real card: a start for `calibrate`, one of `serve`, three loads. OUT gets
each command's output, the document of `report --share` with the loads, and ``steps.md``: each timed
step beside the constants, and each load beside both forecasts. Options after ``--`` are a plan's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench.page import table
from tests.support.processes import Child
from tests.support.serving import Served, free_port, start_turbofit
from turbofit.core.machine import Calibration
from turbofit.core.plan import Plan
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_space import forecast_of, mean_request
from turbofit.rehearsal.plan_clock import step_table

#: Requests at once, tokens of a prompt and of an answer.
_LOADS = ((1, 512, 128), (16, 512, 128), (16, 2048, 128))
_SECONDS = 900


class Trial:
    """The commands of one trial, which share a state folder below ``out``."""

    def __init__(self, model: str, out: Path, options: list[str], pretend: list[str]) -> None:
        self.model, self.out, self._options, self._pretend = model, out, options, pretend
        self.children: list[Child] = []

    def calibrate(self) -> Calibration:
        words = ("calibrate", self.model, *self._options, *self._pretend, "--json")
        child = start_turbofit(self.children, self.out / "state", *words)
        code = child.finish(_SECONDS)
        assert child.process.stdout is not None
        (self.out / "calibrate.json").write_text(document := child.process.stdout.read())
        assert code == 0, child.stderr
        return msgspec.convert(json.loads(document)["calibrations"][0], Calibration)

    def serve(self) -> Served:
        port = str(free_port())
        words = ("serve", self.model, "--port", port, *self._options, *self._pretend)
        served = Served(start_turbofit(self.children, self.out / "state", *words), int(port),
                        self.out / "state")  # fmt: skip
        served.wait()
        return served

    def load(self, url: str, at_once: int, prompt: int, output: int) -> float:
        """Return the tokens a second that `bench` measured."""
        path = self.out / f"load-{at_once}-{prompt}.json"
        words = (
            "bench", url, "--images", "0", "--prompt-tokens", str(prompt), "--output-tokens",
            str(output), "--concurrency", str(at_once), "--requests", str(3 * at_once), "--json",
        )  # fmt: skip
        told = subprocess.run(
            [sys.executable, "-m", "turbofit", *words], stdout=subprocess.PIPE, timeout=_SECONDS,
            check=True,
        )  # fmt: skip
        path.write_bytes(told.stdout)
        return float(json.loads(told.stdout)["output_tokens_per_second"])

    @property
    def runs(self) -> list[Path]:
        """The folders of the runs so far, in their order: `calibrate`, then `serve`."""
        return sorted((self.out / "state" / "turbofit" / "runs").iterdir())

    def share(self) -> None:
        """Write the document of `calibrate` that others may read; pretend GPUs have none."""
        loads = [word for path in self.out.glob("load-*") for word in ("--load", str(path))]
        words = (
            "report",
            str(self.runs[0]),
            "--share",
            "--out",
            str(self.out / "card.json"),
            *loads,
        )
        start_turbofit(self.children, self.out / "state", *words).finish(_SECONDS)

    def end(self) -> None:
        while self.children:
            self.children.pop().kill()


def run(trial: Trial) -> None:
    kept = trial.calibrate()
    assert kept.steps is not None, "no step was timed"
    served = trial.serve()
    after = Plan.from_json((trial.runs[-1] / "plan.json").read_bytes())
    before = replace(after, machine=replace(after.machine, calibrations=()))
    told = step_table(before, before.engines[0])
    steps = [
        (point.words, *(f"{1e3 * one:.3g}" for one in (told.seconds(point), point.seconds)),
         f"{point.seconds / told.seconds(point) - 1:+.1%}", f"{point.spread:.1%}")
        for point in kept.steps.points
    ]  # fmt: skip
    loads = []
    for at_once, prompt, output in _LOADS:
        found = trial.load(served.url, at_once, prompt, output)
        load = LoadSpec.of(
            images=0, prompt_tokens=prompt, output_tokens=output, concurrency=at_once
        )
        forecasts = [
            forecast_of(plan, mean_request(load), at_once).requests_per_second * output
            for plan in (before, after)
        ]
        beside = (f"{one:.4g} ({one / found - 1:+.1%})" for one in forecasts)
        loads.append((f"{at_once} at once, {prompt} and {output} tokens", f"{found:.4g}", *beside))
    trial.share()
    left_out = "".join(f"- {text}\n" for text in kept.steps.left_out)
    page = (
        f"{table('step | constants, ms | measured, ms | beside | spread', steps)}\n\n{left_out}\n"
    )
    heads = "load | tokens/s | forecast before | forecast after"
    (trial.out / "steps.md").write_text(f"{page}{table(heads, loads)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.steps", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pretend", metavar="SPEC")
    parser.add_argument("--clock", default="4")
    words, options = sys.argv[1:], list[str]()
    if "--" in words:
        words, options = words[: words.index("--")], words[words.index("--") + 1 :]
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    pretend = ["--pretend", "--on", given.pretend, "--clock", given.clock] if given.pretend else []
    trial = Trial(given.model, given.out.resolve(), options, pretend)
    try:
        run(trial)
    finally:
        trial.end()
    print((given.out / "steps.md").read_text())


if __name__ == "__main__":
    main()

"""Faults of `faults.run` in which one allocation of LMDeploy's real engine fails."""

from __future__ import annotations

from bench.faults.cases import case
from bench.faults.ground import Ground, Outcome, image


def _fails(number: int, phase: str) -> None:
    """Register one: the number is of InternVL2-1B's start on an RTX 3060."""

    def run(ground: Ground) -> Outcome:
        words = ("internvl2-1b", "--on", "1xrtx3060", "--no-rehearse")
        server = ground.pretend(*words, "--pretend-fail", str(number))
        server.wait(240)
        ended = server.record()["attempts"][0]["ended"]
        fine = server.until_answers(image(448, 448))
        code = server.end()
        return Outcome(
            ok=fine and code == 0 and (ended["kind"], ended["phase"]) == ("out_of_memory", phase),
            said=f"{ended['kind']} in {ended['phase']} named; {server.line('ladder 1/3: ')}",
        )

    case(f"one allocation fails: {phase}", "pretend", "named, planned again, serves")(run)


_fails(100, "weights")
_fails(1616, "cache")
_fails(1700, "warm-up")

"""``serve --pretend --clock N`` end to end: TurboMind's forwards take the plan's seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import Child
from tests.support.serving import image, needs, serve_pretend
from turbofit.core.plan import Plan
from turbofit.measure.load import driver
from turbofit.measure.load.spec import LoadSpec
from turbofit.rehearsal.plan_clock import step_table

pytestmark = [pytest.mark.lmdeploy]
needs("lmdeploy", "fastapi", "torchvision")


def test_a_picture_takes_the_forecasts_time_and_a_load_is_told_in_it(
    children: list[Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("internvl2-1b", "--on", "1xrtx3090", "--engine", "turbomind", "--no-rehearse")
    served = serve_pretend(children, tmp_path, *words, "--drain", "1", "--clock", "2")
    served.wait()
    before = served.ask("/about")[2]
    said = before["clock"]["words"]
    assert said.startswith("time by forecast (")
    assert said.endswith("), 2 times slower than life")
    assert said in served.child.stderr
    assert said in before["notices"]
    # The worst cases of the start took no time.
    assert before["clock"] == {**before["clock"], "busy": 0.0, "late": 0.0, "idle": 0.0}
    status, _, answer = served.chat(image(896, 896), max_tokens=2)
    assert status == 200
    plan = Plan.from_json((served.run / "plan.json").read_bytes())
    table, rule = step_table(plan, plan.engines[0]), plan.model.image_rule
    assert rule is not None
    prompt = answer["usage"]["prompt_tokens"]
    units = rule.units(896, 896, plan.promise.image_limit)
    least = table.image[units] + table.forward[prompt] + prompt**2 / 2 * table.pair
    busy = served.ask("/about")[2]["clock"]["busy"]
    # Beside the prompt: one step, and one or two that LMDeploy prepares ahead.
    assert least + table.forward[1] <= busy <= least + 3 * (table.forward[1] + 0.001)
    monkeypatch.setattr(driver, "HELD_UP", float("inf"))  # whatever else runs on this host
    told: list[str] = []
    load = LoadSpec.of(images=0, concurrency=2, requests=4, output_tokens=4, warm_up=0)
    found = driver.bench(served.url, load, say=told.append)
    assert (found.answered, found.forecast, found.warnings) == (4, said, ())
    assert found.ttft.p50 >= table.forward[1]
    assert told == [f"{said}: the load takes 2 times as long"]
    served.clean()

"""What is shown of a quantisation: its terms, its commands, and a result with its problems."""

from __future__ import annotations

from turbofit.machine.source import machine_from
from turbofit.model.presets import preset_model
from turbofit.model.quantize.fit import quantizing
from turbofit.model.quantize.program import Request
from turbofit.model.quantize.read import Layers, Reading
from turbofit.report.painters.document import Code, FactList, Items, Table, Verdict
from turbofit.report.views.quantize_view import quantizing_view, reading_view


def test_terms_packages_and_commands_are_shown() -> None:
    machine = machine_from("1xrtx3090,ram=64GiB")
    request = Request(name="Qwen/Qwen2.5-VL-7B-Instruct")
    made = quantizing(preset_model("qwen2.5-vl-7b"), machine, request)
    blocks = list(quantizing_view(made))
    facts = dict(next(block for block in blocks if isinstance(block, FactList)).facts)
    assert all(name in facts["card"] for name in ("inverse", "layer", "CUDA context"))
    assert "64.0 GiB" in facts["host memory"]
    packages, commands = [block.text for block in blocks if isinstance(block, Code)]
    assert packages == made.install
    write, run, read = commands.splitlines()
    assert write.endswith("--out quantize.py")
    assert run == "python quantize.py"
    assert f"--read {made.folder}" in read


def test_a_reading_shows_its_problems_and_classes_of_layers() -> None:
    layers = (Layers(name="model.layers.N.x.weight_packed", count=2, packed=True, bytes=8),)
    reading = Reading(
        folder="out", good=False, problems=("a is missing",), layers=layers, group_size=128,
        engines={"turbomind": "", "pytorch": "no"}, packed=2, equal=None, compared=False,
        worst_error=0.0,
    )  # fmt: skip
    blocks = list(reading_view(reading, None))
    assert next(block.items for block in blocks if isinstance(block, Items)) == reading.problems
    assert next(block.tone for block in blocks if isinstance(block, Verdict)) == "bad"
    rows = next(block.rows for block in blocks if isinstance(block, Table))
    assert rows == (("model.layers.N.x.weight_packed", "2", "4", "8 B"),)
    facts = dict(next(block for block in blocks if isinstance(block, FactList)).facts)
    assert (facts["turbomind"], facts["pytorch"]) == ("reads it", "no")

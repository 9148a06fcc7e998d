"""What is shown of a quantisation: its terms, its commands, and a result with its problems."""

from __future__ import annotations

from turbofit.machine.source import machine_from
from turbofit.model.presets import preset_model
from turbofit.model.quantize.fit import quantizing
from turbofit.model.quantize.program import Request
from turbofit.model.quantize.read import Layers, Reading
from turbofit.report.painters.document import Code, FactList, Items, Table, Verdict
from turbofit.report.views.quantize_view import Typed, quantizing_view, reading_view

SHORT = Typed(start=("qwen2.5-vl-7b",))


def shown_commands(spec, typed=SHORT, **options):
    request = Request(name="Qwen/Qwen2.5-VL-7B-Instruct", **options)
    made = quantizing(preset_model("qwen2.5-vl-7b"), machine_from(spec), request)
    blocks = list(quantizing_view(made, typed))
    facts = dict(next(block for block in blocks if isinstance(block, FactList)).facts)
    packages, commands = [block.text for block in blocks if isinstance(block, Code)]
    return made, facts, packages, commands.splitlines()


def test_terms_packages_and_commands_are_shown() -> None:
    made, facts, packages, (write, run, read) = shown_commands("1xrtx3090,ram=64GiB")
    assert all(name in facts["card"] for name in ("inverse", "layer", "CUDA context"))
    assert "64.0 GiB" in facts["host memory"]
    assert packages == made.install
    assert write == (
        "turbofit quantize qwen2.5-vl-7b --calib-samples 256 --calib-seqlen 2048 --out quantize.py"
    )
    assert run == "python quantize.py"
    assert read == f"turbofit quantize qwen2.5-vl-7b --read {made.folder}"


def test_the_commands_have_the_words_that_were_typed() -> None:
    start = ("./my model", "--revision", "v1", "--on", "pasted.txt")
    typed = Typed(start=start, samples="own.jsonl", out="my.py")
    _, _, _, (write, run, read) = shown_commands("1xrtx3060+1xrtx3090,ram=64GiB", typed, samples=7)
    again = "turbofit quantize './my model' --revision v1 --on pasted.txt"
    assert write.startswith(f"{again} --samples own.jsonl --calib-samples 7 ")
    assert write.endswith(" --out my.py")
    assert run == "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1 python my.py"
    assert read.startswith(f"{again} --read ")


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

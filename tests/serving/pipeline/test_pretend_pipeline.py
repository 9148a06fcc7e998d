"""`turbofit.pipeline` in a command of ``turbofit pretend --model NAME``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, run
from tests.support.checkpoints import write_checkpoint
from tests.support.waiting import HANG

pytestmark = pytest.mark.lmdeploy

SCRIPT = """
from lmdeploy import GenerationConfig
from PIL import Image

import turbofit

short = GenerationConfig(max_new_tokens=2)
pipe = turbofit.pipeline("internvl2-2b", context=8192, images=1, tp=4)
end = pipe.async_engine.close
pipe.async_engine.close = lambda: (end(), print("closed"))
seen = pipe(("what?", Image.new("RGB", (640, 480))), gen_config=short)
print(pipe.plan.machine.gpus[3].name, seen.generate_token_len, seen.input_token_len > 256)
"""
README = Path(__file__).parents[3] / "README.md"


def ran(script: str, model: str, folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("lmdeploy")
    (folder / "script.py").write_text(script)
    words = ["--on", "4xrtx3090", "--model", model, "--", sys.executable, "script.py"]
    return subprocess.run(
        [sys.executable, "-m", "turbofit", "pretend", *words],
        cwd=folder, capture_output=True, text=True, timeout=HANG, check=False,
        env={**os.environ, "TURBOFIT_LEASES": str(folder / "leases")},
    )  # fmt: skip


def test_a_pipeline_opens_a_model_without_its_weights(tmp_path: Path) -> None:
    """Over four cards without peer access: its engine answers a picture, and ends with Python."""
    done = ran(SCRIPT, "InternVL2-2B", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("NVIDIA GeForce RTX 3090 2 True\nclosed\n")
    assert "PRETEND GPUs" in done.stderr
    assert not (tmp_path / "leases").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("closed", [True, False])
def test_the_example_of_the_readme_ends_well_each_time(closed: bool, tmp_path: Path) -> None:
    """Ten times: where nobody closed it TurboMind aborted at Python's end, half of the times."""
    text = README.read_text(encoding="utf-8")
    (lines,) = re.findall(r"^(with turbofit.pipeline\(.*\n(?:    .*\n)+)", text, re.MULTILINE)
    if not closed:
        lines = re.sub(r"with (.*) as pipe:.*", r"pipe = \1", lines).replace("\n    ", "\n")
    head = "import turbofit\nfrom PIL import Image\nimage = Image.new('RGB', (640, 480))\n"
    for _ in range(10):
        done = ran(head + lines, "internvl2-8b", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "generate_token_len=" in done.stdout or "text=" in done.stdout, done.stdout


# On LMDeploy's PyTorch engine itself.


WATCH = """
import base64, io, os
os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"
import turbofit
from lmdeploy import GenerationConfig
from PIL import Image
few = GenerationConfig(max_new_tokens=2)
pipe = turbofit.pipeline({folder!r}, engine="pytorch", concurrency=2)
def jpeg(wide, high):
    file = io.BytesIO()
    Image.new("RGB", (wide, high)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()
def ask(*parts, **keywords):
    torch.cuda.reset_peak_memory_stats()
    content = [dict(type="text", text="what?"), *parts]
    got = pipe([dict(role="user", content=content)], gen_config=few, **keywords)
    said = str(got.error_message or got.text)
    return got.input_token_len, torch.cuda.max_memory_allocated(), said
def video(frames, wide, high):
    url = "data:video/jpeg;base64," + ",".join([jpeg(wide, high)] * frames)
    return dict(type="video_url", video_url=dict(url=url))
image = dict(type="image_url", image_url=dict(url="data:image/jpeg;base64," + jpeg(4096, 4096)))
result(dict(
    segments=os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), machine=pipe.plan.machine.source,
    name=pipe.plan.engine.name,
    clips=[ask(video(*one)) for one in ((32, 1280, 720), (2, 640, 480))],
    image=ask(image), peak=pipe.plan.gpus[0].peak,
    three=ask(image, image, image)[:2],
    small=ask(image, mm_processor_kwargs=dict(image=dict(max_pixels=4096 * 1024)))[0],
    reserved=torch.cuda.max_memory_reserved(),
))
pipe.close()
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")
def test_the_card_is_measured_and_the_worst_image_and_video_live(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3-vl-2b", tmp_path / "Qwen3-VL-2B-Instruct")
    ran = run(tmp_path / "run", WATCH.format(folder=str(folder)), on="1xrtx3060")
    assert ran.code == 0, ran.text[-3000:]
    seen = ran.result
    assert (seen["name"], seen["machine"]) == ("pytorch", "nvml")
    assert seen["segments"].startswith("expandable_segments:True,per_process_memory_fraction:")
    assert seen["reserved"] < 12 << 30
    assert ran.report["refused"] is None or ran.report["refused"]["count"] < 20
    tokens, peak, _ = seen["image"]
    assert tokens > 16384
    assert all(1 < clip[0] < tokens + 16 * 12 and clip[1] < peak for clip in seen["clips"])
    # 32 frames at the model's own bound, 25,165,824 pixels of all, less what rounding down costs.
    assert 7500 < seen["clips"][0][0] < 12_288 + 16 * 12
    assert peak < seen["peak"]
    assert tokens // 8 < seen["small"] <= tokens // 2
    assert tokens // 2 < seen["three"][0] <= tokens + 3 * 4
    assert seen["three"][1] < seen["peak"]

"""What each process of LMDeploy's own server finds on pretend GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import turbofit.pretend
from turbofit.model.source import resolve_model
from turbofit.pretend.environment import find_turbofit, put_first
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.packages import SERVED

pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]

_PROGRAM = """
import sys
from lmdeploy import tokenizer
from lmdeploy.hf_configs import config_from_pretrained
from lmdeploy.serve.parsers import ResponseParserManager
from lmdeploy.utils import get_hf_gen_cfg

internvl, intern_s1_pro = sys.argv[1:]
assert config_from_pretrained(internvl, trust_remote_code=True).llm_config.hidden_size == 1024
assert get_hf_gen_cfg(intern_s1_pro, trust_remote_code=True)["eos_token_id"] == 2
assert tokenizer.GptOssTokenizer is tokenizer.HuggingFaceTokenizer
assert ResponseParserManager.get("gpt-oss") is ResponseParserManager.get("default")
"""


def test_a_new_process_reads_stand_ins_of_families_with_code_of_their_own(tmp_path: Path) -> None:
    folders = [
        checkpoint_for(resolve_model(name), tmp_path / name)
        for name in ("internvl3.5-1b", "intern-s1-pro")
    ]
    env = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    put_first(env, "PYTHONPATH", str(SERVED))
    find_turbofit(env)
    put_first(env, "PYTHONPATH", str(Path(turbofit.pretend.__file__).parent / "inside"))
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, folders)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

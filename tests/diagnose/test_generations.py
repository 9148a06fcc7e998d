"""A version that a log names decides whose rules its figures are read by."""

from __future__ import annotations

from tests.diagnose.conftest import explain

LOG = """\
pip install lmdeploy=={version}
>>> pipeline('OpenGVLab/InternVL2-8B', backend_config=TurbomindEngineConfig(tp=4))  # 4x RTX 3090
[TM][INFO] [BlockManager] block_size = 2 MB
[TM][INFO] [BlockManager] max_block_count = 1112
[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/utils/allocator.h:231
"""


def held(version: str) -> int:
    made = explain(LOG.format(version=version))
    assert made.read.version == version
    return next(one.bytes for one in made.held if "weights" in one.who)


def test_embeddings_are_whole_on_every_rank_before_0_6():
    assert held("0.5.3") - held("0.6.4") > 1000 << 20


def test_a_block_has_the_tokens_of_its_version():
    tells = [one.tells for one in explain(LOG.format(version="0.2.5")).evidence]
    assert any("128 tokens" in text for text in tells)
    tells = [one.tells for one in explain(LOG.format(version="0.7.3")).evidence]
    assert any("64 tokens" in text for text in tells)


def test_versions_that_are_not_older_keep_the_reference_s_rules():
    assert held("0.18.0") == held("0.9.2")

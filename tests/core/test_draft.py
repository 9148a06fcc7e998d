from __future__ import annotations

import msgspec

from turbofit.core.draft import Draft
from turbofit.core.plan import Settings
from turbofit.core.struct import decode, to_builtins, to_json
from turbofit.model.source import resolve_model

TEXT = resolve_model("llama-3.1-8b").text


def test_lmdeploy_is_told_by_its_own_options() -> None:
    draft = Draft(
        method="eagle3", num_speculative_tokens=3, model="/d", text=TEXT, vocab=32000,
        embeddings=False,
    )  # fmt: skip
    assert draft.options == (
        "--speculative-algorithm", "eagle3", "--speculative-draft-model", "/d",
        "--speculative-num-draft-tokens", "3",
    )  # fmt: skip
    own = msgspec.structs.replace(draft, method="qwen3_5_mtp", model="")
    assert "--speculative-draft-model" not in own.options


def test_settings_say_nothing_of_it_where_nothing_drafts() -> None:
    assert "speculative" not in to_builtins(Settings())
    assert Settings().draft is None
    draft = Draft(method="eagle", num_speculative_tokens=4, text=TEXT, vocab=1, embeddings=True)
    settings = Settings(speculative=draft)
    assert settings.draft == draft
    assert draft.tokens_per_step == 5
    assert decode(to_json(settings), Settings, what="settings") == settings

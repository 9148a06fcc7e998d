"""The stand-in tokenizer: its ids, and what it makes of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbofit.model.presets import preset_model
from turbofit.rehearsal.checkpoint.tokenizer import special_tokens, write_tokenizer

#: The vocabulary of Qwen2-VL.
VOCAB = preset_model("qwen2-vl-2b").text.vocab


def test_published_ids_are_kept_in_a_vocabulary_that_has_them() -> None:
    published = special_tokens(VOCAB)
    assert (published["<|im_end|>"], published["<|image_pad|>"]) == (151645, 151655)
    small = special_tokens(1000)
    assert small.keys() == published.keys()
    assert sorted(small.values()) == list(range(1000 - len(small), 1000))


def test_each_byte_and_each_special_token_is_a_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    special = special_tokens(VOCAB)
    write_tokenizer(tmp_path, special, 4096)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode("aé€", add_special_tokens=False).ids) == 1 + 2 + 3
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False).ids == [special["<|im_end|>"]]

"""Blocks of documents: where a note of the short answer is cut."""

from __future__ import annotations

import pytest

from turbofit.report.painters.document import in_brief


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("splitting over 2 GPUs adds memory, not speed: their layers work one after another",
         "splitting over 2 GPUs adds memory, not speed"),
        # A quote and parentheses are whole.
        ("it was seen to end over two such cards with 'out of resource: shared memory' (1: of 2)",
         None),
        ("not used: GPU 1 (NVIDIA GeForce RTX 4090; 24 GiB); --replicas serves on it beside them",
         "not used: GPU 1 (NVIDIA GeForce RTX 4090; 24 GiB)"),
        ("LMDeploy's limit: what clients send beyond it is refused and never lowered by it",
         None),
    ],
)  # fmt: skip
def test_a_note_is_cut_behind_a_clause_and_never_inside_a_quote(text: str, cut: str | None) -> None:
    assert in_brief(text, 75) == (cut or text)

from __future__ import annotations

import base64
import json

from tests.batch.standin import request
from turbofit.batch.batch_input import open_input
from turbofit.batch.batch_spec import BatchSpec
from turbofit.batch.server_process import BatchWorkload, workload_of
from turbofit.load.prompt import png
from turbofit.model.source import resolve_model

MODEL = resolve_model("internvl2-2b")


def test_the_worst_image_that_is_there_decides(tmp_path) -> None:
    for name, size in (("a", (448, 448)), ("b", (1344, 448)), ("c", (900, 900))):
        (tmp_path / f"{name}.png").write_bytes(png(*size))
    (tmp_path / "broken.png").write_bytes(b"x")
    found = workload_of(
        open_input(tmp_path, BatchSpec(prompt="What is this?", max_tokens=100)), MODEL
    )
    rule = MODEL.image_rule
    worst = max(((448, 448), (1344, 448), (900, 900)), key=lambda size: rule.units(*size))
    assert (found.images, found.image_size, found.unbounded) == (1, worst, 0)
    assert rule.tokens(*worst) + 100 < found.context < rule.tokens(*worst) + 100 + 1200


def jsonl(tmp_path, *rows, max_tokens=None):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    return workload_of(open_input(path, BatchSpec(max_tokens=max_tokens)), MODEL)


def test_a_text_counts_by_its_bytes_and_an_image_in_it_by_its_tokens(tmp_path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(2000, 1500)).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    pictured = request("a", "x", max_tokens=10)
    pictured["body"]["messages"][0]["content"] = [image, image]
    found = jsonl(tmp_path, pictured, request("b", "y" * 500, max_tokens=5))
    assert (found.images, found.image_size) == (2, (2000, 1500))
    assert 0 < found.context - 2 * MODEL.image_rule.tokens(2000, 1500) < 1200
    text = jsonl(tmp_path, request("b", "y" * 5000, max_tokens=5))
    assert (text.images, text.image_size) == (0, None)
    assert 5000 < text.context < 6200


def with_image(tmp_path, url: str):
    row = request("a", "x", max_tokens=10)
    row["body"]["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}}]
    return jsonl(tmp_path, row)


def test_an_image_that_the_server_fetches_may_be_the_worst(tmp_path) -> None:
    found = with_image(tmp_path, "https://example.com/a.png")
    assert (found.images, found.image_size) == (1, None)
    assert 0 < found.context - MODEL.image_rule.unit_tokens(13) < 1200


def test_an_image_whose_address_is_broken_counts_for_nothing(tmp_path) -> None:
    found = with_image(tmp_path, "file://photos[1]/a.png")
    assert (found.images, found.image_size) == (1, None)
    assert 0 < found.context < 1200


def test_an_answer_without_a_bound_leaves_the_context_to_the_plan(tmp_path) -> None:
    rows = request("a", "x"), request("b", "y", max_tokens=5)
    assert jsonl(tmp_path, *rows) == BatchWorkload(unbounded=1)
    assert jsonl(tmp_path, *rows, max_tokens=50).unbounded == 0


def test_no_context_is_longer_than_the_models(tmp_path) -> None:
    found = jsonl(tmp_path, request("a", "y" * 90000, max_tokens=5))
    assert found.context == MODEL.text.max_position_embeddings


def test_it_is_told_in_one_line() -> None:
    found = BatchWorkload(images=2, image_size=(640, 480), context=4096)
    assert found.text == "2 images, 640x480, 4,096 tokens"
    assert BatchWorkload(images=1, unbounded=1).text == "1 image, no bound of tokens"


def test_what_a_person_gave_stays() -> None:
    found = BatchWorkload(images=2, image_size=(640, 480), context=4096)
    assert found.keywords({}, shrink=False) == {
        "images": 2,
        "image_size": (640, 480),
        "context": 4096,
    }
    assert found.keywords({"images": 1, "session_len": 8192}, shrink=True) == {}
    assert BatchWorkload().keywords({}, shrink=False) == {"images": 0}

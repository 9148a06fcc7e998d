"""What a gateway tells of itself: its page, `/about`, and the digest of its plan."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

import pytest
from msgspec.structs import replace

from tests.support.gateway import call, gateway, plan_for
from tests.support.plans import changed
from turbofit.core.messages import PRETEND_WORDS
from turbofit.gateway.http.about import digest_of, memory_bars


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/"])
async def test_the_page_is_the_same_for_all_and_runs_its_own_script_alone(path: str) -> None:
    """It tells nothing of this server: a browser that shows it has no key yet."""
    app, upstream = gateway(names={"secret-model": "m"}, api_key=("k",), pretend=True)
    reply = await call(app, path, method="GET")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    text = reply.body.decode()
    assert not re.search("secret-model|PRETEND", text)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("script", "style"):
        (content,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert text.count("<script") == 1
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert "localStorage" not in text  # a conversation ends with its tab
    assert '<td>GET</td><td><a href="/metrics">/metrics</a></td>' in text
    lines = resources.files("turbofit.gateway.http").joinpath("page.html").read_text().count("\n")
    assert lines <= 590
    assert (await call(app, path, {}, headers={"authorization": "Bearer k"})).status == 404
    assert upstream.bodies == []


async def test_about_tells_the_page_what_is_served() -> None:
    names = {"org/<b>m": "org/m", "m": "org/m", "lora": "lora"}
    plan = plan_for()
    app, upstream = gateway(plan, names=names, memory=memory_bars(plan), pretend=True)
    about = (await call(app, "/about", method="GET")).json
    assert [one["name"] for one in about["models"]] == ["org/<b>m", "lora"]
    first = about["models"][0]
    assert first["images"] == plan.promise.limits.most_images(plan.model.image_rule) == 26
    for words in (
        "2 images of up to 13 tiles (6,656 tokens), 32,768 tokens in all",
        "or 26 smaller images",
        "a larger image is made smaller",
        "128 answers at once (n), 4 with images",
    ):
        assert words in first["limits"]
    bar = first["memory"][0]
    assert bar["label"].startswith(f"GPU 0, {plan.ledgers[0].name}: ")
    assert sum(piece["bytes"] for piece in bar["pieces"]) == plan.ledgers[0].total
    assert about["notices"] == [
        PRETEND_WORDS, "no engine answers; the next one is expected in 5 s"
    ]  # fmt: skip
    assert (about["pretend"], about["key"]) == (True, False)
    assert upstream.bodies == []
    app, _ = gateway(names=names, api_key=("k",))
    assert (await call(app, "/about", method="GET")).status == 401


def test_a_digest_tells_all_limits_apart() -> None:
    plan = plan_for()
    fewer = replace(plan.promise.limits, bytes_per_body=plan.promise.limits.bytes_per_body - 1)
    plans = (
        plan, changed(plan, limits=fewer, units_per_forward=10**9),
        changed(plan, context=plan.promise.context - 1),
    )  # fmt: skip
    assert len({digest_of(other) for other in plans}) == 3

"""Bodies that try to get past the gateway: plausible ones, bent at random, by a seed."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.support.gateway import data_url, picture

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/responses", "/generate",
)  # fmt: skip
#: Routes that LMDeploy takes images on come up most.
_WEIGHTS = (10, 3, 5, 2, 2, 5)
KNOBS = (
    "max_dynamic_patch", "detail", "min_pixels", "max_pixels", "max_slice_nums", "num_crops",
)  # fmt: skip
_TYPES = (
    "image_url", "image", "image_data", "text", "video_url", "video", "audio", "time_series",
    "input_image", "input_text", "tool_result", "tool_use", "refusal", "",
)  # fmt: skip
_ROLES = ("user", "user", "user", "tool", "system", "assistant", "preprocess", "forward", "")
#: None is large: LMDeploy's own preprocessing of 3584x3584 takes seconds.
_SIZES = (
    (1, 1), (28, 28), (448, 448), (448, 5376), (5376, 448), (640, 480), (1792, 1344), (1000, 5),
    (24, 1), (1, 23), (97, 1003),
)  # fmt: skip


class Mutator:
    """Makes requests; ``seed`` decides everything."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._good = [data_url(picture(*size)) for size in _SIZES]
        self._good += [data_url(picture(60, 40, kind), "image/x") for kind in ("JPEG", "WEBP")]
        whole = picture(300, 200)
        self._bad = [
            "", "x", "file:///etc/hostname", "/etc/hostname", "http://127.0.0.1/a.png",
            "http://169.254.169.254/latest", "https://example.com/a.png", "data:,",
            "data:image/png",
            data_url(whole[:40]), data_url(b"<svg/>"), data_url(b"\x1f\x8b" + bytes(20)),
            data_url(picture(1, 1)) + "#" + "A" * 40, data_url(picture(1, 1)).replace(";", ";;"),
            data_url(picture(1, 1)) + ",;base64,AAAA", "DATA:image/png;base64,AAAA",
        ]  # fmt: skip

    def request(self) -> tuple[str, bytes]:
        """A path and a raw body."""
        rng = self.rng
        path = rng.choices(PATHS, _WEIGHTS)[0]
        body = self._body(path)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            body = self._bent(body)
        raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="replace")
        if rng.random() < 0.04:
            data = bytearray(raw)
            for _ in range(rng.randrange(1, 6)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            raw = bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data)
        return path, raw

    def _body(self, path: str) -> Any:
        rng = self.rng
        body: dict[str, Any] = {"model": "m", "max_tokens": rng.choice((1, 16, 16, 900, 10**6))}
        if path == "/v1/completions":
            body["prompt"] = rng.choice(
                ("hi", ["a", "b"], [[{"role": "user", "content": self._parts()}]], [1, 2])
            )
        elif path == "/v1/responses":
            body["input"] = rng.choice(
                ("hi", [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}])
            )
        elif path.startswith("/v1/messages"):
            body["messages"] = [self._anthropic() for _ in range(rng.choice((1, 1, 2)))]
        elif path == "/generate":
            body.update(prompt="x", image_data=self._image_data())
        else:
            body["messages"] = [self._message() for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < 0.15:
            body.update(messages=[], input_ids=[1, 2, 3], image_data=self._image_data())
        if rng.random() < 0.2:
            body["n"] = self._value()
        if rng.random() < 0.2:
            inner = {"image": {name: self._value() for name in rng.sample(KNOBS, 2)}}
            body[rng.choice(("mm_processor_kwargs", "media_io_kwargs", *KNOBS))] = inner
        if rng.random() < 0.3:
            body["stream"] = rng.choice((True, False, "true", 1))
        return body

    def _message(self) -> dict[str, Any]:
        role = self.rng.choice(_ROLES)
        return {"role": role, "content": self._parts() if self.rng.random() < 0.9 else "x"}

    def _parts(self) -> list[Any]:
        rng = self.rng
        parts: list[Any] = [{"type": "text", "text": "What is this?"}]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            kind = rng.choice(_TYPES[:3]) if rng.random() < 0.85 else rng.choice(_TYPES)
            url, knobs = self._url(), self._knobs()
            inside = rng.random() < 0.6
            value: Any = {rng.choice(("url", "url", "data")): url, **knobs} if inside else url
            beside = self._knobs() if inside and rng.random() < 0.3 else {} if inside else knobs
            parts.append({"type": kind, kind: value, **beside})
        return parts

    def _anthropic(self) -> dict[str, Any]:
        rng = self.rng
        blocks: list[Any] = [{"type": "text", "text": "x"}]
        for _ in range(rng.choice((1, 1, 2))):
            url = self._url()
            source: dict[str, Any] = {"type": "url", "url": url}
            if rng.random() < 0.7:
                media = rng.choice(("image/png", "image/png;base64,AA,", "", "a#b"))
                source = {"type": "base64", "media_type": media, "data": url.rpartition(",")[2]}
            block = {"type": "image", "source": {**source, **self._knobs()}}
            if rng.random() < 0.3:
                block = {"type": "tool_result", "tool_use_id": "1", "content": [block]}
            blocks.append(block)
        return {"role": rng.choice(("user", "user", "assistant", "system")), "content": blocks}

    def _image_data(self) -> Any:
        rng = self.rng
        one = [
            rng.choice((self._url(), {"url": self._url(), **self._knobs()}))
            for _ in range(rng.choice((1, 1, 2, 3)))
        ]
        return one[0] if rng.random() < 0.4 else one

    def _url(self) -> str:
        return self.rng.choice(self._good if self.rng.random() < 0.85 else self._bad)

    def _knobs(self) -> dict[str, Any]:
        rng = self.rng
        return {name: self._value() for name in KNOBS if rng.random() < 0.35}

    def _value(self) -> Any:
        rng = self.rng
        return rng.choice(
            (
                1, 2, 6, 12, 13, 24, 120, 5000, 10**6, 10**9, 10**30, 0, -1, -(10**9), True, False,
                None, "24", "high", "low", "medium", "auto", 1.5, 1e300, [], {}, [24], {"a": 1},
                rng.randrange(1, 10**8), rng.random() * 100,
            )
        )  # fmt: skip

    def _bent(self, body: Any) -> Any:
        """One random node replaced, removed, wrapped, doubled or renamed."""
        rng = self.rng
        nodes = list(_nodes(body))
        if not nodes:
            return body
        holder, key = rng.choice(nodes)
        what = rng.randrange(7)
        if what == 0:
            holder[key] = self._value()
        elif what == 1:
            del holder[key]
        elif what == 2:
            holder[key] = [holder[key]]
        elif what == 3:
            holder[key] = {"type": rng.choice(_TYPES), "url": holder[key]}
        elif what == 4 and isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 3)))
        elif what == 5 and isinstance(holder, dict):
            holder[rng.choice((*KNOBS, *_TYPES, "url", "data", "role", "content"))] = holder[key]
        else:
            holder[key] = rng.choice((self._parts, self._message, self._image_data))()
        return body


def _nodes(value: Any):
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _nodes(value[key])
    elif isinstance(value, list):
        for index in range(len(value)):
            yield value, index
            yield from _nodes(value[index])

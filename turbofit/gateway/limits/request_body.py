"""Finds the images and videos of a body of any API, and rewrites them in one form.

The functions are pure: they decode and fetch nothing. `read_body` returns a slot for each image and
video. When the data of an image or video is known, `MediaSlot.fill` and `MediaSlot.show` write the
data into the body. So LMDeploy sees one spelling of each medium, and never a URL, a path or a
parameter that a client wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

from turbofit.core.struct import JsonObject
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import Kind
from turbofit.gateway.limits.ranges import passed_fields
from turbofit.gateway.limits.request_limits import shown
from turbofit.gateway.limits.rules import refused
from turbofit.gateway.media.pictures import Picture

_Shape = Literal["part", "data", "block", "count", "clip"]

#: Types of message parts that are text; the longer names belong to the Responses API.
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
#: Types of message parts that LMDeploy's multimodal processor reads as an image.
_IMAGE_PARTS: Final = ("image_url", "image", "image_data")
#: Types of message parts that LMDeploy's multimodal processor reads as a video.
_CLIP_PARTS: Final = ("video_url", "video")
#: Types of message parts that LMDeploy's multimodal processor reads as other media; no plan counts
#: these.
_OTHER_PARTS: Final = ("audio_url", "audio", "time_series_url", "time_series")
#: Blocks of the Messages API that LMDeploy turns into text of a prompt; the JSON of any other block
#: would become a part of the prompt.
#: lmdeploy lmdeploy/serve/anthropic/adapter.py::to_openai_messages #aeac4d
_BLOCKS: Final = ("text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking")
#: Types of the items of a Responses request.
_ITEMS: Final = ("message", "function_call", "function_call_output")
#: The ends of sentences that refuse a part of a message: in a chat, in the Messages API, and where
#: only text is accepted.
_PARTS_TAKEN: Final = "text, image_url and video_url are taken"
_BLOCKS_TAKEN: Final = "text, image and tool_result are taken"
_TEXT_TAKEN: Final = "text is taken"
#: Words for a Responses request: LMDeploy takes its texts alone.
_IMAGES_ELSEWHERE: Final = "; images go to /v1/chat/completions, as image_url"
#: Roles of LMDeploy's own internal messages.
_INNER_ROLES: Final = ("preprocess", "forward")


@dataclass(eq=False)
class MediaSlot:
    """A place in a body that contains an image, or a video (shape ``clip``).

    ``source`` is the client's URL, or base64 if ``inline``. ``options`` are the client's parameters
    for the image or video. The image or video is written back in the form ``shape``, at ``index``
    of the list ``place``.
    """

    source: str
    options: JsonObject
    shape: _Shape
    place: list[Any]
    index: int
    inline: bool = False

    @property
    def remote(self) -> bool:
        """Whether the file must be fetched."""
        return not self.inline and self.source[:8].lower().startswith(("http://", "https://"))

    @property
    def carries(self) -> bool:
        """Whether parameters can be written at this place."""
        return self.shape in ("part", "data")

    def show(self, url: str) -> None:
        """Write the video into the body, as a part with this URL."""
        self.place[self.index] = {"type": "video_url", "video_url": {"url": url}}

    def fill(self, picture: Picture, knobs: dict[str, int]) -> None:
        """Write the image back inline, with ``knobs``: LMDeploy's parameters that limit the image.

        In a request that only counts text tokens (shape ``count``), write an empty text instead.
        """
        if self.shape == "count":
            self.place[self.index] = {"type": "text", "text": ""}
        elif self.shape == "block":
            source = {"type": "base64", "media_type": picture.mime, "data": picture.base64}
            self.place[self.index] = {"type": "image", "source": source}
        else:
            value = {"url": picture.inline, **knobs}
            part = {"type": "image_url", "image_url": value}
            self.place[self.index] = value if self.shape == "data" else part


@dataclass
class Parsed:
    """A client's body in parsed form, ready for an engine when all slots are filled.

    ``prompts`` is the number of prompts; ``lowered`` lists the changes so far. ``watching`` are the
    client's options for the loader and the processor of its video. ``of_images`` are the client's
    options for the processor of its images.
    """

    body: JsonObject
    slots: list[MediaSlot] = field(default_factory=list)
    prompts: int = 1
    lowered: list[str] = field(default_factory=list)
    watching: dict[str, Any] = field(default_factory=dict)
    of_images: dict[str, Any] = field(default_factory=dict)

    @property
    def copies(self) -> int:
        """The number of requests that the engine makes of this body: prompts times ``n``.

        ``n`` must have been checked before.
        """
        number: int = self.body.get("n") or 1
        return self.prompts * number


def read_body(kind: Kind, body: Any) -> Parsed:
    """Parse a decoded body: find its images and videos, and drop unknown fields.

    Lists and objects inside the body are changed in place.

    Raises:
        Refusal: the body does not have the form of its API, or has a form that LMDeploy refuses, or
            a form that could hide an image from the gateway.
    """
    if not isinstance(body, dict):
        raise Refusal("bad_body")
    fields = passed_fields(kind)
    # A null means the default, but LMDeploy uses the default only for a missing field.
    parsed = Parsed({k: v for k, v in body.items() if k in fields and v is not None})
    _READERS[kind](parsed)
    _processor_fields(parsed)
    return parsed


def _chat(parsed: Parsed) -> None:
    """Read the messages of a chat; LMDeploy also takes a single string."""
    messages = parsed.body.get("messages")
    if isinstance(messages, list):
        for message in messages:
            _chat_message(parsed, message)
    elif messages is not None and not isinstance(messages, str):
        raise refused("messages", "is no list")
    _image_data(parsed)


def _chat_message(parsed: Parsed, message: Any) -> None:
    """Check a message of a chat, and add slots for its images and videos."""
    if not isinstance(message, dict):
        raise refused("messages", "has an item that is no object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role in _INNER_ROLES:
        raise refused("messages", "has an unknown role")
    if isinstance(content, dict):
        raise refused("messages", "holds content that is neither text nor a list")
    if not isinstance(content, list):
        return
    if role == "assistant":
        _forget_unknown(parsed, "messages", content, (*_TEXT_PARTS, *_IMAGE_PARTS))
    for index, part in enumerate(content):
        kind = _part_type(part)
        if kind in _TEXT_PARTS:
            if not isinstance(part.get("text"), str):
                raise refused("messages", "holds a text part without text")
            content[index] = {"type": "text", "text": part["text"]}
        elif kind in (*_IMAGE_PARTS, *_CLIP_PARTS):
            parsed.slots.append(_medium(role, content, index))
        else:
            raise _not_taken("messages", kind, _PARTS_TAKEN)


def _medium(role: str, content: list[Any], index: int) -> MediaSlot:
    """Return a slot for the image or video at ``index`` of a message's content."""
    kind = content[index]["type"]
    image = kind in _IMAGE_PARTS
    if role not in ("user", "tool"):
        medium = "an image" if image else "a video"
        raise refused("messages", f"holds {medium} in a message of role {role[:20]!r}")
    source, options = _source(content[index], kind)
    shape: _Shape = "part" if image else "clip"
    return MediaSlot(source, options, shape, content, index)


def _not_taken(field: str, kind: str, taken: str, elsewhere: str = "") -> Refusal:
    """Return the refusal of a part whose type is not accepted; ``taken`` lists accepted types."""
    media = kind in (*_IMAGE_PARTS, *_CLIP_PARTS, *_OTHER_PARTS)
    what = "type" if media else "unknown type"
    return refused(field, f"holds a part of {what} {kind[:20]!r}: {taken} here{elsewhere}")


def _forget_unknown(parsed: Parsed, field: str, content: list[Any], taken: Sequence[str]) -> None:
    """Leave out parts of an earlier answer that are no input, such as ``thinking``.

    Clients send answers back with all parts, also with parts that another server made. LMDeploy
    ignores parts of unknown type if the request has no image; otherwise the chat template gets the
    parts. In a user's message a part of unknown type is refused: the answer would look as if the
    model had read the part.
    """
    known = (*taken, *_CLIP_PARTS, *_OTHER_PARTS)
    kinds = [_part_type(part, field) for part in content]
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        content[:] = [part for part in content if part["type"] in known]
        parsed.lowered += [f"{field}={shown(kind)}->none" for kind in dict.fromkeys(unknown)]


def _part_type(part: Any, field: str = "messages") -> str:
    """Return the type of a message part; refuse a part without a type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise refused(field, "holds a part without a type")
    return kind


def _source(part: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Return the URL and the parameters of an image part.

    A part may have its parameters beside the image's value, or in this value.
    """
    value = part.get(kind)
    options = {name: option for name, option in part.items() if name not in ("type", kind)}
    if not isinstance(value, dict):
        return _url(value), options
    return _url(value.get("url") or value.get("data")), {**options, **value}


def _url(value: Any) -> str:
    """Return a URL or base64 text; refuse a value of another type."""
    if not isinstance(value, str):
        raise refused("image_url", "is no string")
    return value


def _image_data(parsed: Parsed) -> None:
    """Add slots for the images in ``image_data``: a URL, an object, or a list of these."""
    if "image_data" not in parsed.body:
        return
    value = parsed.body["image_data"]
    images = parsed.body["image_data"] = value if isinstance(value, list) else [value]
    for index, image in enumerate(images):
        options = dict(image) if isinstance(image, dict) else {"url": image}
        source = _url(options.get("url") or options.get("data"))
        parsed.slots.append(MediaSlot(source, options, "data", images, index))


def _completions(parsed: Parsed) -> None:
    """Accept only texts as prompts; LMDeploy would also accept a list of messages with images."""
    value = parsed.body.get("prompt")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise refused("prompt", "is neither a string nor a list of strings")
    parsed.prompts = len(texts)
    if not parsed.prompts:
        raise refused("prompt", "is an empty list")


def _anthropic(parsed: Parsed, shape: _Shape) -> None:
    """Check a body of the Messages API, and add slots of this shape for its images."""
    messages, system = parsed.body.get("messages", []), parsed.body.get("system")
    if not isinstance(messages, list):
        raise refused("messages", "is no list")
    if isinstance(system, list):
        _check_texts("system", system)
    for message in messages:
        if not isinstance(message, dict):
            raise refused("messages", "has an item that is no object")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise refused("messages", "has an unknown role")
        if isinstance(content, list):
            if role == "assistant":
                _forget_unknown(parsed, "messages", content, _BLOCKS)
            _blocks(parsed, content, role == "user", shape)
        elif not isinstance(content, str):
            raise refused("messages", "holds content that is neither text nor a list")
    _image_data(parsed)


def _blocks(parsed: Parsed, blocks: list[Any], may: bool, shape: _Shape, depth: int = 0) -> None:
    """Add slots for the image blocks of a message and of its tool results.

    ``may``: the message may have images. ``shape`` is the shape of the slots.
    """
    for index, block in enumerate(blocks):
        kind = _part_type(block)
        if kind == "image":
            if not may:
                raise refused("messages", "holds an image in a message that is not the user's")
            parsed.slots.append(_block_slot(block, shape, blocks, index))
        elif kind == "tool_result" and isinstance(block.get("content"), list):
            if depth:
                raise refused("messages", "holds a tool result inside another")
            _blocks(parsed, block["content"], may, shape, depth + 1)
        elif kind not in _BLOCKS:
            raise _not_taken("messages", kind, _BLOCKS_TAKEN)


def _check_texts(field: str, parts: list[Any], elsewhere: str = "") -> None:
    """Refuse parts that are no text, since LMDeploy reads only text in ``field``.

    ``elsewhere`` says where others go.
    """
    for part in parts:
        if (kind := _part_type(part, field)) not in _TEXT_PARTS:
            raise _not_taken(field, kind, _TEXT_TAKEN, elsewhere)


def _block_slot(block: dict[str, Any], shape: _Shape, place: list[Any], index: int) -> MediaSlot:
    """Return the slot of an image block, which is at ``index`` of the list ``place``."""
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind not in ("base64", "url"):
        raise refused("messages", "holds an image whose source is neither base64 nor url")
    inline = kind == "base64"
    return MediaSlot(
        _url(source.get("data" if inline else "url")), {}, shape, place, index, inline=inline
    )


def _responses(parsed: Parsed) -> None:
    """Accept only text: LMDeploy takes no images on this route, but a later release may."""
    given = parsed.body.get("input")
    for item in given if isinstance(given, list) else []:
        if isinstance(item, dict):
            _check_item(parsed, item)


def _check_item(parsed: Parsed, item: dict[str, Any]) -> None:
    """Refuse an item of a Responses request if LMDeploy would ignore a part of the item."""
    kind = item.get("type", "message")
    if kind not in _ITEMS:
        raise _not_taken("input", str(kind), f"{', '.join(_ITEMS)} are taken")
    parts = item.get("output" if kind == "function_call_output" else "content")
    if isinstance(parts, list):
        if item.get("role") == "assistant":
            _forget_unknown(parsed, "input", parts, _TEXT_PARTS)
        _check_texts("input", parts, _IMAGES_ELSEWHERE)


def _processor_fields(parsed: Parsed) -> None:
    """Take the keywords for loaders and processors out of the body.

    ``watching`` gets the keywords for a video, and ``of_images`` the keywords for images. All other
    keywords are dropped, and noted.
    """
    watches = any(slot.shape == "clip" for slot in parsed.slots)
    for name in ("media_io_kwargs", "mm_processor_kwargs"):
        value = parsed.body.pop(name, None)
        if watches:
            parsed.watching.update(_taken_out(value, "video"))
        if name == "mm_processor_kwargs" and parsed.slots:
            parsed.of_images = _taken_out(value, "image") or parsed.of_images
        if value:
            parsed.lowered.append(f"{name}=set->none")


def _taken_out(value: Any, key: str) -> dict[str, Any]:
    """Remove the object under ``key`` from ``value``; return this object, or an empty one."""
    if not isinstance(value, dict) or not isinstance(value.get(key), dict):
        return {}
    inner: dict[str, Any] = value.pop(key)
    return inner


_READERS: Final[dict[str, Callable[[Parsed], object]]] = {
    "chat": _chat,
    "completions": _completions,
    "generate": _image_data,
    "messages": partial(_anthropic, shape="block"),
    "count_tokens": partial(_anthropic, shape="count"),
    "responses": _responses,
}

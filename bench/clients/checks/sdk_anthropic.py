"""The anthropic package: ``python sdk_anthropic.py URL``."""

from __future__ import annotations

from anthropic import Anthropic
from common import QUESTION, TOOL, model, picture, run, url

CLIENT = Anthropic(base_url=url(), api_key="none", max_retries=0, timeout=300)
MODEL = model()
TOOLS = [
    {
        "name": TOOL["name"],
        "description": TOOL["description"],
        "input_schema": TOOL["parameters"],
    }
]


def arguments(images: int = 0, **options) -> dict:
    source = {"type": "base64", "media_type": "image/png", "data": picture()}
    content = [{"type": "text", "text": QUESTION}, *[{"type": "image", "source": source}] * images]
    message = {"role": "user", "content": content if images else QUESTION}
    return {"model": MODEL, "max_tokens": 4, "messages": [message], **options}


def create(images: int = 0, **options) -> str:
    done = CLIENT.messages.create(**arguments(images, **options))
    kinds, usage = [block.type for block in done.content], done.usage
    return f"{kinds}, {done.stop_reason}, {usage.input_tokens} + {usage.output_tokens} tokens"


def stream(images: int = 0) -> str:
    with CLIENT.messages.stream(**arguments(images)) as events:
        text = "".join(events.text_stream)
        done = events.get_final_message()
    return f"{len(text)} characters, {done.stop_reason}, {done.usage.output_tokens} tokens"


def count(images: int = 0) -> str:
    question = arguments(images)
    del question["max_tokens"]
    return f"{CLIENT.messages.count_tokens(**question).input_tokens} tokens"


run(
    {
        "text": create,
        "system": lambda: create(system="Be brief."),
        "stream": stream,
        "image": lambda: create(1),
        "image, stream": lambda: stream(1),
        "three images": lambda: create(3),
        "tools": lambda: create(tools=TOOLS),
        "count_tokens": count,
        "count_tokens of an image": lambda: count(1),
        "error: max_tokens 0": lambda: create(max_tokens=0),
        "error: unknown model": lambda: create(model="none"),
    }
)

"""The openai package: ``python sdk_openai.py URL``."""

from __future__ import annotations

from common import QUESTION, TOOL, messages, model, run, url
from openai import OpenAI

CLIENT = OpenAI(base_url=f"{url()}/v1", api_key="none", max_retries=0, timeout=300)
MODEL = model()


def chat(images: int = 0, **options) -> str:
    done = CLIENT.chat.completions.create(
        model=MODEL, messages=messages(images), max_tokens=4, **options
    )
    words = [
        f"{len(one.message.content or '')} characters, {one.finish_reason}" for one in done.choices
    ]
    usage = done.usage
    return f"{len(words)} x ({words[0]}), {usage.prompt_tokens} + {usage.completion_tokens} tokens"


def stream(images: int = 0) -> str:
    text, reason, usage = "", None, None
    for event in CLIENT.chat.completions.create(
        model=MODEL, messages=messages(images), max_tokens=4, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        for choice in event.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = event.usage or usage
    return f"{len(text)} characters, {reason}, {usage.prompt_tokens} + {usage.completion_tokens}"


def completion(prompt: str | list[str]) -> str:
    done = CLIENT.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
    return f"{len(done.choices)} x {len(done.choices[0].text)} characters"


def responses(**options) -> str:
    done = CLIENT.responses.create(model=MODEL, input=QUESTION, max_output_tokens=4, **options)
    if options.get("stream"):
        return " ".join(dict.fromkeys(event.type for event in done))
    return f"{len(done.output_text)} characters, {done.status}"


def lines() -> str:
    """With helpers that read raw answers."""
    raw = CLIENT.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages(), max_tokens=4
    )
    return f"{raw.status_code}, {raw.http_response.headers['content-type']}"


run(
    {
        "models": lambda: f"{[one.id for one in CLIENT.models.list().data]}",
        "text": chat,
        "stream": stream,
        "image": lambda: chat(1),
        "image, stream": lambda: stream(1),
        "three images": lambda: chat(3),
        "tools": lambda: chat(tools=[{"type": "function", "function": TOOL}]),
        "n = 9": lambda: chat(n=9),
        "n = 100": lambda: chat(n=100),
        "completion": lambda: completion(QUESTION),
        "completion of 100 prompts": lambda: completion([QUESTION] * 100),
        "responses": responses,
        "responses, stream": lambda: responses(stream=True),
        "raw answer": lines,
        "error: temperature 3": lambda: chat(temperature=3),
        "error: n = 129": lambda: chat(n=129),
        "error: unknown model": lambda: str(
            CLIENT.chat.completions.create(model="none", messages=messages())
        ),
        "error: embeddings": lambda: str(CLIENT.embeddings.create(model=MODEL, input="x")),
    }
)

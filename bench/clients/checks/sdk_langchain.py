"""langchain-openai: ``python sdk_langchain.py URL``."""

from __future__ import annotations

from common import QUESTION, TOOL, messages, model, run, url
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

OPTIONS = {"base_url": f"{url()}/v1", "api_key": "none", "model": model(), "max_retries": 0}
CHAT = ChatOpenAI(**OPTIONS, max_tokens=4)


def seen(answer: AIMessage) -> str:
    usage = answer.usage_metadata or {}
    reason = answer.response_metadata.get("finish_reason")
    tokens = f"{usage.get('input_tokens')} + {usage.get('output_tokens')} tokens"
    return f"{len(answer.content)} characters, {reason}, {tokens}"


def human(images: int) -> list[HumanMessage]:
    return [HumanMessage(content=messages(images)[0]["content"])]


def stream() -> str:
    text = "".join(str(part.content) for part in CHAT.stream(QUESTION))
    return f"{len(text)} characters"


def again() -> str:
    """A conversation with the model's answer in it, as other servers spell it."""
    said = AIMessage(
        content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A square."}]
    )
    return seen(CHAT.invoke([*human(0), said, *human(0)]))


run(
    {
        "text": lambda: seen(CHAT.invoke(QUESTION)),
        "stream": stream,
        "batch": lambda: f"{[seen(one) for one in CHAT.batch([QUESTION] * 3)]}",
        "image": lambda: seen(CHAT.invoke(human(1))),
        "three images": lambda: seen(CHAT.invoke(human(3))),
        "tools": lambda: seen(CHAT.bind_tools([TOOL]).invoke(QUESTION)),
        "conversation": again,
        "completion": lambda: f"{len(OpenAI(**OPTIONS, max_tokens=4).invoke(QUESTION))} characters",
        "error: temperature 3": lambda: seen(CHAT.invoke(QUESTION, temperature=3)),
        "error: unknown model": lambda: seen(CHAT.invoke(QUESTION, model="none")),
    }
)

"""litellm, as a client of the OpenAI API and of Anthropic's: ``python sdk_litellm.py URL``."""

from __future__ import annotations

import litellm
from common import QUESTION, TOOL, messages, model, run, url

MODEL = model()
litellm.suppress_debug_info = True


def complete(images: int = 0, provider: str = "openai", **options):
    base = f"{url()}/v1" if provider == "openai" else url()
    arguments = {"model": f"{provider}/{MODEL}", "messages": messages(images), **options}
    return litellm.completion(
        **arguments, max_tokens=4, api_base=base, api_key="none", num_retries=0, timeout=300
    )


def seen(answer) -> str:
    choice, usage = answer.choices[0], answer.usage
    text = choice.message.content or ""
    tokens = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
    return f"{len(text)} characters, {choice.finish_reason}, {tokens}"


def stream(provider: str) -> str:
    parts = complete(provider=provider, stream=True)
    return f"{len(''.join(part.choices[0].delta.content or '' for part in parts))} characters"


def legacy() -> str:
    done = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt=QUESTION, max_tokens=4,
        api_base=f"{url()}/v1", api_key="none", num_retries=0,
    )  # fmt: skip
    return f"{len(done.choices[0].text)} characters"


TOOLS = [{"type": "function", "function": TOOL}]
run(
    {
        "text": lambda: seen(complete()),
        "stream": lambda: stream("openai"),
        "image": lambda: seen(complete(1)),
        "three images": lambda: seen(complete(3)),
        "tools": lambda: seen(complete(tools=TOOLS)),
        "completion": legacy,
        "anthropic/: text": lambda: seen(complete(provider="anthropic")),
        "anthropic/: stream": lambda: stream("anthropic"),
        "anthropic/: image": lambda: seen(complete(1, "anthropic")),
        "anthropic/: tools": lambda: seen(complete(provider="anthropic", tools=TOOLS)),
        "error: temperature 3": lambda: seen(complete(temperature=3)),
        "error: unknown model": lambda: seen(complete(extra_body={"model": "none"})),
    }
)

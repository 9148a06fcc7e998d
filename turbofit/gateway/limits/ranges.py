"""Brings each field of a request into its range by `RULES`, before an engine reads the field."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import msgspec

from turbofit.core.struct import JsonObject
from turbofit.gateway.limits.gate import TEMPLATE_TOKENS, UNSTATED
from turbofit.gateway.limits.grammars import check_grammars
from turbofit.gateway.limits.request_limits import Bounds, shown
from turbofit.gateway.limits.rules import (
    Biases,
    Flag,
    Ids,
    IntegerRule,
    Number,
    RefusedRule,
    Rule,
    Scope,
    ShortRule,
    TextRule,
    Texts,
    refused,
)

#: Strings that stop an answer. LMDeploy looks for each string in the whole vocabulary, on its event
#: loop. With 151,643 tokens this takes 10 ms for most strings, 0.3 s for a string in tens of
#: thousands of tokens ("e"), and 2.8 s for a string of 1 MB. The empty string is in every token.
#: lmdeploy lmdeploy/tokenizer.py::HuggingFaceTokenizer.indexes_containing_token #c5603f
_STOP: Final = Texts(most=16, characters=1024, short=4)
#: The length of the answer. Engines lower it to the tokens that the prompt leaves of the session:
#: lmdeploy serve/core/async_engine.py::AsyncEngine._determine_gen_config #a7a408
_LENGTH: Final = IntegerRule(least=1, most="context", over="lower")
_NAME: Final = TextRule(most=4096)
#: Fields that other functions limit: `request_body` the images and the keywords of processors,
#: `request_body` and `_check_conversation` the messages, `grammars` the schemas and tools, and
#: `check_template` the arguments of the chat template.
_LIMITED_ELSEWHERE: Final = Rule()
#: A client could occupy the session numbers of others.
_SESSION: Final = Rule(passed=False)
#: A field of any content. For each item that LMDeploy refuses, pydantic takes 14 us.
_UNREAD: Final = ShortRule(most=256)

_SAMPLING: Final[Mapping[str, Rule]] = {
    # lmdeploy lmdeploy/messages.py::GenerationConfig.__post_init__ #4a7ab0
    # LMDeploy accepts 0 to 2. Logits divided by less than 0.01 become infinite.
    "temperature": Number(least=0, most=2, floor=0.01),
    "top_p": Number(least=0, most=1, above=True),
    # Only the chat route checks the range; on other routes a wrong value causes an answer 500.
    "min_p": Number(least=0, most=1),
    # lmdeploy _turbomind.*.so `top-k kernel supports 1<=k<=1024`: TurboMind ends on a larger value.
    # Above the vocabulary torch.topk raises an error that ends the PyTorch engine's loop.
    "top_k": IntegerRule(most=1024, over="lower"),
    # TurboMind divides logits by this value. With 0 or NaN sampling finds no token; 100 keeps
    # float16 logits finite.
    # lmdeploy 0.16.0 src/turbomind/kernels/sampling_penalty_kernels.cu::RepetitionPenaltyKernel
    "repetition_penalty": Number(least=0, above=True, floor=0.01, most=100),
    # LMDeploy looks for n-grams by a Conv1d over a window of 1,024 tokens
    # (lmdeploy pytorch/envs.py `1024`). A longer n-gram ends the engine's loop.
    # lmdeploy engine/logits_process.py::ngram #c63173
    "repetition_ngram_size": IntegerRule(most=1024, over="lower"),
    "repetition_ngram_threshold": IntegerRule(over="lower"),
    "ignore_eos": Flag(),
    "skip_special_tokens": Flag(),
    "spaces_between_special_tokens": Flag(),
    "stop": _STOP,
    "stream": Flag(),
    "session_id": _SESSION,
}
_OPENAI: Final[Mapping[str, Rule]] = {
    "model": _NAME,
    "n": IntegerRule(least=1),  # `check_request` holds the copies to the plan
    "max_tokens": _LENGTH,
    "max_completion_tokens": _LENGTH,
    # A number that is no uint64 causes an answer 500; OpenAI's seeds may be negative:
    # lmdeploy 0.16.0 src/turbomind/engine/request.h `uint64_t random_seed`
    "seed": IntegerRule(most=(1 << 64) - 1, over="wrap"),
    # LMDeploy ignores these two. The range is OpenAI's:
    # lmdeploy openai/protocol.py::ChatCompletionRequest `presence_penalty`
    "presence_penalty": Number(least=-2, most=2, clamp=True),
    "frequency_penalty": Number(least=-2, most=2, clamp=True),
    "stream_options": _UNREAD,
    "user": _NAME,
}
_RETURNS: Final[Mapping[str, Rule]] = {
    "include_stop_str_in_output": Flag(),
    "return_logprob": Flag(),
    "return_routed_experts": Flag(),
}
#: With a token id outside the vocabulary, an engine would read memory outside the embedding.
_INPUT: Final = Ids(most="context")

_CHAT: Final[Mapping[str, Rule]] = {
    **_SAMPLING,
    **_OPENAI,
    **_RETURNS,
    "messages": _LIMITED_ELSEWHERE,
    "input_ids": _INPUT,
    "image_data": _LIMITED_ELSEWHERE,
    "media_io_kwargs": _LIMITED_ELSEWHERE,
    "mm_processor_kwargs": _LIMITED_ELSEWHERE,
    "response_format": _LIMITED_ELSEWHERE,
    "tools": _LIMITED_ELSEWHERE,
    "tool_choice": _UNREAD,
    "parallel_tool_calls": Flag(),
    "logprobs": Flag(),
    "top_logprobs": IntegerRule(most=20),
    # The PyTorch engine adds each bias separately, for each token of each answer: 5 ms for 1,024
    # biases, 0.5 s for 100,000 (`bench/gateway/STALLS.md`).
    "logit_bias": Biases(most=1024, bias=100),
    "reasoning_effort": TextRule(most=64),
    # The engine adds the length of the prompt:
    # lmdeploy 0.16.0 src/turbomind/engine/request.h `int min_new_tokens`
    "min_new_tokens": IntegerRule(most="context", over="lower"),
    "enable_thinking": Flag(),
    "return_token_ids": Flag(),
    "chat_template_kwargs": _LIMITED_ELSEWHERE,
}
_COMPLETIONS: Final[Mapping[str, Rule]] = {
    **_SAMPLING,
    **_OPENAI,
    # An empty prompt has no tokens, which causes an answer 500.
    "prompt": Texts(),
    "suffix": _UNREAD,
    "echo": Flag(),
    # Any value causes an answer 500: lmdeploy openai/endpoints/completions.py `logprobs is removed`
    "logprobs": RefusedRule(
        why="is not taken here: /v1/chat/completions and /generate give log probabilities"
    ),
}
_GENERATE: Final[Mapping[str, Rule]] = {
    **_SAMPLING,
    **_RETURNS,
    "prompt": TextRule(empty=False),
    "input_ids": _INPUT,
    "image_data": _LIMITED_ELSEWHERE,
    "media_io_kwargs": _LIMITED_ELSEWHERE,
    "mm_processor_kwargs": _LIMITED_ELSEWHERE,
    "max_tokens": _LENGTH,
    # The engine reads the first 32 ids, and its kernel writes to the logits of each id:
    # lmdeploy 0.16.0 src/turbomind/generation/logits_processor.cc `kMaxEndIdsSize`
    "stop_token_ids": Ids(most=32),
    # lmdeploy 0.16.0 src/turbomind/utils/constant.h `kMaxLogProb = 1024`. In the PyTorch engine,
    # torch.topk raises above the vocabulary.
    "top_logprobs_num": IntegerRule(most=1024, over="lower"),
    "logprob_start_len": IntegerRule(least=-1, most="context"),
}
_MESSAGES: Final[Mapping[str, Rule]] = {
    **{name: _SAMPLING[name] for name in ("stream", "top_k")},
    **_RETURNS,
    # lmdeploy anthropic/endpoints/validation.py::_validate_sampling_request #8a5d95
    "temperature": Number(least=0, most=1, floor=0.01),
    "top_p": Number(least=0, most=1),
    "model": _NAME,
    "messages": _LIMITED_ELSEWHERE,
    "system": _LIMITED_ELSEWHERE,
    "max_tokens": _LENGTH,
    "stop_sequences": _STOP,
    "metadata": _UNREAD,
    "tools": _LIMITED_ELSEWHERE,
    "tool_choice": _UNREAD,
    "service_tier": _UNREAD,
    "input_ids": _INPUT,
    "image_data": _LIMITED_ELSEWHERE,
    "return_token_ids": Flag(),
}
_COUNT_TOKENS: Final[Mapping[str, Rule]] = {
    name: _MESSAGES[name] for name in ("model", "messages", "system", "tools")
}
_UNREAD_RESPONSES: Final = (
    "background", "context_management", "conversation", "include", "max_tool_calls", "metadata",
    "parallel_tool_calls", "previous_response_id", "prompt_cache_key",
    "prompt_cache_retention", "reasoning", "request_id", "safety_identifier", "service_tier",
    "store", "stream_options", "tool_choice", "top_logprobs", "truncation",
)  # fmt: skip
_RESPONSES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(_UNREAD_RESPONSES, _UNREAD),
    # The variables of this field may hold images. LMDeploy reads no part of the field.
    "prompt": Rule(passed=False),
    **{
        name: _SAMPLING[name]
        for name in (
            "temperature", "min_p", "top_k", "repetition_penalty", "ignore_eos",
            "skip_special_tokens", "stop", "stream",
        )
    },
    **{name: _OPENAI[name] for name in (
        "model", "seed", "presence_penalty", "frequency_penalty", "user",
    )},
    # This route allows 0: lmdeploy openai/responses/request.py::_validate_sampling_request #611ea7
    "top_p": Number(least=0, most=1),
    "input": _LIMITED_ELSEWHERE,
    "instructions": _LIMITED_ELSEWHERE,
    "max_output_tokens": _LENGTH,
    "logit_bias": _CHAT["logit_bias"],
    "include_stop_str_in_output": Flag(),
    "text": _LIMITED_ELSEWHERE,
    "tools": _CHAT["tools"],
}  # fmt: skip

#: Rules by `routes.Kind`, then by field.
RULES: Final[Mapping[str, Mapping[str, Rule]]] = {
    "chat": _CHAT,
    "completions": _COMPLETIONS,
    "generate": _GENERATE,
    "messages": _MESSAGES,
    "count_tokens": _COUNT_TOKENS,
    "responses": _RESPONSES,
}

#: Rules of one engine: they hold in addition to the rules above, on every route.
DIFFERENT: Final[Mapping[str, Mapping[str, Rule]]] = {
    "turbomind": {},
    "pytorch": {
        # LMDeploy's server makes a local function of this field, and cannot pickle the function for
        # its engine. The answer is 500 with "Can't pickle local object":
        # lmdeploy chat_completions/logits_processors.py::logit_bias_logits_processor #798a3e
        "logit_bias": RefusedRule(
            why="is not taken: LMDeploy's server cannot send this field to its PyTorch engine"
        ),
        "top_k": IntegerRule(most="vocabulary", over="lower"),
        "top_logprobs_num": IntegerRule(most="vocabulary", over="lower"),
    },
    "transformers": {
        "tools": RefusedRule(why="is not taken: Transformers answers in text, and calls no tools"),
        # transformers 5.17.0 generation/stopping_criteria.py::StopStringCriteria #80ebf4
        # compares each string with each token in Python: 0.4 s for 150,000 tokens, and 22 ms for
        # each character. 16 strings of 1,024 characters took a minute and 10 GB of host memory with
        # a tokenizer of bytes. An empty list causes an answer 500.
        "stop": Texts(most=4, together=64),
    },
}

#: Rules by field of LMDeploy's GenerationConfig, for `turbofit.pipeline`.
GENERATION: Final[Mapping[str, Rule]] = {
    **{
        name: _SAMPLING[name]
        for name in (
            "temperature", "min_p", "top_k", "repetition_penalty", "repetition_ngram_size",
            "repetition_ngram_threshold", "ignore_eos", "skip_special_tokens",
            "spaces_between_special_tokens",
        )
    },
    **dict.fromkeys(
        (
            "n", "do_sample", "stop_words", "bad_words", "response_format", "logits_processors",
            "output_logits", "output_last_hidden_state", "return_ppl", "with_cache",
            "preserve_cache", "migration_request", "return_routed_experts",
            "include_stop_str_in_output",
        ),
        Rule(),
    ),
    "top_p": Number(least=0, most=1),
    "max_new_tokens": IntegerRule(most="context", over="lower"),
    "min_new_tokens": _CHAT["min_new_tokens"],
    "random_seed": _OPENAI["seed"],
    "stop_token_ids": _GENERATE["stop_token_ids"],
    "bad_token_ids": _GENERATE["stop_token_ids"],
    "logprobs": IntegerRule(most=1024, over="lower"),
    "logprob_start_len": _GENERATE["logprob_start_len"],
}  # fmt: skip

#: Fields that limit the answer's length, by kind; LMDeploy reads the first one that is given.
ANSWER_LENGTHS: Final[Mapping[str, tuple[str, ...]]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_completion_tokens", "max_tokens"),
    "generate": ("max_tokens",),
    "messages": ("max_tokens",),
    "responses": ("max_output_tokens",),
}

MOST_TEMPLATE_ARGUMENTS: Final = 64
#: Arguments of Transformers' apply_chat_template that a client must not set. LMDeploy passes
#: ``chat_template_kwargs`` to this function; a client's own template could block the event loop.
TEMPLATE_ARGUMENTS: Final = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask",
        "return_dict", "return_tensors", "self", "tokenize", "tokenizer_kwargs", "tools",
        "truncation",
    }
)  # fmt: skip
#: The most messages of a chat, and the most parts of all messages. LMDeploy's event loop takes 43
#: us for each, 0.4 s for the most. A longer chat is refused, even if it would fit the session.
_MOST_MESSAGES: Final = 8192
_CONVERSATIONS: Final = ("messages", "input", "system")
_TEMPLATE: Final = "chat_template_kwargs"
_ASCII: Final = bytes(range(128))
#: The most bytes that NFC makes of one byte (Unicode Standard Annex 15, expansion factors).
_NFC: Final = 3


@cache
def passed_fields(kind: str) -> frozenset[str]:
    """Return the fields of a route that are passed on; all others are left out.

    LMDeploy ignores unknown fields, but a later release may read images or limits from them.
    """
    return frozenset(name for name, rule in RULES.get(kind, {}).items() if rule.passed)


def scope_of(bounds: Bounds) -> Scope:
    return Scope(
        engine=bounds.engine,
        vocabulary=bounds.vocabulary,
        context=bounds.promise.context,
    )


def hold_parameters(kind: str, body: JsonObject, scope: Scope) -> list[str]:
    """Bring a body's fields into their ranges, in place; return changes like ``top_k=4096->1024``.

    ``body`` has only known fields, and no null; ``kind`` is a `routes.Kind`.
    """
    changes = hold_fields(RULES[kind], body, scope)
    _check_conversation(body, scope.context)
    check_template(body.get(_TEMPLATE))
    check_grammars(body)
    return changes


def hold_fields(rules: Mapping[str, Rule], fields: JsonObject, scope: Scope) -> list[str]:
    """Apply to each field its rule, in place; return changes like ``top_k=9->8``."""
    changes = []
    for name, value in fields.items():
        in_range = rules[name].hold(name, value, scope)
        of_engine = DIFFERENT.get(scope.engine, {}).get(name)
        if of_engine is not None and in_range is not None:
            in_range = of_engine.hold(name, in_range, scope)
        if in_range is not value:
            fields[name] = in_range
            number = isinstance(in_range, int | float) and not isinstance(in_range, bool)
            # ``"3"`` and 3.0 are only other spellings of 3.
            if number and value != in_range and shown(value) != shown(in_range):
                changes.append(f"{name}={shown(value)}->{shown(in_range)}")
    return changes


def state_answer(kind: str, body: JsonObject, tokens: int, changes: list[str]) -> None:
    """State the length of the answer, in ``tokens``, in a body that states none; note the change.

    If ``tokens`` is 0, the answer may fill the session.
    """
    names = ANSWER_LENGTHS.get(kind, ())
    if tokens and names and stated_answer(kind, body) is None:
        body[names[-1]] = tokens
        changes.append(f"{names[-1]}=none->{tokens}")


def stated_answer(kind: str, body: Mapping[str, Any]) -> int | None:
    """Return the most tokens of an answer that the body states; None if it states none."""
    stated = [body.get(name) for name in ANSWER_LENGTHS.get(kind, ())]
    return max((length for length in stated if isinstance(length, int)), default=None)


def lower_answer(kind: str, body: JsonObject, left: int, changes: list[str]) -> None:
    """Lower the stated length of the answer to ``left`` tokens, in place, and note the change.

    ``left`` still includes the tokens of the text, so it may be too high. Then the engine lowers
    the length further, and the client gets no note of this.
    """
    for name in ANSWER_LENGTHS.get(kind, ()):
        tokens = body.get(name)
        if isinstance(tokens, int) and tokens > left > 0:
            body[name], asked = left, f"{name}={shown(tokens)}"
            # The rule of the field may have lowered the length already.
            for change in [change for change in changes if change.startswith(f"{name}=")]:
                asked = change.partition("->")[0]
                changes.remove(change)
            changes.append(f"{asked}->{left}")


def _check_conversation(body: Mapping[str, Any], context: int) -> None:
    """Refuse a body with too many messages or parts of messages.

    Each message takes at least one token, so there may be at most ``context`` messages.
    """
    most = min(_MOST_MESSAGES, context or _MOST_MESSAGES)
    parts = 0
    for name in _CONVERSATIONS:
        listed = body.get(name)
        if not isinstance(listed, list):
            continue
        if len(listed) > most:
            raise refused(name, f"has {len(listed)} messages, the limit is {most}")
        for message in listed:
            if not isinstance(message, dict):
                # LMDeploy would try such an item as sixty types, and report every failure.
                raise refused(name, "has an item that is no object")
            parts += _parts(message.get("content"))
        if parts > _MOST_MESSAGES:
            raise refused(name, f"has {parts} parts of messages, the limit is {_MOST_MESSAGES}")


def _parts(content: Any) -> int:
    """Return the number of parts of a message, including the parts of its tool results."""
    if not isinstance(content, list):
        return 0
    inner = (part.get("content") for part in content if isinstance(part, dict))
    return len(content) + sum(len(parts) for parts in inner if isinstance(parts, list))


def check_template(arguments: Any) -> None:
    """Refuse arguments of a chat template if they are too many, or if the server sets them itself.

    Raises:
        Refusal: the arguments are no object, have too many names, or a name that the server sets.
    """
    if arguments is None:
        return
    if not isinstance(arguments, dict):
        raise refused(_TEMPLATE, "is no object")
    if len(arguments) > MOST_TEMPLATE_ARGUMENTS:
        raise refused(
            _TEMPLATE, f"has {len(arguments)} names, the limit is {MOST_TEMPLATE_ARGUMENTS}"
        )
    for name in arguments:
        if name in TEMPLATE_ARGUMENTS:
            raise refused(_TEMPLATE, f"may not set {name!r}, which only the server sets")


def most_tokens(kind: str, body: JsonObject, raw: bytes, beside: int, images: int) -> int:
    """Return the most tokens that one prompt and its answer can have together.

    Return `UNSTATED` if the body does not state the length of the answer. A body with ``n`` or
    several prompts becomes several requests; the result is for one request. ``raw`` is the JSON of
    ``body``, ``beside`` the number of its bytes that are no images, ``images`` the images' tokens.

    Each byte of text is counted as one token. The result is too low for a tokenizer that normalises
    by NFKC, and for a template that makes the text of tools more than twice as long.
    """
    answer = stated_answer(kind, body)
    if answer is None:
        return UNSTATED
    tools = body.get("tools")
    # A template may make the text of tools twice as long.
    again = len(msgspec.json.encode(tools)) if tools else 0
    return images + beside + again + _normalised(raw) + TEMPLATE_TOKENS + answer


def _normalised(raw: bytes) -> int:
    """Return by how many bytes a text may grow if a tokenizer normalises the text by NFC.

    The result is 0 for nearly all texts.
    """
    if raw.isascii():
        return 0
    high = raw.translate(None, _ASCII)
    if unicodedata.is_normalized("NFC", high.decode("utf-8", "replace")):
        return 0
    return (_NFC - 1) * len(high)

"""Fields of request bodies that are passed on, by kind of route; all others are left out.

They are what LMDeploy 0.18 declares, less ``session_id`` (a client could occupy the numbers of
others) and what it reads without declaring (``migration_request``, ``with_cache`` and
``preserve_cache`` of disaggregated serving). What LMDeploy does not declare it ignores anyway; a
later version may begin to read an image or a limit there, which is why it does not pass unseen.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FIELDS"]

_SAMPLING: Final = (
    "frequency_penalty", "ignore_eos", "min_p", "presence_penalty", "repetition_ngram_size",
    "repetition_ngram_threshold", "repetition_penalty", "seed", "skip_special_tokens",
    "spaces_between_special_tokens", "stop", "stream", "stream_options", "temperature", "top_k",
    "top_p", "user",
)  # fmt: skip
_CHAT: Final = (
    "chat_template_kwargs", "enable_thinking", "image_data", "include_stop_str_in_output",
    "input_ids", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
    "media_io_kwargs", "messages", "min_new_tokens", "mm_processor_kwargs", "model", "n",
    "parallel_tool_calls", "reasoning_effort", "response_format", "return_logprob",
    "return_routed_experts", "return_token_ids", "tool_choice", "tools", "top_logprobs",
)  # fmt: skip
_GENERATE: Final = (
    "ignore_eos", "image_data", "include_stop_str_in_output", "input_ids", "logprob_start_len",
    "max_tokens", "media_io_kwargs", "min_p", "mm_processor_kwargs", "prompt",
    "repetition_ngram_size", "repetition_ngram_threshold", "repetition_penalty", "return_logprob",
    "return_routed_experts", "skip_special_tokens", "spaces_between_special_tokens", "stop",
    "stop_token_ids", "stream", "temperature", "top_k", "top_logprobs_num", "top_p",
)  # fmt: skip
_MESSAGES: Final = (
    "image_data", "include_stop_str_in_output", "input_ids", "max_tokens", "messages", "metadata",
    "model", "return_logprob", "return_routed_experts", "return_token_ids", "service_tier",
    "stop_sequences", "stream", "system", "temperature", "tool_choice", "tools", "top_k", "top_p",
)  # fmt: skip
_RESPONSES: Final = (
    "background", "context_management", "conversation", "frequency_penalty", "ignore_eos",
    "include", "include_stop_str_in_output", "input", "instructions", "logit_bias",
    "max_output_tokens", "max_tool_calls", "metadata", "min_p", "model", "parallel_tool_calls",
    "presence_penalty", "previous_response_id", "prompt", "prompt_cache_key",
    "prompt_cache_retention", "reasoning", "repetition_penalty", "request_id",
    "safety_identifier", "seed", "service_tier", "skip_special_tokens", "stop", "store", "stream",
    "stream_options", "temperature", "text", "tool_choice", "tools", "top_k", "top_logprobs",
    "top_p", "truncation", "user",
)  # fmt: skip

#: By `routes.Kind`.
FIELDS: Final[dict[str, frozenset[str]]] = {
    "chat": frozenset({*_SAMPLING, *_CHAT}),
    "completions": frozenset(
        {*_SAMPLING, "echo", "logprobs", "max_completion_tokens", "max_tokens", "model", "n",
         "prompt", "suffix"}
    ),
    "generate": frozenset(_GENERATE),
    "messages": frozenset(_MESSAGES),
    "count_tokens": frozenset({"model", "messages", "system", "tools"}),
    "responses": frozenset(_RESPONSES),
}  # fmt: skip

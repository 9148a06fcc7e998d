"""The private classes of ``transformers serve`` that the fallback uses, checked before use.

Transformers does not promise them: each release may move them. All that is used is checked here, so
that another release fails at once and with one line.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, Final, NamedTuple

from turbofit.core.errors import PackageError

__all__ = ["TransformersInternals", "find_inside"]

#: Releases that were tried.
_TRIED: Final = "5.17 and 5.24"
_HINT: Final = f'pip install "turbofit[fallback]" (transformers {_TRIED} were tried)'
_WHERE: Final = "transformers.cli.serving"

#: (module, class or function, method, parameters that are given to it).
_USED: Final = (
    ("model_manager", "ModelManager", "__init__",
     {"device", "dtype", "attn_implementation", "force_model"}),
    ("model_manager", "ModelManager", "_load_model", {"model_id_and_revision"}),
    ("model_manager", "ModelManager", "_load_processor", {"model_id_and_revision"}),
    ("model_manager", "ModelManager", "process_model_name", {"model_id"}),
    ("utils", "GenerateManager", "generate_streaming",
     {"model", "processor", "inputs", "gen_config", "request_id"}),
    ("utils", "GenerateManager", "generate_non_streaming",
     {"model", "processor", "inputs", "gen_config", "request_id"}),
    ("utils", "GenerationState", "get_manager", {"model_id", "use_cb"}),
    ("chat_completion", "ChatCompletionHandler", "_build_generation_config",
     {"body", "model_generation_config", "use_cb"}),
    ("chat_completion", "ChatCompletionHandler", "handle_request", {"body", "request_id"}),
    ("chat_completion", "ChatCompletionHandler", "get_processor_inputs_from_messages",
     {"messages", "modality"}),
    ("completion", "CompletionHandler", "_build_generation_config",
     {"body", "model_generation_config", "use_cb"}),
    ("completion", "CompletionHandler", "handle_request", {"body", "request_id"}),
    ("server", "build_server", None,
     {"model_manager", "chat_handler", "completion_handler", "generation_state"}),
)  # fmt: skip


class TransformersInternals(NamedTuple):
    """Transformers' own classes; typed as anything, since no type is promised either."""

    version: str
    manager: Any
    generating: Any
    state: Any
    chat: Any
    completions: Any
    build_server: Any


def find_inside() -> TransformersInternals:
    """Import and check them; takes seconds.

    Raises:
        PackageError: Transformers or what its server needs is missing, or is another inside.
    """
    for name in ("torch", "transformers", "accelerate", "fastapi", "uvicorn", "openai"):
        _import(name)
    version = import_module("transformers").__version__
    found: dict[str, Any] = {}
    for part, name, method, parameters in _USED:
        try:
            owner = getattr(import_module(f"{_WHERE}.{part}"), name)
            call = owner if method is None else getattr(owner, method)
            missing = parameters - set(inspect.signature(call).parameters)
        except (ImportError, AttributeError) as exc:
            raise _changed(version, str(exc)) from None
        if missing:
            raise _changed(version, f"{name}.{method or ''} takes no {', '.join(sorted(missing))}")
        found[name] = owner
    return TransformersInternals(
        version=version,
        manager=found["ModelManager"],
        generating=found["GenerateManager"],
        state=found["GenerationState"],
        chat=found["ChatCompletionHandler"],
        completions=found["CompletionHandler"],
        build_server=found["build_server"],
    )


def _import(name: str) -> None:
    try:
        import_module(name)
    except ImportError as exc:
        raise PackageError(
            f"the fallback engine needs {name}, which cannot be imported: {exc}", hint=_HINT
        ) from None


def _changed(version: str, what: str) -> PackageError:
    return PackageError(
        f"transformers {version} has another server inside than the fallback engine knows: {what}",
        hint=_HINT,
    )

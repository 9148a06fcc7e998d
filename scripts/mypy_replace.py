"""A plugin for mypy: the fields that `msgspec.structs.replace` changes have their declared types.

msgspec takes any value for any field, and a record that is null where its type says otherwise
becomes a document that nobody can read.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import ARG_NAMED_OPT, ARG_POS
from mypy.plugin import FunctionSigContext, Plugin
from mypy.typeops import bind_self
from mypy.types import CallableType, FunctionLike, Instance, get_proper_type

_REPLACE = "msgspec.structs.replace"


def _signature(context: FunctionSigContext) -> FunctionLike:
    """Return the signature of one call: the struct, then each field of its class by its name."""
    default = context.default_signature
    struct = get_proper_type(context.api.get_expression_type(context.args[0][0]))  # type: ignore[attr-defined]
    if not isinstance(struct, Instance):
        return default
    made = get_proper_type(struct.type["__init__"].type)
    if not isinstance(made, CallableType):
        return default
    fields = bind_self(made, struct)
    return default.copy_modified(
        arg_names=[default.arg_names[0], *fields.arg_names],
        arg_types=[struct, *fields.arg_types],
        arg_kinds=[ARG_POS, *(ARG_NAMED_OPT for _ in fields.arg_names)],
        ret_type=struct,
        variables=(),
    )


class Replace(Plugin):
    """Gives each call of `replace` a signature of its own."""

    def get_function_signature_hook(
        self, fullname: str
    ) -> Callable[[FunctionSigContext], FunctionLike] | None:
        """Return the hook for `replace`, None for all other functions."""
        return _signature if fullname == _REPLACE else None


def plugin(version: str) -> type[Plugin]:  # noqa: ARG001 - mypy calls it
    """Return the plugin, for mypy."""
    return Replace

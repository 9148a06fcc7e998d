"""The paths that exist, and the names by which clients may call a model.

The engine's path is a constant of the route. So no spelling of a path (``//``, ``..``, percent
encodings, upper case) can lead to another path of the engine. LMDeploy would redirect a path with a
final slash; the gateway serves such a path directly, since some clients do not send a body again
after a redirect.
"""

from __future__ import annotations

import time
from codecs import BOM_UTF8
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace

from turbofit.core.struct import Document, JsonObject, Struct
from turbofit.gateway.http.refusals import Api, Refusal

Kind = Literal[
    "chat", "completions", "messages", "count_tokens", "responses", "generate", "models",
    "health", "about", "metrics",
]  # fmt: skip
#: Routes of LMDeploy and of its proxy that are closed to clients. The answer is 403, not 404, so
#: that people who relied on such a route learn the reason.
MANAGEMENT: Final = frozenset(
    {
        "/update_weights", "/update_weights_from_ipc", "/init_weights_update_group",
        "/update_weights_from_distributed", "/destroy_weights_update_group", "/sleep", "/wakeup",
        "/is_sleeping", "/abort_request", "/terminate", "/get_ppl", "/pooling",
        "/v1/embeddings", "/v1/encode", "/distserve/engine_info", "/distserve/p2p_initialize",
        "/distserve/p2p_connect", "/distserve/p2p_drop_connect", "/distserve/free_cache",
        "/nodes/status", "/nodes/add", "/nodes/remove", "/nodes/terminate", "/nodes/terminate_all",
    }
)  # fmt: skip
_MANAGES: Final = "it manages the engine"
#: The reasons for closed routes that do not manage the engine.
_CLOSED: Final = {
    "/get_ppl": "it takes GPU memory for the logits of a whole prompt, which no plan counts",
    "/pooling": "it takes GPU memory for reward scores, which no plan counts",
    "/v1/embeddings": "LMDeploy makes no embeddings",
    "/v1/encode": "/v1/messages/count_tokens counts tokens, those of images too",
}
_MANAGEMENT_FOLDERS: Final = ("/distserve", "/nodes")
_CREATED: Final = int(time.time())


class Route(Struct):
    path: str
    method: Literal["GET", "POST"]
    kind: Kind
    api: Api = "openai"
    #: The model in `/v1/models/NAME`.
    model: str = ""


#: Routes that are passed on, and routes that the gateway answers itself.
ROUTES: Final[dict[str, Route]] = {
    route.path: route
    for route in (
        Route(path="/v1/chat/completions", method="POST", kind="chat"),
        Route(path="/v1/completions", method="POST", kind="completions"),
        Route(path="/v1/responses", method="POST", kind="responses", api="responses"),
        Route(path="/v1/messages", method="POST", kind="messages", api="anthropic"),
        Route(
            path="/v1/messages/count_tokens", method="POST", kind="count_tokens", api="anthropic"
        ),
        Route(path="/generate", method="POST", kind="generate", api="generate"),
        Route(path="/v1/models", method="GET", kind="models"),
        Route(path="/anthropic/v1/models", method="GET", kind="models", api="anthropic"),
        Route(path="/health", method="GET", kind="health"),
        Route(path="/about", method="GET", kind="about"),
        Route(path="/metrics", method="GET", kind="metrics"),
    )
}


def find_route(method: str, raw_path: bytes) -> Route:
    """Return the route of a raw path without a query; HEAD counts as GET.

    Raises:
        Refusal: the route does not exist, is closed, or has another method.
    """
    path = raw_path.rstrip(b"/").decode("latin-1")
    beginning, names_model, model = path.partition("/models/")
    route = ROUTES.get(f"{beginning}/models" if names_model else path)
    if route is not None and names_model:
        route = replace(route, model=unquote(model))
    if route is None:
        if path in MANAGEMENT or path.startswith(_MANAGEMENT_FOLDERS):
            raise Refusal("management_route", path=path[:80], why=_CLOSED.get(path, _MANAGES))
        raise Refusal("not_found")
    if route.method != ("GET" if method == "HEAD" else method):
        raise Refusal("method_not_allowed:route", path=route.path, method=route.method)
    return route


def api_of(raw_path: bytes) -> Api:
    """Return the API whose form an error at this path has; the path may be unknown."""
    route = ROUTES.get(raw_path.rstrip(b"/").decode("latin-1"))
    if route is not None:
        return route.api
    return "anthropic" if raw_path.startswith((b"/v1/messages", b"/anthropic/")) else "openai"


class _Named(msgspec.Struct):
    model: Any = None


def named_model(body: bytes) -> Any:
    """Return the value of ``model`` in a request's body; None if the body has no such field.

    Raises:
        Refusal: the body is no JSON object.
    """
    try:
        return msgspec.json.decode(body.removeprefix(BOM_UTF8), type=_Named).model
    except (msgspec.DecodeError, RecursionError) as exc:
        raise Refusal("invalid_json", exc=exc) from None


def hold_name(names: Mapping[str, str], body: JsonObject) -> None:
    """Replace the client's name of a model in a body by the engine's name.

    Raises:
        Refusal: no model has the client's name.
    """
    name = body.get("model")
    if not names or name is None:
        return
    if not isinstance(name, str) or name not in names:
        raise no_such_model(name, names)
    body["model"] = names[name]


def no_such_model(name: Any, known: Collection[str]) -> Refusal:
    return Refusal("model_not_found", name=str(name)[:80], known=", ".join(known), param="model")


def models_document(names: Mapping[str, str], api: Api, name: str = "") -> Document:
    """Return the list of models in the form of an API, or only the entry of model ``name``.

    ``names`` maps each name that clients may use to its model.

    Raises:
        Refusal: no model has this name.
    """
    if name:
        if name not in names:
            raise no_such_model(name, names)
        document: Document = models_document({name: names[name]}, api)["data"][0]
        return document
    if api == "anthropic":
        data = [{"type": "model", "id": name, "display_name": names[name]} for name in names]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return {"data": data, "has_more": False, **ends}
    return {
        "object": "list",
        "data": [
            {
                "id": name, "object": "model", "created": _CREATED, "owned_by": "lmdeploy",
                "root": names[name], "parent": None, "permission": [],
            }
            for name in names
        ],
    }  # fmt: skip


def first_model(listed: bytes | str) -> str | None:
    """Return the first name in a server's list of models, given as JSON; None if there is none."""
    try:
        name = msgspec.json.decode(listed)["data"][0]["id"]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None

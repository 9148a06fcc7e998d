"""``python -m turbofit.launch.fallback.server``: one model, one map, one port, until it is stopped.

Torch and Transformers are imported in here only: the supervisor runs it as a child.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from turbofit.core.errors import LaunchError, TurbofitError
from turbofit.core.process.ports import DEFAULT_PORT
from turbofit.core.units import format_bytes
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.connections import Connections, Networks
from turbofit.gateway.server import run_gateway
from turbofit.planning.fallback_command import read_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.launch.fallback.generating import GenerationOptions
    from turbofit.launch.fallback.work import ServedWork

__all__ = ["main"]

#: What the supervisor reads: see ``observe.log_reader``.
_SAYS = "turbofit-fallback:"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; returns the exit code. A signal that ends it does so as if click were not there."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        with serve.make_context("turbofit-fallback", arguments) as context:
            serve.invoke(context)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.UsageError as exc:
        exc.show()
        return exc.exit_code
    except TurbofitError as exc:
        print(f"turbofit-fallback: {exc.message}\nhint: {exc.hint}", file=sys.stderr)  # noqa: T201
        return exc.exit_code
    return 0


@click.command("turbofit-fallback", help=__doc__)
@click.option("--model", required=True, help="a checkpoint's folder, or a hub id")
@click.option("--served-name", help="what clients call it; default: --model")
@click.option("--device-map", required=True, help="JSON, or a file that holds it")
@click.option("--offload-folder", help="for what the map sends to disk")
@click.option("--dtype", default="bfloat16", type=click.Choice(("float16", "bfloat16", "float32")))
@click.option("--session-len", type=int, required=True, help="tokens of a request")
@click.option("--max-images", type=int, default=1, help="of a request")
@click.option("--host", default="127.0.0.1")
@click.option("--port", type=int, default=DEFAULT_PORT)
@click.option("--api-keys", multiple=True, help="who may ask (repeatable); default: anybody")
def serve(  # noqa: PLR0913 - each option by name
    *,
    model: str,
    served_name: str | None,
    device_map: str,
    offload_folder: str | None,
    dtype: str,
    session_len: int,
    max_images: int,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
) -> None:
    """Serve one model through Transformers, with one device map, on one port, until stopped.

    Raises:
        PackageError: Transformers is missing, or another inside.
        UsageError: the map cannot be read.
        LaunchError: the model cannot be loaded.
    """
    from turbofit.launch.fallback.front import FallbackApp
    from turbofit.launch.fallback.generating import GenerationOptions, inner_app
    from turbofit.launch.fallback.private import find_inside
    from turbofit.launch.fallback.work import ServedWork

    placed = read_map(device_map)
    began = time.monotonic()
    inside = find_inside()
    _say(f"transformers {inside.version} is there after {time.monotonic() - began:.1f} s")
    with tempfile.TemporaryDirectory(prefix="turbofit-offload-") as scratch:
        options = GenerationOptions(
            model=model,
            name=served_name or model,
            device_map=placed,
            dtype=dtype,
            session_len=session_len,
            max_images=max_images,
            offload=offload_folder or scratch,
        )
        work = ServedWork()
        inner = _loaded(inside, inner_app, options, work)
        front = FallbackApp(
            inner,
            work,
            name=options.name,
            session_len=options.session_len,
            max_images=options.max_images,
            keys=api_keys,
            on_fatal=_end,
        )
        _listen(front, host, port)


def _loaded(inside: Any, inner_app: Any, options: GenerationOptions, work: ServedWork) -> Any:
    """Transformers' application with the model in it.

    Raises:
        LaunchError: it cannot be loaded; torch's own lack of memory is left as it is.
    """
    import torch

    _say("loading weights")
    began = time.monotonic()
    try:
        inner = inner_app(inside, options, work)
    except (OSError, ValueError) as exc:
        raise LaunchError(
            f"Transformers cannot load {options.model}: {exc}",
            hint="see turbofit plan --engine transformers",
        ) from None
    cuda: Any = torch.cuda
    held = [
        f"device {number}: {format_bytes(cuda.memory_reserved(number))}"
        for number in range(cuda.device_count())
    ]
    _say(f"weights loaded in {time.monotonic() - began:.1f} s {'; '.join(held)}")
    return inner


class _Public:
    """The front as the gateway's own server takes it: its connections end with a word, too."""

    def __init__(self, front: Any, config: GatewayConfig) -> None:
        self._front, self.config = front, config
        no_proxies, nowhere = Networks(()), lambda _name, _label: None
        self.connections = Connections(config.connection, no_proxies, nowhere)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        with suppress(asyncio.CancelledError):  # at the end, which has told the client
            await self._front(scope, receive, send)


def _listen(front: Any, host: str, port: int) -> None:
    public = _Public(front, GatewayConfig(host=host, port=port))
    run_gateway(public, on_ready=lambda url: _say(f"Uvicorn running on {url}"))


def _end(reason: str) -> None:
    """End the process at once: its memory, or its CUDA context, cannot be repaired."""
    print(reason, file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _say(text: str) -> None:
    print(f"{_SAYS} {text}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())

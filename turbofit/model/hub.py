"""Reads small files and tensor headers on the Hugging Face hub, a mirror or ModelScope.

This module is imported only to look up a name on a hub. Sizes, redirects and times are limited,
since anybody may run a mirror.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from turbofit.core.errors import UsageError
from turbofit.core.process.log import LazyLogger
from turbofit.core.version import __version__
from turbofit.model.checkpoint import Weights
from turbofit.model.config import LARGEST_JSON, parse_json
from turbofit.model.folder import INDEX, sharded, uses_modelscope
from turbofit.model.safetensors import (
    LARGEST_INDEX,
    PREFIX,
    Tensor,
    header_length,
    parse_header,
    parse_index,
)

_LOG: Final = LazyLogger(__name__)

_TIMEOUT: Final = 5.0
#: The most seconds for a whole checkpoint; 30 shards on a slow mirror take about ten.
_PATIENCE: Final = 30.0
_REDIRECTS: Final = 5
#: The bytes of a file's first request; most headers are smaller.
_FIRST_BYTES: Final = 256 << 10
_TRUE: Final = {"1", "ON", "YES", "TRUE"}
_BROKEN: Final = "the repository is broken: take another revision"
#: Request headers: turbofit's name, and no compression, since ranges count stored bytes.
_IDENTITY: Final = {"User-Agent": f"turbofit/{__version__}", "Accept-Encoding": "identity"}
_NETWORK_ERRORS: Final = (URLError, HTTPException, OSError, ValueError)


class HubUnreachableError(UsageError):
    """The hub gave no checkpoint: it is not reachable, has no such repository, or denies access."""


class NotGivenError(HubUnreachableError):
    """The hub answered, but does not have this checkpoint or revision, or denies access."""


class HubFiles:
    """The files of one repository, at the commit that the hub's first answer names."""

    home = "https://huggingface.co"
    branch = "main"
    endpoint_key = "HF_ENDPOINT"
    token_key = "HF_TOKEN"

    def __init__(self, hub_id: str, revision: str | None = None) -> None:
        endpoint = (os.environ.get(self.endpoint_key) or self.home).rstrip("/")
        self.host = _host(endpoint, self.endpoint_key)
        self.hub_id = hub_id
        self.revision = revision or self.branch
        self.endpoint = endpoint
        self._deadline = time.monotonic() + _PATIENCE
        self._opener = build_opener(_Redirects)
        self._cache: dict[str, bytes | None] = {}

    @property
    def where(self) -> str:
        """The host, the repository and the commit, for the model's ``source``."""
        return f"{self.host}/{self.hub_id}@{self.revision}"

    def read(self, name: str) -> bytes | None:
        """Read a small file, as `Files.read` does; each file is downloaded once."""
        if name not in self._cache:
            self._cache[name] = self._small_file(name, LARGEST_JSON)
        return self._cache[name]

    def weights(self) -> Weights:
        """Read the headers of the weight files; each takes one or two requests."""
        index = self._small_file(INDEX, LARGEST_INDEX)
        if index is None:
            single = self._header("model.safetensors")
            if single is not None:
                return Weights(single)
            return Weights(
                None,
                f"{self.hub_id} has no safetensors file: sizes are computed from config.json",
            )
        where = parse_index(index, INDEX)
        files = sorted(set(where.values()))
        with ThreadPoolExecutor(max_workers=8) as pool:
            headers = dict(zip(files, pool.map(self._shard_header, files), strict=True))
        tensors = sharded(where, INDEX, headers.__getitem__, _BROKEN)
        _LOG.info("%s: %d tensors in %d files", self.where, len(tensors), len(files))
        return Weights(tensors)

    def _shard_header(self, name: str) -> dict[str, Tensor]:
        header = self._header(name)
        if header is None:
            raise UsageError(f"{self.hub_id} lacks {name}, which its index names", hint=_BROKEN)
        return header

    def _header(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors in a safetensors file's header; None if the file does not exist."""
        start = self._range(name, 0, _FIRST_BYTES)
        if start is None:
            return None
        data, size = start
        end = PREFIX + header_length(data, size, name)
        if len(data) < end and (rest := self._range(name, len(data), end - len(data))):
            data += rest[0]
        if len(data) < end:
            raise UsageError(
                f"{name} ends before its header does", hint="try again, or download it"
            )
        return parse_header(data[PREFIX:end], size, name)

    def _range(self, name: str, start: int, count: int) -> tuple[bytes, int | None] | None:
        """Return ``count`` bytes of a file from byte ``start`` on, and the size of the whole file.

        The size is None if the hub does not say it. Return None if the file does not exist.
        """
        answer = self._get(name, {"Range": f"bytes={start}-{start + count - 1}"})
        if answer is None:
            return None
        with answer:
            if answer.status != 206 and start:
                raise HubUnreachableError(
                    f"{self.host} does not answer byte ranges", hint="download the checkpoint first"
                )
            total = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
            known = total.isascii() and total.isdigit() and len(total) < 20
            return self._read_bytes(answer, count), int(total) if known else None

    def _small_file(self, name: str, limit: int) -> bytes | None:
        """Download a file of at most ``limit`` bytes; return None if the file does not exist."""
        answer = self._get(name, {})
        if answer is None:
            return None
        with answer:
            data = self._read_bytes(answer, limit + 1)
        if len(data) > limit:
            raise UsageError(
                f"{name} of {self.hub_id} is larger than {limit >> 20} MiB",
                hint="check the repository",
            )
        return data

    def _read_bytes(self, answer: HTTPResponse, count: int) -> bytes:
        """Read ``count`` bytes, or to the answer's end; raise an error after the deadline."""
        parts: list[bytes] = []
        while count > 0:
            self._check_deadline()
            try:  # read1 returns after one packet, so the deadline also holds for a slow server
                part = answer.read1(min(count, 1 << 20))
            except _NETWORK_ERRORS as exc:
                raise self._unreachable(exc) from None
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _url(self, name: str) -> str:
        path = f"{self.hub_id}/resolve/{quote(self.revision, safe='')}/{quote(name)}"
        return f"{self.endpoint}/{path}"

    def _token(self) -> dict[str, str]:
        token = os.environ.get(self.token_key, "").strip()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _get(self, name: str, headers: dict[str, str]) -> HTTPResponse | None:
        """Open one file; return None if the file does not exist."""
        return self._open(self._url(name), headers)

    def _open(self, url: str, headers: dict[str, str]) -> HTTPResponse | None:
        """Open one address; return None after HTTP 404."""
        self._check_deadline()
        request = Request(url, headers={**headers, **_IDENTITY, **self._token()})
        try:
            answer: HTTPResponse = self._opener.open(request, timeout=_TIMEOUT)
        except HTTPError as exc:
            exc.close()
            if refused := self._refused(exc):
                raise refused from None
            _LOG.debug("%s %s: 404", self.host, urlsplit(url).path)
            return None
        except _NETWORK_ERRORS as exc:
            raise self._unreachable(exc) from None
        _LOG.debug("%s %s: %d %s", self.host, urlsplit(url).path, answer.status, headers)
        commit = answer.headers.get("X-Repo-Commit")
        if commit and commit.isalnum() and len(commit) <= 64:
            self.revision = commit
        return answer

    def _unreachable(self, error: Exception) -> HubUnreachableError:
        reason = getattr(error, "reason", error)
        return HubUnreachableError(
            f"{self.host} cannot be reached: {str(reason)[:160] or type(error).__name__}",
            hint=f"check the network or {self.endpoint_key}, or name a local folder",
        )

    def _refused(self, error: HTTPError) -> HubUnreachableError | None:
        """Return the error for an HTTP error; None if the repository only lacks the file."""
        code = error.headers.get("X-Error-Code", "") if error.headers else ""
        if error.code in {401, 403} or code in {"GatedRepo", "RepoNotFound"}:
            return NotGivenError(
                f"{self.host} does not give {self.hub_id} (HTTP {error.code}): it does not exist, "
                "or is gated",
                hint=f"check the name; for a gated model accept its terms and set {self.token_key}",
            )
        if error.code == 404 and code != "RevisionNotFound":
            return None
        kind = NotGivenError if error.code == 404 else HubUnreachableError
        return kind(
            f"{self.host} answers {error.code} for {self.hub_id} at {self.revision}",
            hint="check `--revision`, or try again later",
        )

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise HubUnreachableError(
                f"{self.host} took more than {_PATIENCE:.0f} s for {self.hub_id}",
                hint="download the checkpoint first, or name a local folder",
            )


class ModelScopeFiles(HubFiles):
    """The files of one ModelScope repository, by the HTTP requests of the package modelscope.

    A listing says which files exist. The site sends a file itself, or redirects to the file.
    """

    home = "https://modelscope.cn"
    branch = "master"
    endpoint_key = "MODELSCOPE_ENDPOINT"
    token_key = "MODELSCOPE_API_TOKEN"

    def _url(self, name: str) -> str:
        query = f"Revision={quote(self.revision, safe='')}&FilePath={quote(name, safe='')}"
        return f"{self._models}/repo?{query}"

    @property
    def _models(self) -> str:
        return f"{self.endpoint}/api/v1/models/{self.hub_id}"

    def _token(self) -> dict[str, str]:
        token = os.environ.get(self.token_key, "").strip()
        return {"Cookie": f"m_session_id={quote(token, safe='')}"} if token else {}

    def _get(self, name: str, headers: dict[str, str]) -> HTTPResponse | None:
        # The site's answers for a missing file vary, so the listing decides.
        return super()._get(name, headers) if name in self._names else None

    @cached_property
    def _names(self) -> frozenset[str]:
        """The names of the files at the top of the repository."""
        query = f"Revision={quote(self.revision, safe='')}&Recursive=False"
        answer = self._open(f"{self._models}/repo/files?{query}", {})
        if answer is None:
            raise self._no_model()
        with answer:
            data = self._read_bytes(answer, LARGEST_JSON)
        hint = f"check {self.endpoint_key}, or download the checkpoint first"
        listing = parse_json(data, f"the listing of {self.hub_id}", hint)
        content = listing.section("Data")
        files = content.values.get("Files") if content else None
        if listing.values.get("Success") is False or not isinstance(files, list):
            raise self._no_model()
        paths = (file.get("Path") for file in files if isinstance(file, dict))
        return frozenset(path for path in paths if isinstance(path, str))

    def _no_model(self) -> NotGivenError:
        return NotGivenError(
            f"{self.host} has no model {self.hub_id} at {self.revision}",
            hint="look the model up on ModelScope, since owners differ; without"
            " LMDEPLOY_USE_MODELSCOPE, the Hugging Face hub is asked",
        )


def files_of(name: str, revision: str | None) -> HubFiles:
    """Return the files of a hub id on the hub that LMDeploy downloads from.

    Raises:
        HubUnreachableError: the environment forbids the network.
    """
    keys = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    if any(os.environ.get(key, "").upper() in _TRUE for key in keys):
        raise HubUnreachableError(
            f"{name} is not in the local hub cache, and the environment forbids the network",
            hint="download it first, or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
        )
    return (ModelScopeFiles if uses_modelscope() else HubFiles)(name, revision)


class _Redirects(HTTPRedirectHandler):
    """Follows few redirects, none from https to http; no token goes to another host."""

    max_redirections = _REDIRECTS
    max_repeats = 2

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in {"http", "https"} or (old.scheme, new.scheme) == ("https", "http"):
            raise URLError(f"redirected to {new.scheme or 'nowhere'}")
        follow = super().redirect_request(req, fp, code, msg, headers, newurl)
        if follow is not None and new.netloc != old.netloc:
            follow.remove_header("Authorization")
            follow.remove_header("Cookie")
        return follow


def _host(endpoint: str, key: str) -> str:
    """Return the host and port of the hub's address, without a password, for messages.

    ``key``: the environment variable that holds the address.
    """
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError(
            f"{key} {endpoint[:80]!r} is not a web address",
            hint="unset it, or set it to https://HOST",
        )
    return parts.netloc.rpartition("@")[2]

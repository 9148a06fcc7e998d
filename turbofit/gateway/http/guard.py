"""Who may ask: keys, and web pages."""

from __future__ import annotations

import hmac
import re
from hashlib import sha256
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ID_SHOWN: Final = 8
_ORIGIN_SHOWN: Final = 80
#: A list of header names.
_NAMES: Final = re.compile(rb"[A-Za-z0-9_-]{1,64}(?:, ?[A-Za-z0-9_-]{1,64}){0,63}")
_USUAL: Final = b"authorization, content-type, x-api-key, x-request-id, anthropic-version"


class Keys:
    """API keys, compared in constant time and kept as hashes only; without any, everybody may.

    ``fronts`` are keys of fronts, which say whose each request is.
    """

    def __init__(self, keys: Sequence[str], fronts: Sequence[str] = ()) -> None:
        #: Those of fronts first.
        self._hashes = [sha256(key.encode()).digest() for key in (*fronts, *keys) if key]
        self._fronts = sum(map(bool, fronts))

    def check(self, headers: Mapping[bytes, bytes]) -> tuple[str, bool]:
        """Who it is, the beginning of the key's hash, and whether the key is a front's.

        Nothing where no key is needed.

        Raises:
            Refusal: no key, or a wrong one.
        """
        if not self._hashes:
            return "", False
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        mine = sha256(key).digest()
        # All are compared, so that the time tells nothing about which one is near.
        equal = [hmac.compare_digest(mine, known) for known in self._hashes]
        if not any(equal):
            raise Refusal("unauthorized")
        return mine.hex()[:_ID_SHOWN], any(equal[: self._fronts])


class Origins:
    """Web pages that may use the server from a browser.

    A page can send requests to a server on its visitor's own machine. Those carry an ``Origin``,
    which other clients do not send; one that was not allowed (such as
    ``https://chat.example.com``, or ``*``) is refused altogether.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._any, self._allowed = "*" in allowed, frozenset(o.rstrip("/") for o in allowed)

    def check(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers for the page.

        Raises:
            Refusal: a page that may not.
        """
        origin = headers.get(b"origin")
        if origin is None:
            return ()
        if not self._any and origin.decode("latin-1") not in self._allowed:
            page = origin.decode("latin-1")[:_ORIGIN_SHOWN]
            raise Refusal("origin", page=page)
        value = b"*" if self._any else origin
        return (
            (b"access-control-allow-origin", value),
            (b"access-control-expose-headers", b"x-request-id, x-turbofit-limited, retry-after"),
            (b"vary", b"Origin"),
        )

    def preflight(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Response headers for a browser's question before the request.

        Raises:
            Refusal: a page that may not.
        """
        allowed = self.check(headers)
        if not allowed:
            raise Refusal("method_not_allowed:options")
        wanted = headers.get(b"access-control-request-headers", b"")
        return (
            *allowed,
            (b"access-control-allow-methods", b"GET, POST"),
            # What the page asks for, since SDKs send headers of their own (x-stainless-os); those
            # that are not known here go no further.
            (b"access-control-allow-headers", wanted if _NAMES.fullmatch(wanted) else _USUAL),
            (b"access-control-max-age", b"600"),
        )


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's own id where it is harmless, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid4().hex

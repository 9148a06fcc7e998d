"""What a request is known by once its body is gone: keyed hashes, from which nothing can be read.

The hashed bytes are those that the engine is given: the model, the parameters, the prompt and the
images. The key stays on this machine, so that nobody else can test guesses of a prompt against a
fingerprint that a log or a file shows.
"""

from __future__ import annotations

from hashlib import blake2b, sha256
from typing import Final

__all__ = ["KEY_BYTES", "Fingerprints"]

KEY_BYTES: Final = 32
_BYTES: Final = 12
_SKETCH_BYTES: Final = 6
#: Bytes at each end of a body that a sketch reads.
_ENDS: Final = 1024


class Fingerprints:
    """Makes fingerprints.

    A body is hashed by SHA-256, which processors have instructions for (1 ms a megabyte here), and
    only the digest by keyed BLAKE2b. A sketch takes microseconds at any size: different sketches
    mean different requests, so that a body is hashed before it is sent only where its sketch is
    one of a suspect's.

    Args:
        key: this installation's secret.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, path: str, body: bytes) -> str:
        """The fingerprint of a request: 24 hexadecimal digits."""
        return self._hashed(path, sha256(body).digest(), _BYTES)

    def sketch(self, path: str, body: bytes) -> str:
        """A hash of the length and of both ends: 12 hexadecimal digits."""
        ends = b"%d:%b%b" % (len(body), body[:_ENDS], body[-_ENDS:])
        return self._hashed(path, ends, _SKETCH_BYTES)

    def _hashed(self, path: str, data: bytes, size: int) -> str:
        return blake2b(path.encode() + b"\n" + data, key=self._key, digest_size=size).hexdigest()

"""Checkpoints on ModelScope: as on the Hugging Face hub, small files and headers, never weights.

The requests are those of the modelscope package: a listing of the repository, which says what is
there, then single files, each by a query that the site answers itself or redirects.
"""

from __future__ import annotations

import os
from http.client import HTTPResponse
from urllib.parse import quote

from turbofit.core.errors import UsageError
from turbofit.model.config import LARGEST_JSON, parse_json
from turbofit.model.hub import HubFiles, HubUnreachableError, NotGivenError

__all__ = ["ModelScopeFiles"]


class ModelScopeFiles(HubFiles):
    """The files of one ModelScope repository at one branch or tag."""

    home = "https://modelscope.cn"
    branch = "master"
    endpoint_key = "MODELSCOPE_ENDPOINT"
    token_key = "MODELSCOPE_API_TOKEN"

    def __init__(self, hub_id: str, revision: str | None = None) -> None:
        super().__init__(hub_id, revision)
        self._listed: frozenset[str] | None = None

    def _address(self) -> str:
        domain = os.environ.get("MODELSCOPE_DOMAIN", "").strip()
        if domain and "://" not in domain:
            domain = f"https://{domain}"
        return os.environ.get(self.endpoint_key) or domain or self.home

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
        # The site's answer for a file that is not there varies; its listing does not.
        return super()._get(name, headers) if name in self._names() else None

    def _names(self) -> frozenset[str]:
        """The files at the top of the repository.

        Raises:
            HubUnreachableError: no such repository or revision.
        """
        if self._listed is None:
            self._listed = self._list()
        return self._listed

    def _list(self) -> frozenset[str]:
        query = f"Revision={quote(self.revision, safe='')}&Recursive=False"
        answer = self._open(f"{self._models}/repo/files?{query}", {})
        if answer is None:
            raise self._nothing()
        with answer:
            data = self._body(answer, LARGEST_JSON)
        try:
            listing = parse_json(data, f"the listing of {self.hub_id}")
        except UsageError as exc:
            raise HubUnreachableError(
                f"{self.host} gives no listing of {self.hub_id}: {exc.message}",
                hint=f"check {self.endpoint_key}, or download the checkpoint first",
            ) from None
        content = listing.section("Data")
        files = content.values.get("Files") if content else None
        if listing.values.get("Success") is False or not isinstance(files, list):
            raise self._nothing()
        paths = (file.get("Path") for file in files if isinstance(file, dict))
        return frozenset(path for path in paths if isinstance(path, str))

    def _nothing(self) -> NotGivenError:
        return NotGivenError(
            f"{self.host} has no model {self.hub_id} at {self.revision}",
            hint="look its id up there: some models have another owner than on the Hugging Face "
            "hub, which is asked where LMDEPLOY_USE_MODELSCOPE is unset",
        )

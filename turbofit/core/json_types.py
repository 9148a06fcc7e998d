"""What an object of JSON is called in signatures: by whose it is."""

from __future__ import annotations

from typing import Any, TypeAlias

#: Somebody else's: a request of OpenAI's API, a checkpoint's config, Ray's answer. Nothing is known
#: of it before it was looked at.
JsonObject: TypeAlias = dict[str, Any]
#: Options by their names, as people, profiles and engines write them; `PlanRequest` checks values.
Options: TypeAlias = dict[str, Any]
#: One of turbofit's documents that has no struct yet: of a rehearsal, a calibration, a pretend run.
Document: TypeAlias = dict[str, Any]

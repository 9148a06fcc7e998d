"""Names of JSON objects in signatures; a name says who defines the object."""

from __future__ import annotations

from typing import Any, TypeAlias

#: Defined by others: a request of OpenAI's API, a checkpoint's config, Ray's answer. The code must
#: check every field.
JsonObject: TypeAlias = dict[str, Any]
#: Options by their names, as people, profiles and engines write them; `PlanRequest` checks values.
Options: TypeAlias = dict[str, Any]
#: One of turbofit's documents that has no struct yet: of a rehearsal, a calibration, a pretend run.
Document: TypeAlias = dict[str, Any]

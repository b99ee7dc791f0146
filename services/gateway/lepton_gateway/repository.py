"""The model repository extension: loading and unloading, which is rollout's to do, and what the workers say."""

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import httpx
import orjson
from lepton_common.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    Invalid,
    LeptonError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from lepton_common.http11 import Request
from lepton_common.records import LoadState
from lepton_common.signature import Signature

from lepton_gateway.domain import json_object, summed
from lepton_gateway.flights import Lookups
from lepton_gateway.routes import Route, Routes

# Loading may take as long as rollout waits for it; a worker's statistics come from its memory.
_LOAD_TIMEOUT_S = 600.0
_ASK_TIMEOUT_S = 2.0

_KINDS: dict[int, type[LeptonError]] = {
    400: Invalid,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    503: Unavailable,
    504: DeadlineExceeded,
}


class Repository:
    """Asks rollout and the workers. `http` is closed by whoever made it."""

    def __init__(self, http: httpx.AsyncClient, rollout_url: str, routes: Routes) -> None:
        self._http = http
        self._rollout_url = rollout_url.rstrip("/")
        self._routes = routes

    async def change(self, request: Request, model: str, verb: str) -> None:
        """`verb` is load or unload. Raises what rollout says against it."""
        version = _version_of(request)
        names = (b"authorization", b"x-api-key")
        headers = {name: request.headers[name] for name in names if name in request.headers}
        try:
            response = await self._http.post(
                f"{self._rollout_url}/v1/serving/{model}/{verb}",
                json={"version": version},
                headers=headers,
                timeout=_LOAD_TIMEOUT_S,
            )
        except httpx.TransportError as error:
            raise Unavailable("the rollout service does not answer", retry_after_s=1) from error
        if response.status_code != 200:
            raise _KINDS.get(response.status_code, Unavailable)(_detail_of(response))

    async def statistics(self, routes: Sequence[Route], version: int | None) -> dict[str, Any]:
        """`model_stats` of the models, or of one version, summed over the workers that answer. What a cache answered is
        that of this gateway."""
        asked = [
            self._statistics_of(worker.address, route, loaded.version)
            for route in routes
            for worker in self._routes.workers()
            for loaded in worker.versions
            if (loaded.tenant, loaded.model) == (route.serving.tenant, route.serving.model)
            and loaded.state is LoadState.READY
            and version in (None, loaded.version)
        ]
        found = summed(entry for entries in await asyncio.gather(*asked) for entry in entries)
        lookups = {
            (route.serving.model, str(version)): each
            for route in routes
            for version, each in route.cache_counts.by_version.items()
        }
        for entry in found:
            if each := lookups.get((entry["name"], entry["version"])):
                _add_lookups(entry["inference_stats"], each)
        return {"model_stats": found}

    async def signature(self, route: Route, version: int) -> Signature:
        """What that version takes and gives. Raises Unavailable when no worker has it ready."""
        for address in self._ready(route, version):
            document = await self._told(address, route, version, "")
            if document is not None:
                return Signature.from_dict(document)
        name = route.serving.model
        raise Unavailable(f"version {version} of model {name!r} is ready on no worker", retry_after_s=1)

    def _ready(self, route: Route, version: int) -> list[str]:
        """Where the workers are that have the version ready."""
        return [
            worker.address
            for worker in self._routes.workers()
            for loaded in worker.versions
            if (loaded.tenant, loaded.model, loaded.version) == (route.serving.tenant, route.serving.model, version)
            and loaded.state is LoadState.READY
        ]

    async def _statistics_of(self, address: str, route: Route, version: int) -> list[dict[str, Any]]:
        document = await self._told(address, route, version, "/stats")
        entries: list[dict[str, Any]] = [] if document is None else document["model_stats"]
        return entries

    async def _told(self, address: str, route: Route, version: int, verb: str) -> dict[str, Any] | None:
        """What a worker says of the version; None of one that just died or left: its lease runs out in seconds."""
        ref = route.serving.ref
        try:
            response = await self._http.get(
                f"http://{address}/v2/models/{ref.model}/versions/{version}{verb}",
                headers={"host": ref.host},
                timeout=_ASK_TIMEOUT_S,
            )
        except httpx.TransportError:
            return None
        if response.status_code != 200:
            return None
        document: dict[str, Any] = orjson.loads(response.content)
        return document


def ready_only(request: Request) -> bool:
    """Whether the repository index was asked for what is ready. Raises Invalid."""
    ready = json_object(request.body).get("ready", False)
    if not isinstance(ready, bool):
        raise Invalid("ready must be true or false")
    return ready


def _add_lookups(told: dict[str, Any], lookups: Lookups) -> None:
    """Triton counts what a cache answered as a success, too."""
    told["cache_hit"] = {"count": lookups.hits, "ns": lookups.hit_ns}
    told["cache_miss"] = {"count": lookups.misses, "ns": lookups.miss_ns}
    success = told["success"]
    told["success"] = {"count": success["count"] + lookups.hits, "ns": success["ns"] + lookups.hit_ns}


def _version_of(request: Request) -> int | None:
    """The version to load or unload: from the query (`?version=2`) or `parameters.version`; None is the model."""
    parameters = json_object(request.body).get("parameters") or {}
    if not isinstance(parameters, dict):
        raise Invalid("parameters must be an object")
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise Invalid(f"parameters.{name[:80]} is not supported: push a new version instead")
    asked = parse_qs(request.query).get("version", [parameters.get("version")])[-1]
    if asked is None:
        return None
    text = str(asked)
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and 0 < int(text) < 2**31):
        raise Invalid("version must be a positive integer")
    return int(text)


def _detail_of(response: httpx.Response) -> str:
    """The message of rollout's problem document."""
    try:
        detail = orjson.loads(response.content)["detail"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        detail = None
    return detail if isinstance(detail, str) else f"the rollout service answered with status {response.status_code}"

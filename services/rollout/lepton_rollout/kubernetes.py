"""Kubernetes' API, as far as Istio's objects need it: get, server-side apply, annotate, and a watch that resumes."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from lepton_common.errors import Conflict, Invalid, Unavailable

from lepton_rollout.istio import API_VERSION

MANAGER = "lepton-rollout"
_PLURALS = {"VirtualService": "virtualservices", "DestinationRule": "destinationrules"}
# The server ends a watch after this time, so that a connection that died unnoticed is not waited on for ever.
_WATCH_S = 60
_AGAIN_S = 0.1


class _Gone(Exception):
    """The server has forgotten what happened since that revision: list again."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the API is and who asks: files are those of a pod's service account. Without a token nobody does."""

    url: str
    namespace: str
    token: Path | None = None
    ca: Path | None = None


class Kubernetes:
    """A client of one namespace. All calls raise Unavailable when the server is away, too busy, or forbids them."""

    def __init__(self, cluster: Cluster, *, timeout_s: float = 10.0) -> None:
        self._base = f"/apis/{API_VERSION}/namespaces/{cluster.namespace}"
        self._token = cluster.token
        verify = ssl.create_default_context(cafile=str(cluster.ca)) if cluster.ca else True
        self._client = httpx.AsyncClient(base_url=cluster.url, timeout=timeout_s, verify=verify, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, kind: str, name: str) -> dict[str, Any] | None:
        answer = await self._ask("GET", kind, name)
        return None if answer.status_code == 404 else _read(answer)

    async def apply(self, document: Mapping[str, Any], *, revision: str | None, force: bool) -> dict[str, Any]:
        """The object has these fields, and none that were sent before and are not now; other managers' are left alone.

        Only over the object as it was at `revision`; None: it is not there yet. With `force` also over fields that
        others set. Raises Conflict, naming them, and Invalid when the server refuses the object.
        """
        metadata = {**document["metadata"], **({"resourceVersion": revision} if revision else {})}
        parameters = {"fieldManager": MANAGER, "force": str(force).lower(), "fieldValidation": "Strict"}
        answer = await self._ask(
            "PATCH",
            document["kind"],
            metadata["name"],
            params=parameters,
            headers={"content-type": "application/apply-patch+yaml"},
            content=json.dumps({**document, "metadata": metadata}),
        )
        return _read(answer)

    async def annotate(self, kind: str, name: str, revision: str, **annotations: str) -> None:
        """The object as it was at `revision` has these annotations besides its own. Raises Conflict when it changed.

        By another manager's name than `apply`, which would take them away again.
        """
        metadata = {"resourceVersion": revision, "annotations": annotations}
        answer = await self._ask(
            "PATCH",
            kind,
            name,
            params={"fieldManager": f"{MANAGER}-notes"},
            headers={"content-type": "application/merge-patch+json"},
            content=json.dumps({"metadata": metadata}),
        )
        _read(answer)

    async def follow(self, kind: str, selector: str) -> AsyncIterator[dict[str, Any]]:
        """For ever: every object with these labels as it is, then each that is made or changed, as it became."""
        revision = ""
        while True:
            if not revision:
                listed = _read(await self._ask("GET", kind, params={"labelSelector": selector}))
                for each in listed["items"]:
                    yield {"apiVersion": API_VERSION, "kind": kind, **each}
                revision = listed["metadata"]["resourceVersion"]
            try:
                async for event in self._watch(kind, selector, revision):
                    revision = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] in ("ADDED", "MODIFIED"):
                        yield event["object"]
            except _Gone:
                revision = ""
            await asyncio.sleep(_AGAIN_S)

    async def _watch(self, kind: str, selector: str, revision: str) -> AsyncIterator[dict[str, Any]]:
        """What happened since the revision, until the server ends it. Raises Gone, and Unavailable."""
        parameters = {
            "watch": "true",
            "labelSelector": selector,
            "resourceVersion": revision,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_S),
        }
        timeout = httpx.Timeout(10.0, read=_WATCH_S + 10.0)
        request = self._client.build_request(
            "GET", self._path(kind), params=parameters, headers=self._authorization(), timeout=timeout
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise Unavailable("Kubernetes' API does not answer", retry_after_s=1) from error
        try:
            if answer.status_code != 200:
                await answer.aread()
                _read(answer)
            async for line in answer.aiter_lines():
                yield _event(line)
        except (httpx.HTTPError, ValueError):
            return  # Cut off, perhaps within a line: the next watch goes on from the last whole event.
        finally:
            await answer.aclose()

    async def _ask(self, method: str, kind: str, name: str = "", **request: Any) -> httpx.Response:
        headers = self._authorization() | request.pop("headers", {})
        try:
            return await self._client.request(method, self._path(kind, name), headers=headers, **request)
        except httpx.HTTPError as error:
            raise Unavailable("Kubernetes' API does not answer", retry_after_s=1) from error

    def _path(self, kind: str, name: str = "") -> str:
        return f"{self._base}/{_PLURALS[kind]}" + (f"/{name}" if name else "")

    def _authorization(self) -> dict[str, str]:
        """Read each time: the kubelet replaces the token long before it expires."""
        if self._token is None:
            return {}
        try:
            return {"authorization": f"Bearer {self._token.read_text().strip()}"}
        except OSError as error:
            raise Unavailable("the service account's token cannot be read") from error


def _event(line: str) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(line)
    if event["type"] == "ERROR":
        if event["object"].get("code") == 410:
            raise _Gone
        raise Unavailable(f"Kubernetes' API ended a watch: {event['object'].get('message', '')}", retry_after_s=1)
    return event


def _read(answer: httpx.Response) -> dict[str, Any]:
    """The object that was answered, or the error as Lepton tells it."""
    if answer.is_success:
        found: dict[str, Any] = answer.json()
        return found
    if answer.status_code == 410:
        raise _Gone
    status = _status(answer)
    message = str(status.get("message", ""))[:500]
    if answer.status_code == 409:
        raise Conflict(_conflict(status) or f"somebody else changed the object in Kubernetes meanwhile: {message}")
    if answer.status_code in (400, 422):
        raise Invalid(f"Kubernetes refused the object: {message}")
    raise Unavailable(f"Kubernetes' API answers {answer.status_code}: {message}", retry_after_s=1)


def _status(answer: httpx.Response) -> dict[str, Any]:
    try:
        status = answer.json()
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}


def _conflict(status: Mapping[str, Any]) -> str:
    """Who set which fields that were to be changed; nothing when it was no conflict of managers."""
    causes = (status.get("details") or {}).get("causes") or []
    told = [
        f"{cause['field'].lstrip('.')} ({cause['message']})"
        for cause in causes
        if cause.get("reason") == "FieldManagerConflict"
    ]
    return f"somebody else set these fields in Kubernetes: {'; '.join(told)}" if told else ""

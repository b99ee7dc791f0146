"""A stand-in for Kubernetes' API server with Istio's two kinds: get, list, watch, server-side apply, and kubectl edit.

It keeps who set which field as the real one does: maps are merged, lists are one value, as in Istio's own schema.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from cloudcoil.models.istio.networking import v1
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from lepton_common.app_server import AppServer

Path = tuple[str, ...]
Owner = tuple[str, str]  # manager, operation

NAMESPACE = "lepton"
_KINDS = {"virtualservices": "VirtualService", "destinationrules": "DestinationRule"}
_MODELS = {"VirtualService": v1.VirtualService, "DestinationRule": v1.DestinationRule}


class Refused(Exception):
    """An answer that is a Status: an error."""

    def __init__(self, code: int, reason: str, message: str, causes: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.code = code
        details = {"causes": causes} if causes else {}
        self.status = {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}


@dataclass
class Stored:
    """An object, and who set which of its fields when."""

    document: dict[str, Any]
    owners: dict[Owner, set[Path]] = field(default_factory=dict)
    times: dict[Owner, datetime] = field(default_factory=dict)


class ApiServer:
    """The server. `token` is what it lets in; `writes` are the answers' statuses of all writes so far."""

    def __init__(self) -> None:
        self.token = "first-token"
        self.writes: list[int] = []
        self.refuses = ""  # what an admission webhook says to every write
        self._objects: dict[tuple[str, str], Stored] = {}
        self._revision = 100
        self._forgotten = 0  # events up to this revision are not known any more
        self._history: list[tuple[int, str, str, dict[str, Any]]] = []
        self._happened = asyncio.Event()
        self._watching = 0
        self._cuts = 0
        self._is_closing = False
        self._time = datetime(2026, 11, 27, tzinfo=UTC)

    async def __aenter__(self) -> Self:
        self._server = AppServer(self._app())
        await self._server.start("127.0.0.1", 0)
        host, port = self._server.address
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._is_closing = True
        self._tell()
        await self._server.drain(5)

    # --- what tests see and do ------------------------------------------------------------------------------------

    def document(self, kind: str, name: str) -> dict[str, Any]:
        return self._shown(self._objects[kind, name])

    def edit(self, kind: str, name: str, manager: str, **changes: Any) -> dict[str, Any]:
        """`kubectl edit`: these parts of the spec are replaced, or removed with None."""
        stored = self._objects[kind, name]
        after = deepcopy(stored.document)
        for part, value in changes.items():
            after["spec"].pop(part, None)
            if value is not None:
                after["spec"][part] = value
        self._update(stored, after, manager)
        return self._shown(stored)

    def apply(self, document: dict[str, Any], manager: str, *, force: bool = False) -> dict[str, Any]:
        """`kubectl apply --server-side`."""
        return self._apply(document["kind"], document["metadata"]["name"], document, manager, force)

    def delete(self, kind: str, name: str) -> None:
        del self._objects[kind, name]

    def forget(self) -> None:
        """What happened so far cannot be watched any more: as after a compaction."""
        self._forgotten = self._revision
        self._history.clear()

    def cut(self) -> None:
        """Every watch is cut off in the middle."""
        self._cuts += 1
        self._tell()

    @property
    def watches(self) -> int:
        return self._watching

    # --- HTTP -----------------------------------------------------------------------------------------------------

    def _app(self) -> FastAPI:
        app = FastAPI()
        base = f"/apis/networking.istio.io/v1/namespaces/{NAMESPACE}/{{plural}}"

        @app.exception_handler(Refused)
        async def refused(request: Request, error: Refused) -> JSONResponse:
            if request.method == "PATCH":
                self.writes.append(error.code)
            return JSONResponse(error.status, error.code)

        @app.get(base)
        async def list_or_watch(plural: str, request: Request) -> Any:
            self._authorize(request)
            kind, query = _KINDS[plural], request.query_params
            if query.get("watch") != "true":
                found = [
                    self._shown(each) for (each_kind, _), each in sorted(self._objects.items()) if each_kind == kind
                ]
                items = [{k: v for k, v in each.items() if k not in ("kind", "apiVersion")} for each in found]
                selected = [each for each in items if _selected(each, query.get("labelSelector", ""))]
                return {"kind": f"{kind}List", "metadata": {"resourceVersion": str(self._revision)}, "items": selected}
            since = int(query["resourceVersion"])
            if since < self._forgotten:
                raise Refused(410, "Expired", "too old resource version")
            events = self._events(kind, query.get("labelSelector", ""), since)
            return StreamingResponse(events, media_type="application/json")

        @app.get(base + "/{name}")
        async def get(plural: str, name: str, request: Request) -> Any:
            self._authorize(request)
            return self._shown(self._found(_KINDS[plural], name))

        @app.patch(base + "/{name}")
        async def patch(plural: str, name: str, request: Request) -> Any:
            self._authorize(request)
            if self.refuses:
                raise Refused(400, "BadRequest", self.refuses)
            document, query = json.loads(await request.body()), request.query_params
            kind, manager = _KINDS[plural], query["fieldManager"]
            if request.headers["content-type"] == "application/apply-patch+yaml":
                shown = self._apply(kind, name, document, manager, query.get("force") == "true")
            else:
                shown = self._merge(kind, name, document, manager)
            self.writes.append(200)
            return shown

        return app

    def _authorize(self, request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(401, "Unauthorized", "Unauthorized")

    async def _events(self, kind: str, selector: str, since: int) -> AsyncIterator[str]:
        self._watching += 1
        cuts = self._cuts
        try:
            bookmark = {"kind": kind, "metadata": {"resourceVersion": str(since)}}
            yield json.dumps({"type": "BOOKMARK", "object": bookmark}) + "\n"
            while not self._is_closing:
                happened = self._happened
                if cuts < self._cuts:
                    yield '{"type": "MODIF'
                    raise ConnectionAbortedError("the test cuts this watch off")
                if since < self._forgotten:
                    gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                    yield json.dumps({"type": "ERROR", "object": gone}) + "\n"
                    return
                for revision, event, of_kind, shown in tuple(self._history):
                    if revision > since and of_kind == kind:
                        if _selected(shown, selector):
                            yield json.dumps({"type": event, "object": shown}) + "\n"
                        since = revision
                await happened.wait()
        finally:
            self._watching -= 1

    def _tell(self) -> None:
        self._happened.set()
        self._happened = asyncio.Event()

    # --- objects --------------------------------------------------------------------------------------------------

    def _found(self, kind: str, name: str) -> Stored:
        if (kind, name) not in self._objects:
            raise Refused(404, "NotFound", f"{kind} {name} not found")
        return self._objects[kind, name]

    def _apply(self, kind: str, name: str, document: dict[str, Any], manager: str, force: bool) -> dict[str, Any]:
        assert_known(kind, document)
        known = self._objects.get((kind, name))
        self._check_revision(document, known)
        stored = known or Stored({"apiVersion": document["apiVersion"], "kind": kind, "metadata": {"name": name}})
        owner, sent = (manager, "Apply"), dict(_leaves(document))
        others = {each: paths for each, paths in stored.owners.items() if each != owner}
        conflicts = [
            (path, other)
            for path, value in sent.items()
            for other, paths in others.items()
            if path in paths and _at(stored.document, path) != value
        ]
        if conflicts and not force:
            causes = [
                {
                    "reason": "FieldManagerConflict",
                    "message": f'conflict with "{other}" using networking.istio.io/v1',
                    "field": "." + ".".join(path),
                }
                for path, (other, _) in conflicts
            ]
            told = "\n".join(f"- {each['message']}: {each['field']}" for each in causes)
            raise Refused(409, "Conflict", f"Apply failed with {len(causes)} conflict(s): {told}", causes)
        after = deepcopy(stored.document)
        for path, other in conflicts:
            stored.owners[other].discard(path)
        for path in stored.owners.get(owner, set()) - set(sent):
            if not any(path in paths for each, paths in stored.owners.items() if each != owner):
                _remove(after, path)
        for path, value in sent.items():
            _set(after, path, value)
        stored.owners[owner] = set(sent)
        self._objects[kind, name] = stored
        return self._store(stored, after, owner)

    def _merge(self, kind: str, name: str, patch: dict[str, Any], manager: str) -> dict[str, Any]:
        stored = self._found(kind, name)
        self._check_revision(patch, stored)
        after = deepcopy(stored.document)
        for path, value in _leaves(patch):
            _set(after, path, value)
        self._update(stored, after, manager)
        return self._shown(stored)

    def _update(self, stored: Stored, after: dict[str, Any], manager: str) -> None:
        """Not an apply: what changes is the manager's alone from now on."""
        before, now = dict(_leaves(stored.document)), dict(_leaves(after))
        changed = {path for path in before.keys() | now.keys() if before.get(path) != now.get(path)}
        for paths in stored.owners.values():
            paths -= changed
        owner = (manager, "Update")
        stored.owners.setdefault(owner, set()).update(changed & now.keys())
        self._store(stored, after, owner)

    def _check_revision(self, document: Mapping[str, Any], stored: Stored | None) -> None:
        wanted = document["metadata"].get("resourceVersion")
        if wanted and (stored is None or stored.document["metadata"]["resourceVersion"] != wanted):
            raise Refused(
                409, "Conflict", "the object has been modified; please apply your changes to the latest version"
            )

    def _store(self, stored: Stored, after: dict[str, Any], owner: Owner) -> dict[str, Any]:
        is_new = "resourceVersion" not in stored.document["metadata"]
        if is_new or after != stored.document:
            self._revision += 1
            self._time += timedelta(seconds=1)
            after["metadata"]["resourceVersion"] = str(self._revision)
            after["metadata"]["namespace"] = NAMESPACE
            stored.times[owner] = self._time
        stored.document = after
        shown = self._shown(stored)
        self._history.append((self._revision, "ADDED" if is_new else "MODIFIED", after["kind"], shown))
        self._tell()
        return shown

    def _shown(self, stored: Stored) -> dict[str, Any]:
        document = deepcopy(stored.document)
        document["metadata"]["managedFields"] = [
            {
                "manager": manager,
                "operation": operation,
                "time": stored.times[manager, operation].isoformat().replace("+00:00", "Z"),
                "fieldsType": "FieldsV1",
                "fieldsV1": _fields(paths),
            }
            for (manager, operation), paths in sorted(stored.owners.items())
            if paths
        ]
        return document


def assert_known(kind: str, document: dict[str, Any]) -> None:
    """As fieldValidation=Strict: the outside schema of the kind takes every field of the document as it is.

    The schema's models pass fields by that they do not know, so what they make of the spec is compared with it. They
    are of Istio 1.24, which has no `backoff` of retries yet: Lepton sends it only when a person's own routes have it.
    """
    document = deepcopy(document)
    for route in document["spec"].get("http", []):
        route.get("retries", {}).pop("backoff", None)
    try:
        model = _MODELS[kind].model_validate(document)
    except ValueError as error:
        raise Refused(422, "Invalid", str(error)) from error
    read = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if read["spec"] != document["spec"]:
        raise Refused(400, "BadRequest", "strict decoding error: unknown fields in the spec")


def _leaves(document: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every field that can have an owner. A list is one value, and so is a map with nothing in it."""
    metadata = {name: document["metadata"].get(name, {}) for name in ("labels", "annotations")}
    yield from _flat((), {"metadata": metadata, "spec": document.get("spec", {})})


def _flat(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _flat((*path, name), each)
    else:
        yield path, value


def _at(document: Any, path: Path) -> Any:
    for name in path:
        document = document.get(name, {})
    return document


def _set(document: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        document = document.setdefault(name, {})
    document[path[-1]] = deepcopy(value)


def _remove(document: dict[str, Any], path: Path) -> None:
    for name in path[:-1]:
        document = document.get(name, {})
    document.pop(path[-1], None)


def _fields(paths: set[Path]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for path in sorted(paths):
        at = fields
        for name in path:
            at = at.setdefault(f"f:{name}", {})
    return fields


def _selected(document: Mapping[str, Any], selector: str) -> bool:
    labels = document["metadata"].get("labels", {})
    wanted = (each.partition("=") for each in selector.split(",") if each)
    return all(labels.get(name) == value for name, _, value in wanted)

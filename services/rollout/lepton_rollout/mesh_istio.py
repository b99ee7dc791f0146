"""The mesh as Istio in Kubernetes: a VirtualService and a DestinationRule a model, and an eye on who else changes them.

Both are written by server-side apply, so fields that others set stay theirs. What Lepton wrote last, and which edits of
others it knows of, stands in annotations of the VirtualService: its state is in the cluster alone. Istio says nowhere
when its proxies follow, so what is acknowledged here is the object; that the split took effect, measured traffic shows.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from lepton_common.errors import Conflict, LeptonError, NotFound, Unavailable
from lepton_common.records import Serving, WorkerState
from lepton_common.types import ModelRef

from lepton_rollout.istio import GENERATION, MANAGED_BY, documents, object_name
from lepton_rollout.kubernetes import MANAGER, Kubernetes
from lepton_rollout.mesh import Edit, Stale, VirtualService

_ROUTES, _RULE = "VirtualService", "DestinationRule"
# Digests of the routes that Lepton wrote last, and of others' that are on record.
_APPLIED, _NOTED = "lepton.ai/applied", "lepton.ai/noted"
# Of the VirtualService's spec these are Lepton's; the others say who may see it, and are left to whoever sets them.
_OWN = ("hosts", "http")
_LEFT_TO_OTHERS = ("gateways", "exportTo")
_TRIES = 3


class _Moved(Exception):
    """The object changed between reading and writing."""


class IstioMesh:
    """The Mesh of the namespace that the client is for."""

    def __init__(self, kubernetes: Kubernetes) -> None:
        self._kubernetes = kubernetes

    async def close(self) -> None:
        await self._kubernetes.close()

    async def apply(self, *services: VirtualService) -> None:
        newer: dict[str, int] = {}
        errors: list[LeptonError] = []
        for service in services:
            try:
                await self._apply(service)
            except Stale as stale:
                newer |= stale.newer
            except Unavailable:
                raise  # It would not answer for the others either.
            except LeptonError as error:
                errors.append(error)
        if newer:
            raise Stale(newer)
        if errors:
            raise errors[0]

    async def place(self, workers: Iterable[WorkerState]) -> None:
        """Nothing to do: in Kubernetes the Services know their pods."""

    async def live(self, serving: Serving) -> tuple[dict[str, Any], dict[str, Any]]:
        """As Kubernetes has them, without the note of who set which field."""
        routes = await self._kubernetes.get(_ROUTES, object_name(serving.ref))
        rule = await self._kubernetes.get(_RULE, object_name(serving.ref))
        if routes is None or rule is None:
            raise NotFound(f"the mesh has no routes of model {serving.model!r}")
        for each in (routes, rule):
            each["metadata"].pop("managedFields", None)
        return routes, rule

    async def edits(self) -> AsyncIterator[Edit]:
        told: dict[str, str] = {}
        async for found in self._kubernetes.follow(_ROUTES, f"{MANAGED_BY}={MANAGER}"):
            name, digest = found["metadata"]["name"], _digest(found)
            if digest in (_annotation(found, _APPLIED), _annotation(found, _NOTED)):
                told.pop(name, None)
            elif told.get(name) != digest:
                told[name] = digest
                yield _edit(found)

    async def note(self, edit: Edit) -> None:
        name = edit.document["metadata"]["name"]
        try:
            await self._kubernetes.annotate(_ROUTES, name, edit.revision, **{_NOTED: _digest(edit.document)})
        except Conflict as error:
            found = await self._kubernetes.get(_ROUTES, name)
            if found is None or _digest(found) != _digest(edit.document):
                raise Conflict(f"the routes of {edit.model} were changed in Kubernetes once more") from error
            # Only something around the routes changed since.
            await self._kubernetes.annotate(_ROUTES, name, _revision(found), **{_NOTED: _digest(found)})

    async def _apply(self, service: VirtualService) -> None:
        for _ in range(_TRIES):
            try:
                return await self._write(service)
            except _Moved:
                continue
        raise Unavailable(f"others keep changing the routes of {service.name} in Kubernetes", retry_after_s=1)

    async def _write(self, service: VirtualService) -> None:
        routes, rule = documents(service)
        before = await self._kubernetes.get(_ROUTES, routes["metadata"]["name"])
        if before and (generation := int(_annotation(before, GENERATION) or 0)) > service.generation:
            raise Stale({service.name: generation})
        routes["metadata"]["annotations"][_APPLIED] = _digest(routes)
        # A version that requests may still be on their way to keeps its subset: it goes with the next call.
        rule_before = await self._kubernetes.get(_RULE, rule["metadata"]["name"])
        await self._put(_joined(rule, rule_before, before), rule_before, force=False)
        await self._put(routes, before, force=before is not None and _annotation(before, _NOTED) == _digest(before))

    async def _put(self, document: dict[str, Any], before: dict[str, Any] | None, *, force: bool) -> None:
        """The object says so. Raises Conflict when others set a field otherwise, Moved when it changed meanwhile."""
        if before and _says(before, document):
            return
        revision = _revision(before) if before else None
        name = document["metadata"]["name"]
        try:
            await self._kubernetes.apply(document, revision=revision, force=force)
        except Conflict:
            now = await self._kubernetes.get(document["kind"], name)
            if (_revision(now) if now else None) != revision:
                raise _Moved from None
            raise


def _joined(
    rule: dict[str, Any], rule_before: Mapping[str, Any] | None, routes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The rule with a subset also for each version that the routes led to so far."""
    named = {each["name"] for each in rule["spec"]["subsets"]}
    used = _subsets(routes["spec"]) - named if routes else set()
    known = rule_before["spec"].get("subsets", []) if rule_before else []
    kept = [each for each in known if each["name"] in used]
    return {**rule, "spec": {**rule["spec"], "subsets": [*rule["spec"]["subsets"], *kept]}}


def _subsets(spec: Any) -> set[str]:
    """Every subset that is named anywhere in the routes, whoever wrote them."""
    match spec:
        case {"subset": str(name)}:
            return {name}
        case dict():
            return {name for each in spec.values() for name in _subsets(each)}
        case list():
            return {name for each in spec for name in _subsets(each)}
        case _:
            return set()


def _says(found: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """Whether the object has all fields of the document, with its values."""
    return all(
        _says(found[name], value)
        if isinstance(value, dict) and isinstance(found.get(name), dict)
        else found.get(name) == value
        for name, value in document.items()
    )


def _digest(document: Mapping[str, Any]) -> str:
    """What the routes say. A whole number is the same with and without a fraction of zero."""
    own = {name: document.get("spec", {}).get(name) for name in _OWN}
    text = json.dumps(_plain(own), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def _edit(found: dict[str, Any]) -> Edit:
    """The object as somebody's edit, without the fields of its spec that Lepton leaves to others, or who set which."""
    metadata = {name: value for name, value in found["metadata"].items() if name != "managedFields"}
    spec = {name: value for name, value in found["spec"].items() if name not in _LEFT_TO_OTHERS}
    model, _, tenant = found["metadata"]["name"].partition(".")
    return Edit(
        ModelRef(tenant, model), _editor(found), {**found, "metadata": metadata, "spec": spec}, _revision(found)
    )


def _editor(found: Mapping[str, Any]) -> str:
    """Who set the routes last; who wrote to the object last, when nobody says to own them, as after a removal."""
    others = [each for each in found["metadata"].get("managedFields", []) if not each["manager"].startswith(MANAGER)]
    owners = [each for each in others if any(f"f:{name}" in each["fieldsV1"].get("f:spec", {}) for name in _OWN)]
    latest = max(owners or others, key=lambda each: str(each.get("time", "")), default={"manager": "unknown"})
    return str(latest["manager"])


def _annotation(found: Mapping[str, Any], name: str) -> str:
    return str(found["metadata"].get("annotations", {}).get(name, ""))


def _revision(found: Mapping[str, Any]) -> str:
    return str(found["metadata"]["resourceVersion"])

"""The rules of a worker: what it should hold, which version a request means, and which models may be batched."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from urllib.parse import unquote

from lepton_common.errors import LeptonError, NotFound, Unavailable
from lepton_common.records import Assigned, Serving
from lepton_common.signature import Signature
from lepton_common.types import ModelRef, VersionRef

MESH_SUFFIX = ".models.lepton"


class ModelFailed(LeptonError):
    """The model raised while it ran on an input that fits its signature."""


class NotLoaded(Unavailable):
    """This worker does not hold the version now; another one of the pool may."""


class Verb(StrEnum):
    METADATA = ""
    INFER = "infer"
    READY = "ready"
    CONFIG = "config"
    STATS = "stats"


@dataclass(frozen=True, slots=True)
class Target:
    """What a `/v2/models/…` request is about; `version` is None when the path names none."""

    ref: ModelRef
    version: int | None
    verb: Verb


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the first load of an artifact found out about it.

    `batchable` is measured: rows of a batch come out as they do alone. `reason` says why not. `free_size` is the size
    that example inputs give to unknown dimensions; None when no example input could be run.
    """

    batchable: bool
    reason: str = ""
    free_size: int | None = None


def wanted(records: Iterable[Serving], pool: str) -> dict[VersionRef, Assigned]:
    """Every version that the workers of `pool` must hold."""
    return {
        VersionRef(record.ref, assigned.version): assigned
        for record in records
        for assigned in record.versions
        if assigned.pool == pool
    }


@lru_cache(maxsize=4096)
def target_of(host: bytes, target: bytes) -> Target:
    """The target of a request by its Host header and request target. Raises NotFound for any other path.

    The mesh's host name `{model}.{tenant}.models.lepton` names the tenant; under any other host it is `default`.
    """
    path = target.partition(b"?")[0].decode("ascii", "replace")
    prefix, _, rest = path.partition("/v2/models/")
    match [unquote(part) for part in rest.split("/")] if not prefix else []:
        case [model]:
            version, verb = None, ""
        case [model, "versions", version]:
            verb = ""
        case [model, ("infer" | "ready" | "config" | "stats") as verb]:
            version = None
        case [model, "versions", version, ("infer" | "ready" | "config" | "stats") as verb]:
            pass
        case _:
            raise NotFound("Not Found")
    return Target(ModelRef(_tenant(host), model), None if version is None else _number(model, version), Verb(verb))


def _tenant(host: bytes) -> str:
    name = host.partition(b":")[0].decode("ascii", "replace").lower()
    labels = name.removesuffix(MESH_SUFFIX).split(".")
    return labels[1] if name.endswith(MESH_SUFFIX) and len(labels) == 2 else "default"


def _number(model: str, version: str) -> int:
    if version.isascii() and version.isdigit() and len(version) < 10:
        return int(version)
    raise NotFound(f"model {model[:80]!r} has no version {version[:20]!r}: versions are numbers")


def unbatchable(signature: Signature) -> str | None:
    """Why requests of this signature can never be merged along their first dimension; None when they may be."""
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != -1:
                return f"{kind} {spec.name!r} has no free first dimension"
    return None

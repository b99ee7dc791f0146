"""Frozen values that more than one service uses."""

import re
from dataclasses import dataclass

from lepton_common.errors import Invalid

# A model's name becomes a host name in the mesh and a Service in Kubernetes, so it is one DNS label.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def checked_name(kind: str, name: str) -> str:
    """`name` itself. Raises Invalid, naming `kind` ("model", "tenant"), when it is not a DNS label."""
    if _NAME.fullmatch(name):
        return name
    raise Invalid(f"{kind} name {name[:80]!r}: expected 1 to 63 lower-case letters, digits or hyphens, not at the ends")


@dataclass(frozen=True, slots=True, order=True)
class ModelRef:
    """A model of a tenant. Its text form `tenant/model` is the key of its events and of its etcd records."""

    tenant: str
    model: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.model}"

    @property
    def host(self) -> str:
        """The name the mesh routes by."""
        return f"{self.model}.{self.tenant}.models.lepton"

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """The inverse of `str()`. Raises Invalid on anything else."""
        tenant, slash, model = text.partition("/")
        if not slash:
            raise Invalid(f"{text[:80]!r} is not tenant/model")
        return cls(checked_name("tenant", tenant), checked_name("model", model))


@dataclass(frozen=True, slots=True, order=True)
class VersionRef:
    """One version of a model."""

    model: ModelRef
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.version}"

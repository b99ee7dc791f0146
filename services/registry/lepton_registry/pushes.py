"""How bytes become an artifact of a tenant, and that a version of a model, whichever way they came."""

from dataclasses import dataclass
from datetime import UTC, datetime

from lepton_common.blobs import Blobs
from lepton_common.db import Database, Tx
from lepton_common.errors import Invalid
from lepton_common.events import ModelCreated
from lepton_common.types import ModelRef

from lepton_registry import store
from lepton_registry.domain import ONNX, Artifact, Push, Version, next_version, registered
from lepton_registry.inspector import Inspector
from lepton_registry.uploads import Upload


@dataclass(frozen=True, slots=True)
class Intake:
    """Takes uploaded bytes in."""

    db: Database
    blobs: Blobs
    inspector: Inspector

    async def keep(self, upload: Upload, tenant: str, sha256: str | None) -> tuple[Artifact, bool]:
        """The upload is an artifact of the tenant, and whether it is a new one.

        Raises Invalid, and throws the bytes away, when they have another digest or are not a model that can be served.
        """
        try:
            actual = await upload.sha256()
            if actual != (sha256 or actual):
                raise Invalid(f"the bytes have the sha256 {actual}, not {sha256}")
            signature = await self.inspector.inspect(upload.path)
        except Invalid:
            await upload.discard()
            raise
        await self.blobs.put_file(upload.path, actual)
        artifact = Artifact(tenant, actual, upload.size, ONNX, signature, datetime.now(UTC))
        async with self.db.transaction() as tx:
            await store.get_tenant(tx, tenant)
            is_new = await store.add_artifact(tx, artifact)
            artifact = await store.get_artifact(tx, tenant, actual)
        await upload.discard()
        return artifact, is_new


async def register(tx: Tx, ref: ModelRef, sha256: str, push: Push) -> tuple[Version, bool]:
    """The artifact is a version of the model, and whether it is a new one: bytes make one version of it."""
    artifact = await store.get_artifact(tx, ref.tenant, sha256)
    is_new_model = await store.add_model(tx, ref, push.at)
    model = await store.lock_model(tx, ref)
    if known := await store.find_version_of(tx, ref, sha256):
        return known, False
    version = next_version(model, artifact, push)
    await store.add_version(tx, version)
    if is_new_model:
        await tx.emit(ModelCreated(tenant=ref.tenant, model=ref.model, at=push.at))
    await tx.emit(registered(version, push))
    return version, True

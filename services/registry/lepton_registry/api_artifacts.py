"""What a caller may ask of the registry about artifacts: upload in one stream or in parts, look, download."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse
from lepton import models as shapes
from lepton_common.errors import Invalid, NotFound
from lepton_common.web import problem_of
from starlette.requests import ClientDisconnect

from lepton_registry import store
from lepton_registry.api import Deployer, Reader, WithParts
from lepton_registry.domain import Artifact
from lepton_registry.uploads import Part, Upload, WrongOffset

PREFIX = "/v1/artifacts/"

router = APIRouter(prefix="/v1", tags=["artifacts"])

_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_OFFSET = {"Upload-Offset": {"description": "How many bytes are here already", "schema": {"type": "integer"}}}


@router.put(
    "/artifacts/{sha256}",
    status_code=201,
    responses={
        200: {"model": shapes.Artifact, "description": "It was here before"},
        202: {"model": shapes.Upload, "description": "The part is stored, the next one is awaited", "headers": _OFFSET},
    },
    openapi_extra={"requestBody": {"content": _BYTES, "required": True}},
)
async def upload_artifact(
    sha256: shapes.Sha256,
    by: Deployer,
    parts: WithParts,
    request: Request,
    content_range: Annotated[str | None, Header(description="`bytes FIRST-LAST/TOTAL`, or `bytes */TOTAL`")] = None,
) -> Response:
    """The bytes with that digest are stored, once they are all here, have that digest and are a model Lepton can serve.

    Without Content-Range the body is the whole. With it, parts follow each other, each from the Upload-Offset that HEAD
    tells; 409 tells it too. `bytes */TOTAL` without a body finishes an upload whose last answer was lost. Bytes with
    another digest, or that cannot be served, are thrown away (400).
    """
    part = None if content_range is None else Part.parse(content_range)
    async with parts.staging.hold(by.tenant, sha256) as upload:
        try:
            await _receive(request, upload, part)
        except WrongOffset as error:
            answer = problem_of(error)
            answer.headers["Upload-Offset"] = str(error.offset)
            return answer
        if part and upload.size < part.total:
            return _unfinished(sha256, upload, part)
        artifact, is_new = await parts.intake.keep(upload, by.tenant, sha256)
    return _answer(HTTPStatus.CREATED if is_new else HTTPStatus.OK, _shape(artifact))


@router.head(
    "/artifacts/{sha256}",
    response_class=Response,
    responses={200: {"content": _BYTES}, 404: {"description": "Not here, or not whole", "headers": _OFFSET}},
)
async def find_artifact(sha256: shapes.Sha256, by: Deployer, parts: WithParts) -> Response:
    """200 when the caller's tenant has the artifact, else 404 with the Upload-Offset from which an upload goes on.

    Its bytes are read: one that was damaged on disk is not here, so that pushing it again heals it.
    """
    async with parts.db.transaction() as tx:
        artifact = await store.find_artifact(tx, by.tenant, sha256)
    if artifact and await parts.blobs.is_intact(sha256):
        return Response(headers={"Content-Length": str(artifact.size_bytes)}, media_type="application/octet-stream")
    offset = await parts.staging.offset(by.tenant, sha256)
    return Response(status_code=HTTPStatus.NOT_FOUND, headers={"Upload-Offset": str(offset)})


@router.get("/artifacts/{sha256}", response_class=StreamingResponse, responses={200: {"content": _BYTES}})
async def download_artifact(sha256: shapes.Sha256, by: Reader, parts: WithParts) -> Response:
    """The artifact's bytes, verified on the way: if they are no longer right, the connection is cut before the end."""
    async with parts.db.transaction() as tx:
        artifact = await store.get_artifact(tx, by.tenant, sha256)
    if await parts.blobs.size(sha256) is None:
        raise NotFound(f"the bytes of artifact {sha256} are lost; upload them again")
    return StreamingResponse(
        parts.blobs.stream(sha256),
        headers={"Content-Length": str(artifact.size_bytes), "ETag": f'"{sha256}"'},
        media_type="application/octet-stream",
    )


async def _receive(request: Request, upload: Upload, part: Part | None) -> None:
    """The body is in the upload."""
    try:
        if part:
            await upload.receive_part(request.stream(), part)
        else:
            length = request.headers.get("content-length")
            await upload.receive(request.stream(), int(length) if length else None)
    except ClientDisconnect as error:
        raise Invalid("the upload was cut off") from error


def _unfinished(sha256: str, upload: Upload, part: Part) -> Response:
    answer = _answer(HTTPStatus.ACCEPTED, shapes.Upload(sha256=sha256, offset=upload.size, total_bytes=part.total))
    answer.headers["Upload-Offset"] = str(upload.size)
    return answer


def _answer(status: HTTPStatus, shape: shapes.Response) -> Response:
    return Response(shape.model_dump_json(), status, media_type="application/json")


def _shape(artifact: Artifact) -> shapes.Artifact:
    return shapes.Artifact.model_validate(artifact, from_attributes=True)

"""A service's HTTP API: problem+json for every error, keys, body limits, request ids, health and metrics."""

import asyncio
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any
from uuid import uuid4

import structlog
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from lepton.models import Problem, WrongInput
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope

from lepton_common.auth import Caller, Keys, secret_of
from lepton_common.errors import Denied, LeptonError, Unauthenticated, Unavailable, status_of
from lepton_common.health import Readiness
from lepton_common.journal import origin
from lepton_common.records import Scope
from lepton_common.service import Service
from lepton_common.telemetry import METRICS_CONTENT_TYPE

PROBLEM = "application/problem+json"
MAX_BODY_BYTES = 1024 * 1024
_BODY_TIMEOUT_S = 60.0

_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes"
# For answers to bodies that are not read to their end, so that the connection cannot be used again.
_CLOSE = {"Connection": "close"}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_OPERATIONAL = ("/health/", "/metrics")

_log: structlog.stdlib.BoundLogger = structlog.get_logger()
# Only tells the API's documentation how keys are sent; `auth.secret_of` is what reads them.
_bearer = HTTPBearer(auto_error=False, description="A key as `lp_…`; the header x-api-key is taken as well.")


def create_app(service: Service, keys: Keys, *, unlimited: Sequence[str] = ()) -> FastAPI:
    """An app without routes of its own yet, whose every answer but a success is a Problem.

    Bodies are JSON whatever their Content-Type says, of at most MAX_BODY_BYTES; routes under the path prefixes in
    `unlimited` read, and limit, their bodies themselves.
    """
    app = FastAPI(
        title=f"Lepton {service.name}",
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,
        telemetry={
            "tracer_provider": service.telemetry.provider,
            "exclude": lambda scope: scope["path"].startswith(_OPERATIONAL),
            "metrics": False,
            "logs": False,
        },
        responses={
            "4XX": _problem_response("The input or the caller is at fault"),
            "5XX": _problem_response("Try again later"),
        },
        exception_handlers={
            LeptonError: _on_lepton_error,
            Denied: _on_denied,
            HTTPException: _on_http_error,
            RequestValidationError: _on_validation_error,
        },
    )
    app.state.keys = keys
    app.add_middleware(Edge, readiness=service.readiness, unlimited=tuple(unlimited))
    _add_operational_routes(app, service)
    return app


def caller(scope: Scope) -> Any:
    """A dependency, `Annotated[Caller, caller(Scope.READ)]`: who calls. Without a key of that scope: 401 or 403.

    So too when the path or the query names a model that the key is not for: before anything is looked up.
    """

    async def check(request: Request, _: Annotated[object, Depends(_bearer)]) -> Caller:
        headers = dict(request.scope["headers"])
        secret = secret_of(headers.get(b"authorization"), headers.get(b"x-api-key"))
        if not secret:
            raise Unauthenticated("no key: send Authorization: Bearer lp_…")
        keys: Keys = request.app.state.keys
        model = request.path_params.get("model") or request.query_params.get("model")
        return keys.check(secret, scope, datetime.now(UTC), model)

    return Depends(check)


def peer_of(request: Request) -> str:
    """From where the caller calls, for the audit."""
    peer = request.client.host if request.client else ""
    return origin(peer, dict(request.scope["headers"]).get(b"x-forwarded-for"))


def problem(
    status: int, detail: str, errors: Sequence[WrongInput] = (), headers: dict[str, str] | None = None
) -> Response:
    """An error as an answer (RFC 9457)."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=list(errors))
    # ASCII, because an input's name may hold what UTF-8 cannot: half a surrogate pair.
    return Response(json.dumps(body.model_dump()), status, headers=headers, media_type=PROBLEM)


def problem_of(error: LeptonError) -> Response:
    """A LeptonError as an answer: its kind's status, its message, when to try again."""
    headers = {}
    if error.retry_after_s is not None or isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return problem(status_of(error), error.message, headers=headers)


class Edge:
    """The outermost layer, plain ASGI: request id, start-up gate, body limit, and a 500 that tells a caller nothing."""

    def __init__(self, app: ASGIApp, readiness: Readiness, unlimited: tuple[str, ...]) -> None:
        self._app = app
        self._readiness = readiness
        self._unlimited = unlimited

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid4().hex
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._answer(scope, receive, send_with_id)
            except Exception:  # The caller hears that it was ours, the log what it was.
                _log.exception("unhandled error", method=scope["method"], path=scope["path"])
                if started:
                    raise  # Only cutting the connection tells the caller that the answer is not whole.
                await problem(500, "an error inside the service; its log has the request id")(
                    scope, receive, send_with_id
                )

    async def _answer(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if not self._readiness.started and not path.startswith(_OPERATIONAL):
            await problem_of(Unavailable("the service is starting", retry_after_s=1))(scope, receive, send)
            return
        if path.startswith(self._unlimited):
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > MAX_BODY_BYTES:
            await problem(413, _TOO_LARGE, headers=_CLOSE)(scope, receive, send)
            return
        await self._app(_as_json(scope), _limited(receive), send)


def _as_json(scope: ASGIScope) -> ASGIScope:
    """The request, saying that its body is JSON: the API speaks nothing else, and curl -d claims a form."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


def _limited(receive: Receive) -> Receive:
    received = 0
    # Of the loop's clock; None once the body is there, as from then on only the caller's leaving is waited for.
    deadline: float | None = asyncio.get_running_loop().time() + _BODY_TIMEOUT_S

    async def limited() -> Message:
        nonlocal received, deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body was not here in {_BODY_TIMEOUT_S:g} s", _CLOSE) from None
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)  # The rest is read and thrown away: else it would cost the answer.
        if not message.get("more_body", False):
            deadline = None
        return message

    return limited


def _add_operational_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", include_in_schema=False)
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", include_in_schema=False)
    async def ready() -> Response:
        status, body = service.readiness.answer()
        return Response(body, status, media_type="application/json")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.telemetry.render_metrics(), media_type=METRICS_CONTENT_TYPE)


async def _on_lepton_error(_: Request, error: LeptonError) -> Response:
    return problem_of(error)


async def _on_denied(request: Request, error: Denied) -> Response:
    keys: Keys = request.app.state.keys
    # The route and not the path: somebody may have put a secret there.
    route = getattr(request.scope.get("route"), "path", "")
    keys.journal.refused(error, peer_of(request), f"{request.method} {route}")
    return problem_of(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    details = {
        404: f"no such path: {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }
    return problem(error.status_code, details.get(error.status_code, error.detail), headers=dict(error.headers or {}))


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    errors = [WrongInput(name=".".join(map(str, each["loc"])), detail=_told(each)) for each in error.errors()]
    detail = "; ".join(f"{each.name}: {each.detail}" for each in errors[:5])
    return problem(400, detail, errors)


def _told(error: Any) -> str:
    """What is wrong, without the input itself: it may be a secret."""
    if error["type"] == "json_invalid":
        return f"not JSON: {error['ctx']['error']}"
    return str(error["msg"])


def _problem_response(description: str) -> dict[str, Any]:
    schema = Problem.model_json_schema(mode="serialization")
    # A response's schema has no place for definitions of its own.
    schema["properties"]["errors"]["items"] = schema.pop("$defs")[WrongInput.__name__]
    return {"description": description, "content": {PROBLEM: {"schema": schema}}}

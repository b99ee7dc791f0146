"""Lepton from Python, blocking and async: two drivers for the same operations."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import httpx
import orjson
import stamina
from pydantic import ValidationError

from lepton import operations, operations_keys, operations_policies, operations_rollouts, operations_serving, upload
from lepton.endpoint import Endpoint, find_endpoint
from lepton.errors import DeadlineExceeded, LeptonError, Unreachable, error_of
from lepton.flow import Ask, Flow, Pause, Reply, Work
from lepton.models import Problem

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS = 4
_CONNECT_S = 5.0
# A server that asks for more patience than this is reported to the caller instead of being waited for.
_MAX_RETRY_AFTER_S = 5.0


class _Operation(Generic[P, T]):
    """A flow as a method: a call on Client returns its result, on AsyncClient something to await."""

    def __init__(self, flow: Callable[P, Flow[T]]) -> None:
        self._flow = flow

    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: "AsyncClient", owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Callable[P, Flow[T]]: ...
    def __get__(self, client: "Client | AsyncClient | None", owner: type) -> Callable[P, Any]:
        if client is None:
            return self._flow

        @wraps(self._flow)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.run(self._flow(*args, **kwargs))

        return call


class _Operations:
    """What both clients can do. Each is documented, with its errors, where it is written: in `operations*.py`."""

    tenants = _Operation(operations_keys.tenants)
    create_tenant = _Operation(operations_keys.create_tenant)
    keys = _Operation(operations_keys.keys)
    create_key = _Operation(operations_keys.create_key)
    rotate_key = _Operation(operations_keys.rotate_key)
    revoke_key = _Operation(operations_keys.revoke_key)
    upload = _Operation(upload.upload)
    push = _Operation(operations.push)
    models = _Operation(operations.models)
    model = _Operation(operations.model)
    versions = _Operation(operations.versions)
    version = _Operation(operations.version)
    timeline = _Operation(operations.timeline)
    start_rollout = _Operation(operations_rollouts.start_rollout)
    deploy = _Operation(operations_rollouts.deploy)
    rollback = _Operation(operations_rollouts.rollback)
    wait = _Operation(operations_rollouts.wait_for)
    steer = _Operation(operations_rollouts.steer)
    pause_rollout = _Operation(operations_rollouts.pause_rollout)
    resume_rollout = _Operation(operations_rollouts.resume_rollout)
    promote_rollout = _Operation(operations_rollouts.promote_rollout)
    abort_rollout = _Operation(operations_rollouts.abort_rollout)
    approve_rollout = _Operation(operations_rollouts.approve_rollout)
    retry_rollout = _Operation(operations_rollouts.retry_rollout)
    rollouts = _Operation(operations_rollouts.rollouts)
    rollout = _Operation(operations_rollouts.rollout)
    find_rollout = _Operation(operations_rollouts.find_rollout)
    serving = _Operation(operations_serving.serving)
    set_cache = _Operation(operations_serving.set_cache)
    unset_cache = _Operation(operations_serving.unset_cache)
    set_limits = _Operation(operations_serving.set_limits)
    unset_limits = _Operation(operations_serving.unset_limits)
    decisions = _Operation(operations_rollouts.decisions)
    rollout_windows = _Operation(operations_rollouts.rollout_windows)
    replay = _Operation(operations_rollouts.replay)
    policies = _Operation(operations_policies.policies)
    policy = _Operation(operations_policies.policy)
    set_policy = _Operation(operations_policies.set_policy)
    unset_policy = _Operation(operations_policies.unset_policy)
    windows = _Operation(operations_policies.windows)
    mesh = _Operation(operations_policies.mesh)
    apply_mesh = _Operation(operations_policies.apply_mesh)
    release_mesh = _Operation(operations_policies.release_mesh)
    metadata = _Operation(operations.metadata)
    infer = _Operation(operations.infer)
    trace = _Operation(operations.trace)
    traces = _Operation(operations.traces)


class Client(_Operations):
    """A blocking client, usable from many threads.

    URL and key: the arguments, else LEPTON_URL and LEPTON_API_KEY, else the local platform's.
    """

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self.endpoint = find_endpoint(url, key)
        self._http = httpx.Client(**_http_options(self.endpoint))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, flow: Flow[T]) -> T:
        """The result of a flow, each step done before the next is asked for."""
        answer: Any = None
        failure: Exception | None = None
        while True:
            try:
                step = flow.send(answer) if failure is None else flow.throw(failure)
            except StopIteration as end:
                result: T = end.value
                return result
            answer, failure = None, None
            try:
                match step:
                    case Ask():
                        answer = self._exchange(step)
                    case Work():
                        answer = step.run()
                    case Pause():
                        time.sleep(step.seconds)
                        answer = time.monotonic()
            except Exception as error:
                failure = error

    def _exchange(self, ask: Ask) -> Reply:
        for attempt in stamina.retry_context(on=_may_retry, **_patience(ask)):
            with attempt:
                content = ask.body() if callable(ask.body) else ask.body
                try:
                    response = self._http.request(content=content, **_request_options(ask))
                except httpx.HTTPError as error:
                    raise _transport_error(error, self.endpoint, ask) from error
                return _reply(response, ask)
        raise AssertionError("an attempt returns or raises")


class AsyncClient(_Operations):
    """The same for asyncio: every operation returns something to await."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self.endpoint = find_endpoint(url, key)
        self._http = httpx.AsyncClient(**_http_options(self.endpoint))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, flow: Flow[T]) -> T:
        """The result of a flow, each step done before the next is asked for."""
        answer: Any = None
        failure: Exception | None = None
        while True:
            try:
                step = flow.send(answer) if failure is None else flow.throw(failure)
            except StopIteration as end:
                result: T = end.value
                return result
            answer, failure = None, None
            try:
                match step:
                    case Ask():
                        answer = await self._exchange(step)
                    case Work():
                        answer = await asyncio.to_thread(step.run)
                    case Pause():
                        await asyncio.sleep(step.seconds)
                        answer = time.monotonic()
            except Exception as error:
                failure = error

    async def _exchange(self, ask: Ask) -> Reply:
        async for attempt in stamina.retry_context(on=_may_retry, **_patience(ask)):
            with attempt:
                content = _in_thread(ask.body()) if callable(ask.body) else ask.body
                try:
                    response = await self._http.request(content=content, **_request_options(ask))
                except httpx.HTTPError as error:
                    raise _transport_error(error, self.endpoint, ask) from error
                return _reply(response, ask)
        raise AssertionError("an attempt returns or raises")


def _once(flow: Callable[P, Flow[T]]) -> Callable[P, T]:
    """The operation as a function of its own, on a client made for the call."""

    @wraps(flow)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with Client() as client:
            return client.run(flow(*args, **kwargs))

    return call


push = _once(operations.push)


async def _in_thread(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(next, chunks, b""):
        yield chunk


# --- what both drivers share ------------------------------------------------------------------------------------------


def _http_options(endpoint: Endpoint) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    # A proxy from the environment is for the world outside, not for this machine.
    return {"base_url": endpoint.url, "headers": headers, "trust_env": not endpoint.local}


def _request_options(ask: Ask) -> dict[str, Any]:
    timeout = httpx.Timeout(ask.timeout_s, connect=min(ask.timeout_s, _CONNECT_S))
    return {
        "method": ask.method,
        "url": ask.path,
        "params": dict(ask.query),
        "headers": dict(ask.headers),
        "timeout": timeout,
    }


def _patience(ask: Ask) -> dict[str, Any]:
    attempts = _ATTEMPTS if ask.repeatable else 1
    return {"attempts": attempts, "timeout": ask.timeout_s, "wait_initial": 0.1, "wait_max": 1.0, "wait_jitter": 0.1}


def _may_retry(error: Exception) -> bool | float:
    """Whether to send a repeatable request again, or after how many seconds the server wants it."""
    if not isinstance(error, LeptonError) or not error.retryable or isinstance(error, DeadlineExceeded):
        return False
    if error.retry_after_s is None:
        return True
    return error.retry_after_s <= _MAX_RETRY_AFTER_S and max(error.retry_after_s, 0.05)


def _reply(response: httpx.Response, ask: Ask) -> Reply:
    if response.is_success or response.status_code in ask.accepts:
        return Reply(response.status_code, response.headers, response.content)
    retry_after = response.headers.get("retry-after", "")
    raise error_of(response.status_code, _message(response), float(retry_after) if retry_after.isdigit() else None)


def _message(response: httpx.Response) -> str:
    """What a problem of `/v1` or an error of `/v2` says; the status when it is neither."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return _oip_message(response) or f"The platform answered {response.status_code} {response.reason_phrase}."
    lines = (problem.detail, *(f"{wrong.name}: {wrong.detail}" for wrong in problem.errors))
    return "\n".join(dict.fromkeys(lines))  # The only wrong input is the detail already.


def _oip_message(response: httpx.Response) -> str | None:
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return None
    return str(body["error"]) if isinstance(body, dict) and "error" in body else None


def _transport_error(error: httpx.HTTPError, endpoint: Endpoint, ask: Ask) -> LeptonError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        hint = None if endpoint.local else "Check LEPTON_URL, and that the platform runs there."
        return Unreachable(f"Nothing answers at {endpoint.url}.", hint=hint)
    if isinstance(error, httpx.TimeoutException):
        return DeadlineExceeded(f"No answer from {endpoint.url} within {ask.timeout_s:g} s.")
    return Unreachable(f"The connection to {endpoint.url} broke ({type(error).__name__}).")

"""Load on the front door from many callers at once, every answer accounted for.

with Load(platform.port, "/v2/models/m/infer", body, callers=8) as load:
    load.wait_for(100)               # a hundred answers from now on
    platform.kill("worker-1")
    load.wait_for(1000)
assert not load.failures, load.report()
"""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

_ANSWER_S = 30.0  # longer than the platform lets any request take


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end. `status` is 0 when there was no answer, and `failure` then says how the connection failed; of
    gRPC it is 200 or gRPC's own."""

    begun_s: float  # on the monotonic clock
    latency_s: float
    status: int
    version: str  # that answered, as x-lepton-version has it
    failure: str

    @property
    def failed(self) -> bool:
        return bool(self.failure)


Check = Callable[[bytes, str], str]


def no_check(body: bytes, version: str) -> str:
    """Every answer of status 200 is a good one."""
    return ""


class Load:
    """`callers` threads, each with one kept-alive connection, that send the same request again and again.

    An answer fails when its status is not 200, when the connection breaks, or when `check(body, version)` says what is
    wrong with it. It ends by itself after `at_most_s`.
    """

    def __init__(
        self,
        port: int,
        path: str,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        callers: int = 8,
        check: Check = no_check,
        at_most_s: float = 90.0,
        pause_s: float = 0.0,
    ) -> None:
        """`pause_s`: each caller waits so long after every answer."""
        self.answers: list[Answer] = []
        self._port, self._path, self._body = port, path, body
        self._headers = dict(headers or {})
        self._check = check
        self._pause_s = pause_s
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._ends_at = time.monotonic() + at_most_s
        self._threads = [threading.Thread(target=self._call, name=f"caller-{n}") for n in range(callers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def failures(self) -> list[Answer]:
        """Everything but a good answer, so far."""
        with self._changed:
            return [answer for answer in self.answers if answer.failed]

    @property
    def versions(self) -> Counter[str]:
        """How many good answers each version gave, so far."""
        with self._changed:
            return Counter(answer.version for answer in self.answers if not answer.failed)

    def wait_for(self, count: int = 100, within_s: float = 30.0) -> None:
        """`count` requests more have begun and ended, well or not. Raises AssertionError when they have not in time."""
        self._wait(lambda answer: True, count, within_s)

    def wait_for_version(self, version: int | str, count: int = 1, within_s: float = 30.0) -> None:
        """That version gave `count` good answers to requests that began from now on. Raises AssertionError."""
        self._wait(lambda answer: answer.version == str(version) and not answer.failed, count, within_s)

    def _wait(self, counts: Callable[[Answer], bool], wanted: int, within_s: float) -> None:
        from_s = time.monotonic()
        found = 0
        with self._changed:
            seen = len(self.answers)

            def enough() -> bool:
                nonlocal found, seen
                found += sum(answer.begun_s > from_s and counts(answer) for answer in self.answers[seen:])
                seen = len(self.answers)
                return found >= wanted

            came = self._changed.wait_for(enough, within_s)
        over = " (the load was over by then)" if time.monotonic() >= self._ends_at else ""
        assert came, f"{found} of {wanted} answers in {within_s:g} s{over}; {self.report()}"

    def latency_s(self, quantile: float) -> float:
        """Of the good answers; `quantile` from 0 to 1."""
        with self._changed:
            ordered = sorted(answer.latency_s for answer in self.answers if not answer.failed)
        assert ordered, self.report()
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]

    def report(self) -> str:
        """What came, for the message of a failed assertion."""
        with self._changed:
            answers = list(self.answers)
        statuses = Counter(answer.status for answer in answers)
        failures = Counter(answer.failure for answer in answers if answer.failed)
        told = "; ".join(f"{count} times {failure}" for failure, count in failures.most_common(5))
        return f"{len(answers)} answers by status {dict(statuses)}; {told or 'no failures'}"

    def _call(self) -> None:
        connection = self._connection()
        try:
            while not self._over.is_set() and time.monotonic() < self._ends_at:
                answer = self._ask(connection)
                with self._changed:
                    self.answers.append(answer)
                    self._changed.notify_all()
                if self._pause_s:
                    self._over.wait(self._pause_s)
                if answer.status == 0:
                    connection.close()
                    connection = self._connection()
                    self._over.wait(0.01)  # A front door that is down is not to be hammered.
        finally:
            connection.close()

    def _connection(self) -> Any:
        """What `_ask` is called with. It has `close`."""
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_S)

    def _ask(self, connection: Any) -> Answer:
        begun_s = time.monotonic()
        status, version, failure = 0, "", ""
        try:
            connection.request("POST", self._path, self._body, self._headers)
            response = connection.getresponse()
            body = response.read()
            status, version = response.status, response.headers.get("x-lepton-version", "")
            failure = self._check(body, version) if status == 200 else f"{status} {body[:200].decode(errors='replace')}"
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        return Answer(begun_s, time.monotonic() - begun_s, status, version, failure)


class GrpcLoad(Load):
    """The same over gRPC: each caller has a channel of its own."""

    def __init__(
        self, port: int, request: service_pb2.ModelInferRequest, *, callers: int, check: Check, pause_s: float
    ) -> None:
        """`check` gets an answer's first tensor."""
        super().__init__(port, "", b"", callers=callers, check=check, pause_s=pause_s, at_most_s=220)
        self._request = request

    def _connection(self) -> grpc.Channel:
        # Channels of one process share their connections unless they are told not to.
        return grpc.insecure_channel(f"127.0.0.1:{self._port}", options=[("grpc.use_local_subchannel_pool", 1)])

    def _ask(self, connection: Any) -> Answer:
        begun_s = time.monotonic()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        call = stub.ModelInfer.future(self._request, timeout=_ANSWER_S)
        code = call.code()  # when it is over
        latency_s = time.monotonic() - begun_s
        if code is not grpc.StatusCode.OK:
            return Answer(begun_s, latency_s, code.value[0], "", f"{code.name}: {call.details()}")
        version = dict(call.trailing_metadata())["x-lepton-version"]
        failure = self._check(call.result().raw_output_contents[0], version)
        return Answer(begun_s, latency_s, 200, version, failure)

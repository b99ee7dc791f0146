"""A request for inference that admission had to look at: sent into the mesh at its turn, or refused."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from lepton_common.errors import LeptonError
from lepton_common.http11 import Request

from lepton_gateway.admission import Admission
from lepton_gateway.lanes import Lane, Ticket
from lepton_gateway.routes import Route
from lepton_gateway.windows import FORCED, SPLIT


@dataclass(frozen=True, slots=True)
class Ways:
    """Where a request goes that has its turn, and one that will not have it."""

    admission: Admission
    send: Callable[["Inference"], None]
    refuse: Callable[[Request, LeptonError], None]


class Inference(Ticket):
    """`version` and `user` are as `Proxy.infer` wants them."""

    __slots__ = ("_ways", "request", "route", "user", "version")

    def __init__(
        self, ways: Ways, request: Request, route: Route, lane: Lane, version: int | None, user: int | None
    ) -> None:
        super().__init__(route.serving.tenant, lane, len(request.body), 0.0, 0.0)
        self.background = request.background
        self._ways = ways
        self.request = request
        self.route = route
        self.version = version
        self.user = user

    def start(self) -> None:
        self._ways.send(self)

    def refuse(self, error: LeptonError) -> None:
        self.request.on_disconnect = None
        self.route.counts.refused()
        self._ways.refuse(self.request, error)

    def cancel(self) -> None:
        """The caller left while the request waited."""
        self.request.on_disconnect = None
        self._ways.admission.withdraw(self)
        counts = self.route.counts
        if not counts.is_awake:
            counts.wake()
        counts.left(SPLIT if self.version is None else FORCED, time.monotonic() - self.arrived)

"""The trace extension: which infer requests are traced, for all models or for one."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lepton_common.errors import Invalid
from lepton_common.http11 import Request
from lepton_common.telemetry import is_sampled
from lepton_common.types import ModelRef
from opentelemetry.trace import Tracer

from lepton_gateway.limits import TokenBucket
from lepton_gateway.traces import Trace, Traces

_LEVELS = ("OFF", "TIMESTAMPS")
# Of one tenant's requests that ask to be traced so many are, and this many in a row. Others go on as if they had not.
_ASKED_PER_S, _ASKED_BURST = 10.0, 50
# What this server has one value for; the names are Triton's.
_FIXED = {"trace_mode": "opentelemetry", "trace_file": "", "log_frequency": "0"}


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """One request of `rate` is traced, `count` of them in all (-1: no end)."""

    on: bool
    rate: int = 1000
    count: int = -1

    def view(self) -> dict[str, Any]:
        """As the protocol shows it: all values are strings."""
        return {
            "trace_level": ["TIMESTAMPS" if self.on else "OFF"],
            "trace_rate": str(self.rate),
            "trace_count": str(self.count),
            **_FIXED,
        }


class Tracing:
    """Decides by counting, so a rate of 1000 is exactly every thousandth request of a model.

    Beside those, requests are traced that ask for it: their `traceparent` has the sampled flag.
    """

    def __init__(self, tracer: Tracer, *, on: bool) -> None:
        """`on` says whether spans go anywhere, which makes TIMESTAMPS the level to start with."""
        self.traces = Traces()
        self._tracer = tracer
        self._allowances: dict[str, TokenBucket] = {}  # by tenants that have a model
        self._initial = TraceSettings(on=on)
        self._all = self._initial
        self._changes: dict[ModelRef, dict[str, Any]] = {}
        self._seen: dict[ModelRef, int] = {}
        self._left: dict[ModelRef | None, int] = {}
        self.active = on

    def view(self, model: ModelRef | None) -> dict[str, Any]:
        """The settings of a model; None is what holds for every model without its own."""
        return self._of(model).view()

    def update(self, model: ModelRef | None, document: Mapping[str, Any]) -> dict[str, Any]:
        """All settings after the changes; null takes one back. Raises Invalid, and changes nothing, on a wrong one."""
        changes: dict[str, Any] = {}
        for name, value in document.items():
            changes.update(_parsed(name, value))
        if model is None:
            initial = {name: getattr(self._initial, name) for name, value in changes.items() if value is None}
            self._all = replace(self._all, **{**changes, **initial})
        else:
            own = {**self._changes.get(model, {}), **changes}
            self._changes[model] = {name: value for name, value in own.items() if value is not None}
        if "count" in changes:
            self._left.pop(model, None)
        self.active = self._all.on or any(each.get("on") for each in self._changes.values())
        return self.view(model)

    def start(self, request: Request, model: ModelRef, began: float) -> tuple[Trace | None, bytes]:
        """The request's trace, if it is to have one, and the header lines that go with it instead of the caller's."""
        traceparent = request.headers.get(b"traceparent", b"")
        asked = is_sampled(traceparent)
        settings = self._of(model)
        due = settings.on and self._is_due(model, settings)
        if not due and not (asked and self._allows(model.tenant)):
            return None, _unsampled(traceparent, request) if asked else b""
        trace = Trace(self._tracer, self.traces, request, model, began)
        return trace, trace.carried

    def _allows(self, tenant: str) -> bool:
        now = time.monotonic()
        allowance = self._allowances.get(tenant)
        if allowance is None:
            allowance = self._allowances[tenant] = TokenBucket(_ASKED_PER_S, _ASKED_BURST)
        if allowance.wait_s(now):
            return False
        allowance.take(now)
        return True

    def _of(self, model: ModelRef | None) -> TraceSettings:
        own = self._changes.get(model) if model is not None else None
        return replace(self._all, **own) if own else self._all

    def _is_due(self, model: ModelRef, settings: TraceSettings) -> bool:
        seen = self._seen.get(model, 0)
        self._seen[model] = seen + 1
        if seen % settings.rate:
            return False
        if settings.count < 0:
            return True
        budget = model if "count" in self._changes.get(model, {}) else None
        left = self._left.get(budget, settings.count)
        self._left[budget] = max(0, left - 1)
        return left > 0


def _unsampled(traceparent: bytes, request: Request) -> bytes:
    """The caller's context without the flag, by which the worker would trace. Who changes that is a parent anew."""
    trace_id = traceparent[3:35]
    line = b"traceparent: 00-%b-%016x-00\r\n" % (trace_id, random.getrandbits(63) + 1)
    state = request.headers.get(b"tracestate")
    return line if state is None else b"%btracestate: %b\r\n" % (line, state)


def _parsed(name: str, value: Any) -> dict[str, Any]:
    """The setting as a field of TraceSettings. Raises Invalid."""
    match name:
        case "trace_level":
            if value is None:
                return {"on": None}
            levels = [value] if isinstance(value, str) else value
            if not isinstance(levels, list) or not levels or any(level not in _LEVELS for level in levels):
                raise Invalid(f"trace_level must be a list of {' or '.join(_LEVELS)}")
            return {"on": "TIMESTAMPS" in levels}
        case "trace_rate":
            return {"rate": _integer(name, value, least=1)}
        case "trace_count":
            return {"count": _integer(name, value, least=-1)}
        case _ if name in _FIXED:
            if value is not None and str(value) != _FIXED[name]:
                raise Invalid(f"{name} is {_FIXED[name]!r} here and cannot be changed")
            return {}
        case _:
            raise Invalid(f"{name[:80]!r} is not a trace setting")


def _integer(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    values = value if isinstance(value, list) and len(value) == 1 else [value]
    try:
        number = int(str(values[0]))
    except ValueError:
        number = least - 1
    if isinstance(values[0], bool | float) or not least <= number < 2**31:
        raise Invalid(f"{name} must be an integer of at least {least}")
    return number

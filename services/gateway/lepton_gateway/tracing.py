"""The trace extension: which infer requests get a span of their own, for all models or for one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lepton_common.errors import Invalid
from lepton_common.http11 import Request
from lepton_common.telemetry import extract, inject
from lepton_common.types import ModelRef
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

_LEVELS = ("OFF", "TIMESTAMPS")
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
    """Decides by counting, so a rate of 1000 is exactly every thousandth request of a model."""

    def __init__(self, tracer: Tracer, *, on: bool) -> None:
        """`on` says whether spans go anywhere, which makes TIMESTAMPS the level to start with."""
        self._tracer = tracer
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

    def start(self, request: Request, model: ModelRef) -> tuple[Span, bytes] | None:
        """The span of this request and the header lines that carry it on; None when it is not traced."""
        settings = self._of(model)
        if not settings.on or not self._is_due(model, settings):
            return None
        span = self._tracer.start_span(
            "infer",
            context=extract(request.headers.items()),
            kind=SpanKind.SERVER,
            attributes={"lepton.tenant": model.tenant, "lepton.model": model.model},
        )
        carried: list[tuple[bytes, bytes]] = []
        with trace.use_span(span):
            inject(carried)
        return span, b"".join([b"%b: %b\r\n" % header for header in carried])

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


def end(span: Span, version: bytes, status: int) -> None:
    """The request was answered."""
    span.set_attribute("http.response.status_code", status)
    span.set_attribute("lepton.version", version.decode("latin-1"))
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
    span.end()


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

"""What a client can do about how a model is served: look, cache, limit. Flows, as those of `operations.py`."""

from lepton.flow import Ask, Flow, ask, checked, get, parsed, segment
from lepton.models import ModelLimits, Request, ResponseCache, ServingView


def serving(model: str) -> Flow[ServingView]:
    """What is served of a model now. Raises NotFound when nothing ever was."""
    return get(ServingView, _path(model))


def set_cache(model: str, *, ttl_s: float = 60.0, max_bytes: int = 64 << 20) -> Flow[ServingView]:
    """The gateways answer requests of the same bytes from memory, for `ttl_s` seconds, while one version has all of the
    model's traffic and no rollout moves it. A change of what is served empties it. Raises NotFound."""
    return _put(f"{_path(model)}/cache", checked(ResponseCache, ttl_s=ttl_s, max_bytes=max_bytes))


def unset_cache(model: str) -> Flow[ServingView]:
    """The model is asked every time again. Raises NotFound."""
    return _delete(f"{_path(model)}/cache")


def set_limits(
    model: str,
    *,
    rate_per_s: float | None = None,
    burst: int | None = None,
    max_concurrency: int | None = None,
    timeout_ms: int | None = None,
) -> Flow[ServingView]:
    """The model has these limits at each gateway, and the defaults for what is None: see `ModelLimits`. What is over
    one is refused with 429 and when to try again. Raises NotFound, and Invalid naming the limit that is wrong."""
    limits = checked(
        ModelLimits, rate_per_s=rate_per_s, burst=burst, max_concurrency=max_concurrency, timeout_ms=timeout_ms
    )
    return _put(f"{_path(model)}/limits", limits)


def unset_limits(model: str) -> Flow[ServingView]:
    """The model has the default limits again. Raises NotFound."""
    return _delete(f"{_path(model)}/limits")


def _path(model: str) -> str:
    return f"/v1/serving/{segment(model)}"


def _put(path: str, content: Request) -> Flow[ServingView]:
    headers = {"content-type": "application/json"}
    request = Ask(method="PUT", path=path, headers=headers, body=content.model_dump_json().encode(), repeatable=True)
    return parsed(ServingView, (yield from ask(request)))


def _delete(path: str) -> Flow[ServingView]:
    return parsed(ServingView, (yield from ask(Ask(method="DELETE", path=path, repeatable=True))))

"""What a client can do, each operation once, as a flow (see `flow.py`): models, inference.

Tenants and keys are in `operations_keys.py`, rollouts in `operations_rollouts.py`, how a model is served in
`operations_serving.py`, policies, windows and the mesh in `operations_policies.py`.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from lepton.errors import Invalid
from lepton.flow import (
    Ask,
    Flow,
    OnProgress,
    ask,
    checked,
    get,
    get_list,
    get_pages,
    parsed,
    post_request,
    segment,
    work,
)
from lepton.models import (
    Batching,
    Model,
    ModelMetadata,
    Name,
    NewVersion,
    TimelineEntry,
    Trace,
    Version,
)
from lepton.operations_rollouts import automatic, serves, start_usual, wait_for
from lepton.policies import Strategy
from lepton.rollouts import Rollout
from lepton.upload import upload

# numpy takes a fifth of the time that a command needs to start, and most of them compute nothing.
if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lepton.tensors import Outputs

# --- models -----------------------------------------------------------------------------------------------------------


def models() -> Flow[list[Model]]:
    """The tenant's models."""
    return get_pages(Model, "/v1/models")


def model(name: str) -> Flow[Model]:
    """One model. Raises NotFound."""
    return get(Model, f"/v1/models/{segment(name)}")


def versions(model: str) -> Flow[list[Version]]:
    """A model's versions. Raises NotFound when there is no such model."""
    return get_pages(Version, f"/v1/models/{segment(model)}/versions")


def version(model: str, version: int) -> Flow[Version]:
    """One version of a model. Raises NotFound."""
    return get(Version, f"/v1/models/{segment(model)}/versions/{version}")


def timeline(model: str) -> Flow[list[TimelineEntry]]:
    """Every fact about a model, in order."""
    return get_pages(TimelineEntry, f"/v1/models/{segment(model)}/timeline")


def push(
    model: Any,
    *,
    name: str,
    example: Any = None,
    classes: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    batching: Batching | None = None,
    deploy: bool = True,
    wait: bool | None = None,
    timeout: float = 300.0,
    progress: OnProgress | None = None,
    tell: Callable[[Version, Rollout | None], None] = lambda version, rollout: None,
) -> Flow[Version]:
    """A version of the model `name`; bytes pushed before give the version they gave then.

    `model` is an ONNX file's path, an `onnx.ModelProto`, a torch module (with `example`, an input or a tuple of inputs)
    or a fitted scikit-learn estimator. `classes` names a classifier's classes; scikit-learn knows its own. `labels` and
    `metrics` are kept with the version. With `deploy` all live traffic goes to it, by the policy stored for the model
    if there is one, else at once; with `wait` this returns when it does, after `timeout` seconds at most. `wait` None
    waits unless the policy lets the version earn its traffic, which takes as long as it takes. `tell` hears of the
    version as soon as it is registered, and once more with its rollout when that is on its way.

    Raises Invalid when the model cannot be exported or served, RolloutFailed when no worker can load it or it proved
    worse than the version before, DeadlineExceeded.
    """
    _check_name(name)
    from lepton import export  # onnx, and what the model was made with, are loaded only by who pushes.

    source = yield from work(lambda: export.to_onnx(model, example=example, classes=classes))
    sha256 = yield from upload(source, progress=progress)
    wanted = checked(
        NewVersion,
        sha256=sha256,
        deploy=deploy,
        batching=batching or Batching(),
        metrics=dict(metrics or {}),
        labels=dict(labels or {}),
    )
    path = f"/v1/models/{segment(name)}/versions"
    # The registry answers the same bytes with the same version, so a repeat is harmless.
    reply = yield from ask(post_request(path, wanted, repeatable=True))
    pushed = parsed(Version, reply)
    tell(pushed, None)
    if deploy and not (yield from serves(pushed)):
        first = reply.status == 201 and pushed.version == 1
        started = automatic(pushed, timeout) if first else start_usual(name, pushed.version)
        if wait is not False or not first:
            rollout = yield from started
            tell(pushed, rollout)
            if wait or (wait is None and rollout.strategy is Strategy.IMMEDIATE):
                yield from wait_for(rollout, timeout=timeout, progress=progress)
    return pushed


def _check_name(model: str) -> None:
    """Before a long upload: raises Invalid for a name that the platform would refuse after it."""
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError as error:
        hint = "A name is 1 to 63 lower-case letters, digits or hyphens, with no hyphen at its ends."
        raise Invalid(f"{model!r} cannot be a model's name.", hint=hint) from error


# --- inference --------------------------------------------------------------------------------------------------------


def metadata(model: str, *, version: int | None = None) -> Flow[ModelMetadata]:
    """A served model's inputs and outputs. Raises NotFound, Unavailable when no worker has it ready."""
    return get(ModelMetadata, _served_path(model, version))


def infer(
    model: str,
    inputs: "Mapping[str, ArrayLike]",
    *,
    version: int | None = None,
    outputs: Sequence[str] | None = None,
    timeout: float = 30.0,
    traced: bool = False,
) -> "Flow[Outputs]":
    """The model's outputs by name, computed in `timeout` seconds at most.

    `version` None takes the version that live traffic goes to; `outputs` None takes all. With `traced` the platform is
    asked to remember where the time went: `trace(outputs.request_id)` tells. It does for some ten requests a second.

    Raises Invalid naming the input that does not fit, NotFound, DeadlineExceeded, Unavailable.
    """
    from lepton import tensors

    headers, body = tensors.encode(inputs, outputs)
    if traced:
        headers = {**headers, "traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"}
    request = Ask(
        method="POST",
        path=f"{_served_path(model, version)}/infer",
        headers={**headers, "x-request-timeout-ms": str(max(1, round(timeout * 1000)))},
        body=body,
        timeout_s=timeout,
        repeatable=True,
    )
    try:
        reply = yield from ask(request)
    except Invalid as error:
        # The commonest slip: numpy and scikit-learn compute in FP64, most models take FP32.
        if " got datatype " in error.message:
            error.hint = "Cast it first, such as array.astype(numpy.float32) for FP32; `metadata` tells the datatypes."
        raise
    return tensors.decode(reply.headers, reply.body)


def trace(request_id: str) -> Flow[Trace]:
    """Where the time of a traced request went. Needs the scope `read`. Raises NotFound when it was not traced, or is
    not remembered any more."""
    return get(Trace, f"/v2/traces/{segment(request_id)}")


def traces() -> Flow[list[Trace]]:
    """The tenant's last traced requests, the newest first. Needs the scope `read`."""
    return get_list(Trace, "/v2/traces")


def _served_path(model: str, version: int | None) -> str:
    return f"/v2/models/{segment(model)}" + ("" if version is None else f"/versions/{version}")

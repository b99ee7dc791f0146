"""What a client can do about policies, windows and the mesh. Flows, as those of `operations.py`."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lepton.errors import Invalid, NotFound
from lepton.flow import Ask, Flow, ask, checked, get, get_list, parsed, segment, work
from lepton.policies import Policy
from lepton.rollouts import MeshView, NewMesh, Policies, StoredPolicy, WindowPoint

_FILES = (".yaml", ".yml", ".json")


# --- policies ---------------------------------------------------------------------------------------------------------


def policies() -> Flow[Policies]:
    """The platform's presets by name, and the JSON schema of a policy."""
    return get(Policies, "/v1/policies")


def policy(model: str) -> Flow[StoredPolicy]:
    """The policy by which the model's versions come to live traffic: its own, else the default."""
    return get(StoredPolicy, _policy_path(model))


def set_policy(model: str, policy: Policy | str | Path) -> Flow[StoredPolicy]:
    """The policy (a preset's name, a YAML or JSON file, or a Policy) is the model's from its next rollout on.

    Raises NotFound, Invalid naming the field that is wrong.
    """
    chosen = yield from preset_or_file(policy)
    body = chosen.model_dump_json().encode()
    headers = {"content-type": "application/json"}
    request = Ask(method="PUT", path=_policy_path(model), headers=headers, body=body, repeatable=True)
    return parsed(StoredPolicy, (yield from ask(request)))


def unset_policy(model: str) -> Flow[None]:
    """The model has no policy of its own any more. Raises NotFound."""
    yield from ask(Ask(method="DELETE", path=_policy_path(model), repeatable=True))


def has_policy(model: str) -> Flow[bool]:
    """Whether somebody stored a policy for the model."""
    try:
        stored = yield from policy(model)
    except NotFound:  # rollout has not heard of the model yet.
        return False
    return stored.at is not None  # Its source may be a person of any name.


def preset_or_file(policy: Policy | str | Path) -> Flow[Policy]:
    """The policy itself, wherever it is. Raises NotFound for an unknown preset, Invalid, OSError."""
    chosen = yield from work(lambda: read_policy(policy))
    return chosen if isinstance(chosen, Policy) else (yield from _preset(chosen))


def known_policy(policy: Policy | str | Path | None) -> Flow[Policy | str | None]:
    """As `preset_or_file`, but a preset's name stays a name once it is known to be one."""
    if policy is None:
        return None
    chosen = yield from work(lambda: read_policy(policy))
    if isinstance(chosen, str):
        yield from _preset(chosen)
    return chosen


def _preset(name: str) -> Flow[Policy]:
    presets = (yield from policies()).presets
    if name not in presets:
        hint = f"The presets are {', '.join(presets)}; a file's name ends in {', '.join(_FILES)}."
        raise NotFound(f"There is no policy {name!r}.", hint=hint)
    return presets[name]


def read_policy(policy: Policy | str | Path) -> Policy | str:
    """The policy, or the name of a preset. Raises Invalid naming each wrong field of a file, with its line; OSError."""
    if isinstance(policy, Policy) or not _is_file(policy):
        return policy if isinstance(policy, Policy) else str(policy)
    from lepton.documents import read_documents  # YAML is loaded only by who has a file.

    read = read_documents(Path(policy))
    if len(read) != 1:
        raise Invalid(f"{policy} has {len(read) or 'no'} documents, expected one policy.")
    return read[0].parsed(Policy, "policy")


def _is_file(policy: str | Path) -> bool:
    return isinstance(policy, Path) or policy.endswith(_FILES) or "/" in policy or Path(policy).is_file()


def _policy_path(model: str) -> str:
    return f"/v1/policies/{segment(model)}"


# --- windows ----------------------------------------------------------------------------------------------------------


def windows(
    model: str,
    *,
    version: int | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    resolution: str = "auto",
) -> Flow[list[WindowPoint]]:
    """The model's live traffic by version, in seconds (`1s`, kept for an hour) or minutes (`1m`, kept for 30 days)."""
    wanted = {"model": model, "version": version, "since": since, "until": until, "resolution": resolution}
    query = {
        name: value.isoformat() if isinstance(value, datetime) else str(value)
        for name, value in wanted.items()
        if value is not None
    }
    return get_list(WindowPoint, "/v1/windows", query)


# --- the mesh ---------------------------------------------------------------------------------------------------------


def mesh(model: str) -> Flow[MeshView]:
    """The model's live VirtualService and DestinationRule, and who holds the wheel. Raises NotFound."""
    return get(MeshView, _mesh_path(model))


def apply_mesh(model: str, virtual_service: Mapping[str, Any], *, reason: str | None = None) -> Flow[MeshView]:
    """The model's traffic goes as an Istio VirtualService of the caller's own says, until `release_mesh`.

    Raises Invalid naming the field that is wrong, upon which nothing has changed; NotFound, Conflict.
    """
    wanted = checked(NewMesh, virtual_service=dict(virtual_service), reason=reason)
    body, headers = wanted.model_dump_json().encode(), {"content-type": "application/json"}
    request = Ask(method="PUT", path=_mesh_path(model), headers=headers, body=body, repeatable=True)
    return parsed(MeshView, (yield from ask(request)))


def release_mesh(model: str) -> Flow[MeshView]:
    """The model's traffic is rollout's again. Raises NotFound, Conflict when nobody had taken it."""
    reply = yield from ask(Ask(method="DELETE", path=_mesh_path(model)))
    return parsed(MeshView, reply)


def _mesh_path(model: str) -> str:
    return f"/v1/mesh/{segment(model)}"

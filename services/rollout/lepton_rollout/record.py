"""What a model's serving record becomes when its traffic moves, and the weights that make its split. Pure."""

from lepton.policies import Policy
from lepton_common.errors import Conflict, Invalid, NotFound
from lepton_common.records import Assigned, Cache, Hand, Limits, Serving, Shadow, Share, Sticky, VersionMatch
from lepton_common.types import ModelRef

from lepton_rollout.policy import Kind, Stage

TOTAL_WEIGHT = 10_000


def unserved(model: ModelRef) -> Serving:
    """The record of a model before anything of it is served."""
    return Serving(tenant=model.tenant, model=model.model, generation=0)


def warmed(serving: Serving, assigned: Assigned) -> Serving:
    """The pool's workers hold the version; its share of traffic is what it was.

    A version that another pool holds as well is held by both from now on: see `moved`.
    """
    if assigned in serving.versions:
        return serving
    same = (assigned.version, assigned.pool)
    others = tuple(each for each in serving.versions if (each.version, each.pool) != same)
    # The mesh leads to a version's last place, so where it takes traffic it goes on doing so.
    if any(each.version == assigned.version for each in others):
        return _next(serving, versions=(assigned, *others))
    return _next(serving, versions=(*others, assigned))


def moved(serving: Serving, assigned: Assigned) -> Serving:
    """Of the pools that hold the version, only this one goes on."""
    if [each for each in serving.versions if each.version == assigned.version] == [assigned]:
        return serving
    others = tuple(each for each in serving.versions if each.version != assigned.version)
    return _next(serving, versions=(*others, assigned))


def staged(serving: Serving, version: int, stage: Stage, policy: Policy, salt: str) -> Serving:
    """The version has what the stage gives it of the stable's traffic: copies, a share, what matches, or all.

    The stable version comes first in the split, so that sticky users only ever go over to a version that grows. `salt`
    spreads them anew for every rollout.
    """
    split = [Share(version=version, percent=stage.percent)] if stage.percent else []
    if serving.stable is not None and stage.percent < 100:
        split.insert(0, Share(version=serving.stable, percent=100 - stage.percent))
    match = policy.match if stage.kind is Kind.MATCH else []
    return _routed(
        serving,
        split=tuple(split),
        shadow=Shadow(version=version, percent=policy.shadow.percent) if stage.kind is Kind.SHADOW else None,
        sticky=Sticky(by=policy.sticky, salt=salt) if policy.sticky and 0 < stage.percent < 100 else None,
        matches=tuple(VersionMatch(header=each.header, value=each.value, version=version) for each in match),
        forwarded=tuple(sorted({each.header for each in match})),
    )


def promoted(serving: Serving, version: int) -> Serving:
    """The version takes all traffic and is the stable one; what was stable is `previous` and stays warm.

    What was `previous` until now is let go. Raises Conflict when no pool holds the version.
    """
    if serving.assigned(version) is None:
        raise Conflict(f"version {version} of model {serving.model!r} is not assigned to any pool")
    serving = _routed(serving, split=(Share(version=version, percent=100),))
    if serving.stable == version:
        return serving
    let_go = {serving.previous} - {version, serving.stable}
    versions = tuple(each for each in serving.versions if each.version not in let_go)
    return _next(serving, stable=version, previous=serving.stable, versions=versions)


def settled(serving: Serving) -> Serving:
    """All traffic is on the stable version; without one there is none."""
    split = (Share(version=serving.stable, percent=100),) if serving.stable is not None else ()
    return _routed(serving, split=split)


def taken(serving: Serving, hand: Hand, split: tuple[Share, ...], forwarded: tuple[str, ...]) -> Serving:
    """A person's routes move the traffic; `split` is what their last rule comes to."""
    return _routed(serving, split=split, hand=hand, forwarded=forwarded)


def released(serving: Serving) -> Serving:
    """Nobody's own routes move the traffic any more; its shares are what they came to."""
    return _routed(serving, split=serving.split)


def abandoned(serving: Serving, version: int) -> Serving:
    """A version that has no traffic is no longer held; one that serves, or that one can return to, stays."""
    if version in {serving.stable, serving.previous} | _live(serving):
        return serving
    return _next(serving, versions=_without(serving, version))


def cooled(serving: Serving, version: int) -> Serving:
    """No worker holds the warm version. Raises NotFound when none does, Conflict while it takes traffic."""
    if serving.assigned(version) is None:
        raise NotFound(f"version {version} of model {serving.model!r} is not loaded")
    if version in _live(serving):
        raise Conflict(f"version {version} of model {serving.model!r} takes live traffic: deploy another version first")
    if version == serving.stable and serving.split:
        raise Conflict(f"version {version} of model {serving.model!r} is where its traffic returns to")
    return _next(serving, versions=_without(serving, version))


def unrouted(serving: Serving) -> Serving:
    """The model takes no traffic. Its versions stay on the workers while the mesh may still lead there."""
    return _routed(serving, split=())


def withdrawn(serving: Serving) -> Serving:
    """No worker holds any version. `stable` and `previous` are remembered, so that a load restores the model."""
    return _next(_routed(serving, split=()), versions=())


def caching(serving: Serving, cache: Cache | None) -> Serving:
    """The gateways keep the model's answers so, or not at all. Raises NotFound for a model never served."""
    if serving.generation == 0:
        raise NotFound(f"model {serving.model!r} is not served")
    return _next(serving, cache=cache)


def limited(serving: Serving, limits: Limits) -> Serving:
    """The model has these limits. Raises NotFound for one never served, Invalid for a burst without a rate."""
    if serving.generation == 0:
        raise NotFound(f"model {serving.model!r} is not served")
    if limits.burst is not None and limits.rate_per_s is None:
        raise Invalid("burst says how far requests may run ahead of a rate: set rate_per_s too")
    return _next(serving, limits=limits)


def returned(serving: Serving) -> int:
    """The version a rollback goes to. Raises NotFound for a model never served, Conflict without a previous one."""
    if serving.generation == 0:
        raise NotFound(f"model {serving.model!r} is not served")
    if serving.previous is None:
        raise Conflict(f"model {serving.model!r} has no previous version to go back to")
    return serving.previous


def _live(serving: Serving) -> set[int]:
    """The versions that callers, or copies of their requests, may reach without asking for them."""
    split = {share.version for share in serving.split if share.percent > 0}
    shadow = {serving.shadow.version} if serving.shadow else set()
    matched = {each.version for each in serving.matches}
    return split | shadow | matched | set(serving.hand.versions if serving.hand else ())


def _routed(serving: Serving, **routes: object) -> Serving:
    """The record with these routes and no others."""
    none = {"shadow": None, "sticky": None, "matches": (), "hand": None, "forwarded": ()}
    return _next(serving, **{**none, **routes})


def _without(serving: Serving, version: int) -> tuple[Assigned, ...]:
    return tuple(each for each in serving.versions if each.version != version)


def _next(serving: Serving, **changes: object) -> Serving:
    """The changed record under the next generation; the record itself when nothing changed."""
    after = serving.model_copy(update=changes)
    return serving if after == serving else after.model_copy(update={"generation": serving.generation + 1})


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(split: tuple[Share, ...]) -> dict[int, int]:
    """Each version's weight in ten-thousandths by largest remainder, in the split's order, leaving out those of none.

    They total 10 000, or there are none. A share above zero never vanishes: it gets at least 1.
    """
    shares = {share.version: share.percent for share in split if share.percent > 0}
    total = sum(shares.values())
    exact = {version: percent * TOTAL_WEIGHT / total for version, percent in shares.items()}
    floors = {version: max(1, int(weight)) for version, weight in exact.items()}
    by_remainder = sorted(exact, key=lambda version: floors[version] - exact[version])
    missing = TOTAL_WEIGHT - sum(floors.values()) if floors else 0
    for version in by_remainder[: max(0, missing)]:
        floors[version] += 1
    if missing < 0:
        floors[max(floors, key=lambda version: floors[version])] += missing
    return floors

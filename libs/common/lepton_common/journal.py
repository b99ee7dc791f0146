"""What a service notes of its callers between two reports: when each key was last used, and who was refused.

Notes are bounded: a flood of refusals costs a count, and whoever finds no room is counted without a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address

from lepton_common.errors import Denied, status_of
from lepton_common.events import AccessRefused, KeysUsed

# Different refusals of one report; what comes beyond is told together.
_MAX_REFUSALS = 200
_OTHERS = "others"
_KEYS_AN_EVENT = 1000
# Who calls without a known key concerns whoever runs the platform.
_NOBODYS_TENANT = "default"


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What is told together."""

    tenant: str
    key: str
    peer: str
    status: int
    reason: str


class Journal:
    """A service's notes. `used` is all that the hot path writes: the id of a key, and when it was."""

    def __init__(self) -> None:
        self.used: dict[str, datetime] = {}
        self._refused: dict[_Refusal, tuple[str, int]] = {}

    def refused(self, error: Denied, peer: str, what: str) -> None:
        """Somebody was refused. `what` they asked for is a method and a path, of which the first is told."""
        refusal = _Refusal(error.tenant or _NOBODYS_TENANT, error.key_id, peer, status_of(error), error.message[:200])
        if refusal not in self._refused and len(self._refused) >= _MAX_REFUSALS:
            refusal, what = _Refusal(_NOBODYS_TENANT, "", _OTHERS, refusal.status, _OTHERS), ""
        first, count = self._refused.get(refusal, (what[:200], 0))
        self._refused[refusal] = first, count + 1

    def take_refusals(self, service: str) -> list[AccessRefused]:
        """What was refused since the last time, as `service` tells it."""
        refused, self._refused = self._refused, {}
        return [
            AccessRefused(
                tenant=each.tenant,
                service=service,
                key=each.key,
                peer=each.peer,
                status=each.status,
                reason=each.reason,
                what=what,
                count=count,
            )
            for each, (what, count) in refused.items()
        ]

    def take_uses(self, tenants: Mapping[str, str]) -> list[KeysUsed]:
        """When keys were used since the last time. `tenants` are those of the keys; of others nothing is told."""
        used, self.used = self.used, {}
        by_tenant: dict[str, list[tuple[str, datetime]]] = {}
        for key, at in used.items():
            if key in tenants:
                by_tenant.setdefault(tenants[key], []).append((key, at))
        return [
            KeysUsed(tenant=tenant, keys=dict(uses[start : start + _KEYS_AN_EVENT]))
            for tenant, uses in by_tenant.items()
            for start in range(0, len(uses), _KEYS_AN_EVENT)
        ]


def origin(peer: str, forwarded: bytes | None) -> str:
    """From where somebody calls: the peer, and before it whom the nearest proxy, if it is one, says it speaks for.

    A peer can claim what it likes, so what is claimed never stands there alone.
    """
    if not forwarded:
        return peer
    claimed = forwarded.decode("latin-1").rsplit(",", 1)[-1].strip()
    try:
        return f"{ip_address(claimed)} by {peer}"
    except ValueError:
        return peer

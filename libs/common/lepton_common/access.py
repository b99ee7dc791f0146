"""What every service does about its callers: it knows the keys, verifies tokens, and tells of uses and refusals.

Nothing here is on the path of a request: that notes in memory, and once a second, or every half a minute, it is told.
"""

from collections.abc import Awaitable, Callable, Sequence

from lepton_common.auth import Keys
from lepton_common.etcd import EtcdClient
from lepton_common.events import Event
from lepton_common.service import Service

Tell = Callable[[Sequence[Event]], Awaitable[None]]

REFUSALS_EVERY_S = 1.0
USES_EVERY_S = 30.0


def guard(service: Service, etcd: EtcdClient, tell: Tell) -> Keys:
    """The table of who may call. The service keeps it; it is to be `prepare`d with `keys.mirror.synced`.

    `tell` brings events on their way. What it cannot take is lost: who may do what is never kept waiting for it.
    """
    keys = _keys(service, etcd)
    journal, mirror = keys.journal, keys.mirror

    async def tell_refusals() -> None:
        if refused := journal.take_refusals(service.name):
            await tell(refused)

    async def tell_uses() -> None:
        if used := journal.take_uses({record.id: record.tenant for record in mirror.items.values()}):
            await tell(used)

    service.background(mirror.run)
    service.every(REFUSALS_EVERY_S, tell_refusals)
    service.every(USES_EVERY_S, tell_uses)
    return keys


def _keys(service: Service, etcd: EtcdClient) -> Keys:
    oidc = service.settings.oidc
    if oidc is None:
        return Keys(etcd)
    from lepton_common.oidc import IssuerTokens  # It loads a library for cryptography, which most do without.

    tokens = IssuerTokens(oidc, lambda: keys.forget())
    keys = Keys(etcd, tokens)
    service.background(tokens.run)
    service.on_close(tokens.close)
    return keys

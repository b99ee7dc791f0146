"""What a service needs of the event bus. `kafka.py` implements it; who hears no events never loads Kafka's client."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from lepton_common.envelope import Message
from lepton_common.events import Event
from lepton_common.foreign import Message as ForeignMessage

E = TypeVar("E", bound=Event)


class Bus(Protocol):
    """Facts to all who subscribed, at least once, one subject's in order."""

    def subscribe(self, kind: type[E], handler: Callable[[E], Awaitable[None]]) -> None:
        """`handler` gets every event of that kind, from the oldest kept. To be called before `run`."""

    def hear(self, topic: str, handler: Callable[[ForeignMessage], Awaitable[None]]) -> None:
        """`handler` gets every message that producers who know nothing of Lepton write to the topic. Before `run`."""

    async def run(self) -> None:
        """Delivers for ever. Cancelling it is safe at any instant: what was not handled is delivered again."""

    async def send(self, messages: Sequence[Message]) -> None:
        """All messages are stored by the broker, those of one key in order. Raises Unavailable when some may not be."""

    async def close(self) -> None:
        """No connection is left open."""

"""Every Kafka topic, on one page. Partitions are fixed at birth: a keyed topic that grows loses its order."""

from dataclasses import dataclass

PARTITIONS = 6


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it is made: where it is missing, `kafka_client.ensure_topics` makes it so."""

    name: str
    retention_days: int
    partitions: int = PARTITIONS
    max_message_bytes: int = 1024 * 1024

    @property
    def config(self) -> dict[str, str]:
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_days * 24 * 3600 * 1000),
            "max.message.bytes": str(self.max_message_bytes),
        }


def dead_letters(topic: str) -> str:
    """The topic of what could not be handled of `topic`."""
    return f"{topic}.dlq"


_EVENTS = (
    Topic("lepton.models", retention_days=30),
    Topic("lepton.rollouts", retention_days=30),
    Topic("lepton.audit", retention_days=90),
    Topic("lepton.windows", retention_days=2),
    Topic("lepton.telemetry", retention_days=1, partitions=12),
)

# Asked for and answered over Kafka: the one thing on topics that is no fact.
REQUESTS = Topic("lepton.inference.requests", retention_days=7, partitions=12, max_message_bytes=8 * 1024 * 1024)
RESULTS = Topic("lepton.inference.results", retention_days=7, partitions=12, max_message_bytes=8 * 1024 * 1024)

# What producers who know nothing of Lepton write to: see `foreign.py`.
INGEST = Topic("lepton.ingest", retention_days=30)
LABELS = Topic("lepton.labels", retention_days=30)
FOREIGN = (REQUESTS, INGEST, LABELS)

# A dead letter is the whole message and the reason, so it may be larger than any message.
TOPICS = (
    *_EVENTS,
    *FOREIGN,
    RESULTS,
    *(
        Topic(dead_letters(each.name), retention_days=30, max_message_bytes=2 * each.max_message_bytes)
        for each in (*_EVENTS, *FOREIGN)
    ),
)

"""A dead letter: the message as it came, and why it could not be handled."""

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from lepton_common.foreign import without_secrets

PREFIX = "lepton-dlq-"
_MAX_ERROR_BYTES = 1024
_KEYS = re.compile(rb"lp_[A-Za-z0-9_-]{20,}|eyJ[\w-]+\.[\w-]+\.[\w-]+")
_SECRETS = re.compile(
    r"lp_[A-Za-z0-9_-]+|eyJ[\w-]+\.[\w-]+\.[\w-]+|(?<=://)[^/@\s]+(?=@)|(?i:(?<=bearer )|(?<=password=))\S+"
)


class Reason(StrEnum):
    UNDECODABLE = "undecodable"  # no event can be read from it
    FORBIDDEN = "forbidden"  # its key is missing, unknown, or does not allow what it asks for
    FAILED = "failed"  # the handler says that trying again is no use
    EXHAUSTED = "exhausted"  # tried again and again while others succeeded


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message was given up."""

    reason: Reason
    error: BaseException
    attempts: int
    first_at: datetime


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a message was read, and by whom."""

    topic: str
    partition: int
    offset: int
    consumer: str


def headers(original: Sequence[tuple[str, bytes]], origin: Origin, failure: Failure) -> list[tuple[str, bytes]]:
    """The message's own headers but secrets, then the story of its failure: after a replay, of the latest only."""
    story = {
        "reason": failure.reason.value,
        "error": redacted(failure.error),
        "attempts": str(failure.attempts),
        "first-failure": failure.first_at.astimezone(UTC).isoformat(),
        "topic": origin.topic,
        "partition": str(origin.partition),
        "offset": str(origin.offset),
        "consumer": origin.consumer,
    }
    secret = {name.lower() for name, _ in original} - {name.lower() for name, _ in without_secrets(original)}
    if secret:
        story["without"] = ", ".join(sorted(secret))
    kept = [
        (name, value and without_keys(value))
        for name, value in without_secrets(original)
        if not name.startswith(PREFIX)
    ]
    return [*kept, *((PREFIX + name, value.encode()) for name, value in story.items())]


def without_keys(value: bytes) -> bytes:
    """The bytes as they came, but for API keys that somebody wrote in the wrong place."""
    return _KEYS.sub(b"[redacted]", value)


def redacted(error: BaseException) -> str:
    """The end of the error's traceback, at most 1 KiB, without keys and passwords."""
    told = "".join(traceback.format_exception(error))
    cleaned = _SECRETS.sub("[redacted]", told).encode(errors="replace")
    return cleaned[-_MAX_ERROR_BYTES:].decode(errors="ignore").strip()

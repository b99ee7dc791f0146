"""What a dead letter tells, and what it must not."""

from datetime import UTC, datetime

import pytest
from lepton_common.dead_letters import Failure, Origin, Reason, headers, redacted

ORIGIN = Origin("lepton.models", 3, 42, "registry")


def failure(error: BaseException) -> Failure:
    return Failure(Reason.FAILED, error, 1, datetime(2026, 11, 23, tzinfo=UTC))


def test_the_message_keeps_its_headers_and_gets_its_story() -> None:
    told = headers([("ce_id", b"1"), ("ce_id", b"2")], ORIGIN, failure(ValueError("why")))
    assert told[:2] == [("ce_id", b"1"), ("ce_id", b"2")]
    assert dict(told[2:]) == {
        "lepton-dlq-reason": b"failed",
        "lepton-dlq-error": b"ValueError: why",
        "lepton-dlq-attempts": b"1",
        "lepton-dlq-first-failure": b"2026-11-23T00:00:00+00:00",
        "lepton-dlq-topic": b"lepton.models",
        "lepton-dlq-partition": b"3",
        "lepton-dlq-offset": b"42",
        "lepton-dlq-consumer": b"registry",
    }


def test_a_second_failure_replaces_the_story_of_the_first() -> None:
    first = headers([("ce_id", b"1")], ORIGIN, failure(ValueError("first")))
    second = headers(first, ORIGIN, failure(ValueError("second")))
    assert len(second) == len(first)
    assert dict(second)["lepton-dlq-error"] == b"ValueError: second"


def test_the_key_a_message_came_with_is_not_kept_but_that_it_had_one() -> None:
    told = headers([("Authorization", b"Bearer SECRET"), ("ce_id", b"1")], ORIGIN, failure(ValueError("why")))
    assert dict(told)["lepton-dlq-without"] == b"authorization"
    assert b"SECRET" not in b"".join(value for _, value in told)


@pytest.mark.parametrize(
    "text",
    [
        "key lp_SECRETsecretSECRET_-9 refused",
        "Authorization: Bearer SECRET",
        "postgresql://user:SECRET@host/db",
        "password=SECRET",
    ],
)
def test_secrets_are_not_told(text: str) -> None:
    told = redacted(ValueError(text))
    assert "SECRET" not in told
    assert "[redacted]" in told


def test_the_end_of_a_long_error_is_kept() -> None:
    told = redacted(ValueError("ä" * 5000 + "the cause"))
    assert len(told.encode()) <= 1024
    assert told.endswith("the cause")

"""Uploads to a platform that breaks on purpose."""

from pathlib import Path

import pytest
from lepton import AsyncClient, Client, Progress
from lepton.errors import (
    Invalid,
    Unreachable,
)
from lepton.flow import Ask, Flow, Pause, Reply, Work
from lepton.upload import upload

from libs.sdk.tests.conftest import Platform
from libs.sdk.tests.traffic import Answer


def test_an_upload_stores_the_file_and_reports_every_byte(client: Client, platform: Platform, model: Path) -> None:
    seen: list[Progress] = []
    sha256 = client.upload(model, progress=seen.append)
    assert platform.artifacts[sha256] == model.read_bytes()
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert seen[-1] == Progress("upload", model.stat().st_size, model.stat().st_size)


def test_bytes_that_are_stored_already_are_not_sent(client: Client, platform: Platform, model: Path) -> None:
    assert client.upload(model) == client.upload(model.read_bytes())
    assert platform.counted("PUT") == 1


def test_a_broken_upload_resumes_where_it_broke(client: Client, platform: Platform, model: Path) -> None:
    platform.broken_uploads = [500_000, 100_000, 0]
    sha256 = client.upload(model)
    assert platform.artifacts[sha256] == model.read_bytes()
    assert platform.counted("PUT") == 4


async def test_a_broken_upload_resumes_in_the_async_client_too(platform: Platform, model: Path) -> None:
    platform.broken_uploads = [1_100_000]
    async with AsyncClient() as client:
        sha256 = await client.upload(model)
    assert list(platform.artifacts) == [sha256]


def test_an_upload_whose_last_answer_was_lost_is_finished_without_sending_it_again(
    client: Client, platform: Platform, model: Path
) -> None:
    platform.broken_uploads = [model.stat().st_size]
    sha256 = client.upload(model)
    assert platform.artifacts[sha256] == model.read_bytes()


def test_an_upload_that_gets_no_further_is_given_up_after_growing_pauses() -> None:
    pauses: list[float] = []

    def play(flow: Flow[str]) -> None:
        step = next(flow)
        while True:
            match step:
                case Work():
                    step = flow.send(step.run())
                case Ask(method="HEAD"):
                    step = flow.send(Reply(404, {"upload-offset": "2"}, b""))
                case Ask():
                    step = flow.throw(Unreachable("it broke"))
                case Pause():
                    pauses.append(step.seconds)
                    step = flow.send(0.0)

    with pytest.raises(Unreachable, match="it broke"):
        play(upload(b"model"))
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]


def test_an_upload_outlives_a_platform_that_is_away_for_a_while(
    client: Client, platform: Platform, model: Path
) -> None:
    platform.broken_uploads = [500_000]
    # The first HEAD is answered; after the break so many calls find the platform away that one call gives up.
    platform.answers = [Answer(404), *[Answer(503)] * 5]
    sha256 = client.upload(model)
    assert platform.artifacts[sha256] == model.read_bytes()


def test_an_empty_model_is_refused_before_anything_is_sent(client: Client, platform: Platform) -> None:
    with pytest.raises(Invalid, match="empty"):
        client.upload(b"")
    assert not platform.requests

import asyncio
import os
import sys
from pathlib import Path

import pytest
from lepton_common.errors import Invalid
from lepton_worker.domain import Verdict
from lepton_worker.trial import Trial

from .conftest import OnnxFile


def child(code: str) -> tuple[str, ...]:
    """The command of a child that runs this code; its arguments are those of the trial."""
    return (sys.executable, "-c", f"import os, sys, time; {code}")


async def test_a_model_is_examined_in_a_child_process(onnx_file: OnnxFile) -> None:
    assert await Trial(1, 60).verdict(onnx_file()) == Verdict(True, "", 8)


async def test_a_file_that_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.artifact"
    path.write_bytes(b"not onnx")
    with pytest.raises(Invalid, match="onnxruntime cannot load the model"):
        await Trial(1, 60).verdict(path)


async def test_a_verdict_is_remembered_beside_its_artifact(onnx_file: OnnxFile) -> None:
    path = onnx_file()
    verdict = await Trial(1, 60).verdict(path)
    assert await Trial(1, 60, child("os.abort()")).verdict(path) == verdict


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"runtime": "onnxruntime 0.1", "batchable": true}'])
async def test_a_damaged_or_older_verdict_is_made_anew(note: str, onnx_file: OnnxFile) -> None:
    path = onnx_file()
    path.with_suffix(".verdict").write_text(note)
    found = child("""print('{"batchable": false, "reason": "tried again", "free_size": 1}')""")
    assert (await Trial(1, 60, found).verdict(path)).reason == "tried again"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.abort()", "the model crashed the runtime while it loaded: SIGABRT"),
        ("os.kill(os.getpid(), 11)", "the model crashed the runtime while it loaded: SIGSEGV"),
        ("sys.exit(3)", "the model ended the runtime while it loaded: exit status 3"),
        ("print('hello')", "the model ended the runtime while it loaded: exit status 0"),
    ],
)
async def test_a_model_that_crashes_is_refused_and_tried_again_next_time(
    code: str, message: str, onnx_file: OnnxFile
) -> None:
    path = onnx_file()
    with pytest.raises(Invalid, match=message):
        await Trial(1, 60, child(code)).verdict(path)
    assert (await Trial(1, 60).verdict(path)).batchable


async def test_a_child_that_crashed_only_once_is_forgiven(onnx_file: OnnxFile) -> None:
    path = onnx_file()
    once = child(
        "tried = sys.argv[1] + '.tried'; first = not os.path.exists(tried); open(tried, 'w').close();"
        """first and os.abort(); print('{"batchable": false, "reason": "", "free_size": 1}')"""
    )
    assert await Trial(1, 60, once).verdict(path) == Verdict(False, "", 1)


async def test_a_trial_that_is_no_longer_wanted_ends_its_process(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    hang = child("open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)")
    trial = asyncio.create_task(Trial(1, 600, hang).verdict(path))
    pid = int(await asyncio.to_thread(path.read_text))
    trial.cancel()
    await asyncio.wait([trial])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_model_that_hangs_is_given_up_and_its_process_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.artifact"
    hang = child("open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(Invalid, match=r"the model did not load within 0\.5 s"):
        await Trial(1, 0.5, hang).verdict(path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)

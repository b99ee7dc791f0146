"""The pages for people: a model's, whose snippets are run as they stand, and that of the API."""

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from html import unescape

import httpx
import numpy as np
import onnx
import pytest
from confluent_kafka import Consumer

from . import onnx_models
from .local_platform import Platform

RESULTS = "lepton.inference.results"
HOSTILE = "</script><script>alert(1)</script>'\" \\ é"


def page(http: httpx.Client, path: str) -> str:
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    # Whatever runs or paints in the page is in it, and the browser lets nothing else.
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    for element in ("script", "style"):
        (text,) = re.findall(f"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)
    return answer.text


def snippets(text: str) -> dict[str, str]:
    found = re.findall(r"<h3>(.*?)</h3><pre>(.*?)</pre>", text, re.DOTALL)
    return {name: unescape(code) for name, code in found}


def run_python(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(code, {})
    return capsys.readouterr().out


@pytest.mark.parametrize("language", ["Python", "tritonclient", "gRPC"])
def test_python_snippets_run_as_they_stand(
    http: httpx.Client, every_datatype: str, language: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_python(snippets(page(http, f"/v2/models/{every_datatype}/docs"))[language], capsys).strip()


@pytest.mark.parametrize("language", ["Python", "tritonclient", "gRPC"])
def test_with_a_key_they_take_it_from_the_environment(
    platform: Platform,
    mlp: str,
    language: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with platform.http() as operator:
        text = page(operator, f"/v2/models/{mlp}/versions/1/docs")
    assert platform.key not in text
    monkeypatch.setenv("LEPTON_API_KEY", platform.key)
    assert run_python(snippets(text)[language], capsys).strip()


def test_curl_snippets_run_as_they_stand(http: httpx.Client, mlp: str, every_datatype: str, bfloat16: str) -> None:
    for model in (mlp, every_datatype, bfloat16):
        command = snippets(page(http, f"/v2/models/{model}/docs"))["curl"]
        ended = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
        assert json.loads(ended.stdout)["model_name"] == model


def test_kafka_snippet_gets_its_answer(
    platform: Platform, mlp: str, make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch, http: httpx.Client
) -> None:
    code = snippets(page(http, f"/v2/models/{mlp}/docs"))["Kafka"].replace("order-7", "from-the-page")
    monkeypatch.setenv("KAFKA", platform.layout.kafka)
    monkeypatch.setenv("KEY", make_key("infer"))
    exec(code, {})
    consumer = Consumer(
        {"bootstrap.servers": platform.layout.kafka, "group.id": "docs", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([RESULTS])
    try:
        while (message := consumer.poll(30)) is not None:
            if dict(message.headers() or []).get("ce_correlationid") == b"from-the-page":
                assert json.loads(message.value() or b"")["model_name"] == mlp
                return
    finally:
        consumer.close()
    pytest.fail("no answer came")


def test_names_that_a_model_chose_stay_text(http: httpx.Client, platform: Platform, name: str) -> None:
    model = onnx_models.echo()
    for port in (*model.graph.input, *model.graph.output):
        port.name += HOSTILE
    model.graph.node[0].input[0] += HOSTILE
    model.graph.node[0].output[0] += HOSTILE
    onnx.checker.check_model(model)
    platform.serve(name, model)
    text = page(http, f"/v2/models/{name}/docs")
    assert "<script>alert" not in text
    (about,) = re.findall(r'<script type="application/json" id="about">(.*?)</script>', text)
    tensor = json.loads(about)["inputs"][0]
    assert tensor["name"] == model.graph.input[0].name
    code = snippets(text)["tritonclient"].replace("np.zeros", "np.ones")
    told: list[np.ndarray] = []
    exec(code, {"print": told.append})
    np.testing.assert_array_equal(told[0], np.ones(tensor["example"], np.float32))


def test_page_of_everything_lists_the_callers_models(
    platform: Platform, http: httpx.Client, mlp: str, make_key: Callable[..., str]
) -> None:
    assert f'href="/v2/models/{mlp}/docs"' in page(http, "/v2/docs")
    with platform.http(make_key("infer", tenant="docs")) as foreign:
        assert "None is served yet" in page(foreign, "/v2/docs")
        assert foreign.get(f"/v2/models/{mlp}/docs").status_code == 404
    assert http.get(f"/v2/models/{mlp}/versions/9/docs").status_code == 404

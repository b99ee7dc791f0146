from pathlib import Path

import pytest
from lepton_rollout.settings import Settings


def test_the_mesh_is_envoy_unless_said_otherwise_and_needs_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch)

    with pytest.raises(SystemExit) as ended:
        Settings.read()

    assert [line.partition(":")[0] for line in str(ended.value).splitlines()] == [
        "LEPTON_MESH_DIR is not set",
        "LEPTON_ENVOY_ADMIN is not set",
    ]


def test_istio_needs_nothing_but_a_pods_service_account(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch)
    monkeypatch.setenv("LEPTON_MESH", "istio")

    settings = Settings.read()

    assert settings.kubernetes_url == "https://kubernetes.default.svc"
    assert settings.kubernetes_token == Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESH", "MESH_DIR", "ENVOY_ADMIN", "KUBERNETES_URL", "KUBERNETES_TOKEN"):
        monkeypatch.delenv(f"LEPTON_{name}", raising=False)

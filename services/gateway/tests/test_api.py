"""What callers of the gateway see."""

from .lab import Lab, error_of


async def test_an_infer_request_goes_through_the_mesh_unparsed(lab: Lab) -> None:
    response = await lab.client.post("/v2/models/m/infer", content=b"\x00not json", headers={"x-lepton-version": "9"})
    assert response.status_code == 200
    assert response.json()["model_name"] == "m"
    assert response.headers["x-lepton-version"] == "1"
    request = lab.mesh.requests[-1]
    assert request.body == b"\x00not json"
    assert request.target == b"/v2/models/m/infer"
    assert request.headers[b"host"] == b"m.acme.models.lepton"
    assert b"x-lepton-version" not in request.headers
    assert b"authorization" not in request.headers


async def test_an_unknown_model_is_404(lab: Lab) -> None:
    response = await lab.client.post("/v2/models/nobody/infer", content=b"{}")
    assert response.status_code == 404
    assert "nobody" in error_of(response)

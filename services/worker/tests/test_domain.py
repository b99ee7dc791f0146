import pytest
from lepton_common.errors import NotFound
from lepton_common.records import Assigned, Serving
from lepton_common.signature import Signature, TensorSpec
from lepton_common.types import ModelRef, VersionRef
from lepton_worker.domain import Target, Verb, target_of, unbatchable, wanted

LOCAL = b"127.0.0.1:8000"
DIGITS = ModelRef("default", "digits")
ACME = ModelRef("acme", "digits")


def assigned(version: int, pool: str = "cpu") -> Assigned:
    return Assigned(version=version, sha256=str(version) * 64, size_bytes=1, pool=pool)


def test_a_worker_wants_every_version_of_its_own_pool() -> None:
    records = [
        Serving(tenant="a", model="m", generation=1, versions=(assigned(1), assigned(2, "gpu"))),
        Serving(tenant="b", model="m", generation=1, versions=(assigned(1),)),
    ]
    assert set(wanted(records, "cpu")) == {VersionRef(ModelRef("a", "m"), 1), VersionRef(ModelRef("b", "m"), 1)}
    assert set(wanted(records, "gpu")) == {VersionRef(ModelRef("a", "m"), 2)}


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        (LOCAL, b"/v2/models/digits/infer", Target(DIGITS, None, Verb.INFER)),
        (LOCAL, b"/v2/models/digits", Target(DIGITS, None, Verb.METADATA)),
        (LOCAL, b"/v2/models/digits/versions/7", Target(DIGITS, 7, Verb.METADATA)),
        (LOCAL, b"/v2/models/digits/versions/7/config?x=1", Target(DIGITS, 7, Verb.CONFIG)),
        (LOCAL, b"/v2/models/di%67its/ready", Target(DIGITS, None, Verb.READY)),
        (
            b"digits.acme.models.lepton",
            b"/v2/models/digits/stats",
            Target(ACME, None, Verb.STATS),
        ),
        (
            b"Digits.Acme.models.lepton:80",
            b"/v2/models/digits/infer",
            Target(ACME, None, Verb.INFER),
        ),
        (b"a.b.c.models.lepton", b"/v2/models/digits", Target(DIGITS, None, Verb.METADATA)),
    ],
)
def test_the_path_names_model_and_version_and_the_mesh_host_the_tenant(
    host: bytes, path: bytes, expected: Target
) -> None:
    assert target_of(host, path) == expected


@pytest.mark.parametrize(
    "path", [b"/", b"/v3/models/digits/infer", b"/v2/models/digits/explode", b"/v2/models/digits/versions/x/infer",
             b"/v2/models/digits/versions/99999999999", b"/x/v2/models/digits", "/v2/models/digits/versions/²".encode()]
)  # fmt: skip
def test_any_other_path_is_not_found(path: bytes) -> None:
    with pytest.raises(NotFound):
        target_of(LOCAL, path)


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ((-1, 4), (-1,), None),
        ((1, 4), (-1,), "input 'x' has no free first dimension"),
        ((-1, 4), (), "output 'y' has no free first dimension"),
    ],
)
def test_rows_can_be_merged_only_along_a_free_first_dimension(
    inputs: tuple[int, ...], outputs: tuple[int, ...], reason: str | None
) -> None:
    signature = Signature((TensorSpec("x", "FP32", inputs),), (TensorSpec("y", "FP32", outputs),))
    assert unbatchable(signature) == reason

import orjson
import pytest
from lepton_common.errors import Invalid
from lepton_common.signature import Signature, TensorSpec

TEXT_AND_NUMBER = Signature(
    (TensorSpec("a", "INT32", (-1,)), TensorSpec("b", "BYTES", (-1,))),
    (TensorSpec("q", "FP32", (-1, 3)),),
)


def test_a_signature_survives_its_dictionary() -> None:
    assert Signature.from_dict(orjson.loads(orjson.dumps(TEXT_AND_NUMBER.to_dict()))) == TEXT_AND_NUMBER


@pytest.mark.parametrize(
    "value", [None, {}, {"inputs": [{}], "outputs": []}, {"inputs": [{"name": "x", "datatype": "F", "shape": []}]}]
)
def test_what_is_no_signature_is_refused(value: object) -> None:
    with pytest.raises(Invalid):
        Signature.from_dict(value)

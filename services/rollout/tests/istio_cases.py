"""A model in the mesh, as the tests of Istio's documents have it."""

from typing import Any

from hypothesis import settings
from lepton_common.types import ModelRef

from .stand_ins import serving

MODEL = ModelRef("acme", "digits")
HOST = "digits.acme.models.lepton"
FEWER = settings(max_examples=50)
READY = (1, 2, 3)
RECORD = serving(MODEL, 4, {1: 90, 2: 10}, 3)


def written(spec: Any) -> dict[str, Any]:
    """What says so by hand."""
    return {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "spec": spec}

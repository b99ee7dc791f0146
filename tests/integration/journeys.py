"""What every journey looks at: who answers, and what is told."""

import numpy as np
from lepton import Client
from lepton.models import TimelineEntry

from .local_platform import until
from .onnx_models import mlp_scores

X = np.random.default_rng(7).standard_normal((3, 4)).astype(np.float32)


def answers_as(client: Client, model: str, seed: int, version: int | None = None) -> str:
    """The version that answered, after checking that its answer is that of `mlp(seed)`."""
    outputs = client.infer(model, {"x": X}, version=version)
    np.testing.assert_allclose(outputs["scores"], mlp_scores(X, seed), rtol=1e-4, atol=1e-4)
    return outputs.version


def told(client: Client, model: str, count: int) -> list[TimelineEntry]:
    """The model's timeline, as soon as it has so many entries: facts travel over Kafka."""
    entries: list[TimelineEntry] = until(lambda: len(found := client.timeline(model)) >= count and found)
    return entries

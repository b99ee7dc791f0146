"""Users of a model: each reads one image after the other through the front door, and remembers what came back."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import httpx
import numpy as np
import orjson
from lepton.endpoint import Endpoint
from numpy.typing import NDArray

# They leave by themselves after so long, whatever becomes of the story.
_AT_MOST_S = 600.0
_ANSWER_S = 35.0  # Longer than the platform lets any request take.


@dataclass(frozen=True, slots=True)
class Answer:
    """What a user got. `version` is 0 when nobody says who answered, `status` 0 when nobody answered."""

    at_s: float
    version: int
    status: int
    right: bool

    @property
    def failed(self) -> bool:
        return self.status != 200


class Users:
    """`with Users(…) as users:` they come and go, `per_second` of them in all, until the block ends."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        images: NDArray[np.float32],
        labels: NDArray[np.int64],
        *,
        per_second: float = 120,
        threads: int = 8,
    ) -> None:
        self.answers: list[Answer] = []
        self._path = f"/v2/models/{model}/infer"
        self._requests = [(_body(image), int(label)) for image, label in zip(images, labels, strict=True)]
        headers = {"content-type": "application/json"}
        if endpoint.key:
            headers["authorization"] = f"Bearer {endpoint.key}"
        self._http = httpx.Client(
            base_url=endpoint.url, headers=headers, timeout=_ANSWER_S, trust_env=not endpoint.local
        )
        self._over = threading.Event()
        self._every_s = threads / per_second
        self._threads = [threading.Thread(target=self._come, args=(n, threads), daemon=True) for n in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_ANSWER_S)
        self._http.close()

    def last(self, seconds: float) -> list[Answer]:
        """The answers of the last seconds."""
        since = time.monotonic() - seconds
        # Many a second, and none are taken away: the end of the list is enough to look at.
        return [each for each in self.answers[-1000:] if each.at_s >= since]

    def _come(self, number: int, threads: int) -> None:
        start = time.monotonic()
        due, count = start + number / threads * self._every_s, number
        while not self._over.wait(max(0.0, due - time.monotonic())) and due - start < _AT_MOST_S:
            body, label = self._requests[count % len(self._requests)]
            self.answers.append(self._ask(body, label))
            count += threads
            # Users who had to wait do not come all at once afterwards.
            due = max(due + self._every_s, time.monotonic())

    def _ask(self, body: bytes, label: int) -> Answer:
        try:
            response = self._http.post(self._path, content=body)
        except httpx.HTTPError:
            return Answer(time.monotonic(), 0, 0, False)
        version = response.headers.get("x-lepton-version", "")
        right = response.status_code == 200 and orjson.loads(response.content)["outputs"][0]["data"] == [label]
        return Answer(time.monotonic(), int(version) if version.isdecimal() else 0, response.status_code, right)


def _body(image: NDArray[np.float32]) -> bytes:
    inputs = [{"name": "input", "datatype": "FP32", "shape": [1, len(image)], "data": image.tolist()}]
    return orjson.dumps({"inputs": inputs, "outputs": [{"name": "label"}]})


# --- what they saw ----------------------------------------------------------------------------------------------------


def told(answers: Iterable[Answer]) -> str:
    """How many answers each version gave, and how many of them were right, as a clause."""
    by_version = Counter(each.version for each in answers if not each.failed)
    right = Counter(each.version for each in answers if each.right)
    parts = [
        f"{count:,} by version {version} ([bold]{right[version] / count:.1%}[/] right)"
        for version, count in sorted(by_version.items())
    ]
    return " and ".join(parts) or "none"


def failed(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that were none, in the order in which users saw them."""
    return sorted((each for each in answers if each.failed), key=lambda each: each.at_s)

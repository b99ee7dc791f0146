"""One version, loaded: its engine behind a batcher, and what its answers are made with."""

from typing import Any

from lepton_common import http11
from lepton_common.events import Batching
from lepton_common.records import Limits
from lepton_common.signature import TensorSpec
from lepton_common.types import VersionRef

from lepton_worker.batcher import Batcher
from lepton_worker.domain import Verdict
from lepton_worker.engine import Engine
from lepton_worker.usage import Account

PLATFORM = "onnxruntime_onnx"

_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


class Lane:
    """Serves one version. Made on the loop's thread, around an engine that was loaded elsewhere."""

    def __init__(
        self,
        ref: VersionRef,
        engine: Engine,
        verdict: Verdict,
        batching: Batching,
        instances: int,
        account: Account,
    ) -> None:
        self.ref = ref
        self.model = ref.model.model
        self.version = str(ref.version)
        self.signature = engine.signature
        self.labels = engine.labels
        self.batcher = Batcher(engine.run, instances, batching, account, mergeable=verdict.batchable)
        self.timeout_s = Limits().timeout_ms / 1000
        self.version_header = b"x-lepton-version: %d\r\n" % ref.version
        self.json_headers = http11.JSON + self.version_header
        self._verdict = verdict
        self._batching = batching
        self._instances = instances

    def limit(self, batching: Batching, limits: Limits) -> None:
        """These limits hold from now on."""
        self._batching = batching
        self.timeout_s = limits.timeout_ms / 1000
        self.batcher.limit(batching)

    def metadata(self, versions: list[str]) -> dict[str, Any]:
        """OIP's model metadata."""
        return {"name": self.model, "versions": versions, "platform": PLATFORM, **self.signature.to_dict()}

    def config(self, device: str) -> dict[str, Any]:
        """Triton's model configuration. Where there is a batch dimension, dims leave it out, as Triton's do."""
        batched = self._verdict.batchable
        config: dict[str, Any] = {
            "name": self.model,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "version_policy": {"specific": {"versions": [self.ref.version]}},
            "max_batch_size": self._batching.max_rows if batched else 0,
            "input": [_port(spec, batched) for spec in self.signature.inputs],
            "output": [_port(spec, batched) for spec in self.signature.outputs],
            "instance_group": [
                {"name": self.model, "kind": "KIND_GPU" if device == "cuda" else "KIND_CPU", "count": self._instances}
            ],
            "parameters": {"batching": {"string_value": "on" if batched else f"off: {self._verdict.reason}"}},
        }
        if batched:
            config["dynamic_batching"] = {
                "max_queue_delay_microseconds": 0,
                "default_queue_policy": {"max_queue_size": self._batching.max_queued_rows},
            }
        return config

    def statistics(self) -> dict[str, Any]:
        """This version's entry of Triton's `model_stats`. Rows are counted as inferences, runs as executions."""
        seen = self.batcher.statistics
        requests = seen.succeeded + seen.failed
        return {
            "name": self.model,
            "version": self.version,
            "last_inference": seen.last_at_ms,
            "inference_count": seen.rows,
            "execution_count": seen.executions,
            "inference_stats": {
                "success": _duration(seen.succeeded, seen.request_s),
                "fail": _duration(seen.failed, 0),
                "queue": _duration(requests, seen.queue_s),
                "compute_input": _duration(requests, 0),
                "compute_infer": _duration(requests, seen.run_s),
                "compute_output": _duration(requests, 0),
                "cache_hit": _duration(0, 0),
                "cache_miss": _duration(0, 0),
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _duration(runs, 0),
                    "compute_infer": _duration(runs, seconds),
                    "compute_output": _duration(runs, 0),
                }
                for rows, (runs, seconds) in sorted(seen.by_size.items())
            ],
            "memory_usage": [],
        }


def _port(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _CONFIG_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}"),
        "dims": list(spec.shape[1:] if batched else spec.shape),
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}

"""The benchmark's model on Triton's Python backend: one onnxruntime call a batch. Runs inside Triton's stub process."""

import os
import sys

sys.path.insert(0, os.environ["BENCH_SITE_PACKAGES"])

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        output = self.session.run(None, {"x": np.concatenate(inputs)})[0]
        ends = np.cumsum([each.shape[0] for each in inputs])[:-1]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", part)]) for part in np.split(output, ends)]

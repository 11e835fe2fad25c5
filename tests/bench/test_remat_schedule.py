# SPDX-License-Identifier: Apache-2.0
"""What a remat policy makes run again, as the compiler's schedule for a TPU has it."""

import pytest

from bench.tpu.step import predicted_step, template
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu, tpu_topology

SIZES = {"hidden_dim": 128, "intermediate_dim": 384, "num_heads": 1, "num_kv_heads": 1, "head_dim": 128}


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
def test_with_save_attention_its_forward_kernel_runs_once_for_each_layer():
    model = SIZES | {"num_layers": 3, "vocab_size": 1024, "max_seq_len": 512, "remat": "save_attention"}
    config = template("array_stacked", model=model, trainer={"batch_size": 4, "seq_len": 512})
    record, prediction = predicted_step("array_stacked", config, tpu_topology("v5p:2x2x1"))
    assert prediction, record.refusal
    calls = {"attention_forward": 0, "attention_backward": 0}
    for kernel in prediction.schedule.kernels:
        for name in calls:
            calls[name] += kernel.calls * kernel.name.startswith(name)
    assert calls == {"attention_forward": 3, "attention_backward": 3}

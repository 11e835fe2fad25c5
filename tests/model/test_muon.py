# SPDX-License-Identifier: Apache-2.0
"""The variant that is trained with Muon: all of its presets are, and the model and the loop are those of base."""

import jax
import optax
import pytest

from tests.model.variants import FOLDER, one_device, part, tiny_config

PRESETS = part("muon", "launch").PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_muon(name):
    model, preset = part("muon", "model"), PRESETS[name]
    optimizer = preset.optimizer.build(preset.trainer.steps, matrix_axes=model.matrix_axes)
    with jax.set_mesh(one_device()):
        params = jax.eval_shape(lambda: model.Transformer.init(tiny_config("muon"), key=jax.random.key(0)))
        state = jax.eval_shape(optimizer.init, params)
    assert optax.tree_utils.tree_get_all_with_path(state, "ns_coeffs")


def test_only_its_launch_differs_from_base():
    for name in ("model.py", "train.py"):
        assert (FOLDER / "muon" / name).read_bytes() == (FOLDER / "base" / name).read_bytes()

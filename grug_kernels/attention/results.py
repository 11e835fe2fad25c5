# SPDX-License-Identifier: Apache-2.0
"""What every implementation of attention returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Results(NamedTuple):
    """max_logits: None unless it is asked for."""

    out: Float[Array, "batch q_len num_heads v_head_dim"]
    lse: Float[Array, "batch num_heads q_len"]
    max_logits: Float[Array, "batch num_heads"] | None

# SPDX-License-Identifier: Apache-2.0
"""Array-stacked blocks and what they keep for the backward pass."""

from grug_kernels.stacked.array_stacked import ArrayStacked
from grug_kernels.stacked.remat import Policy, Remat, rematerialised

__all__ = ["ArrayStacked", "Policy", "Remat", "rematerialised"]

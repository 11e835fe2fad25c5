# SPDX-License-Identifier: Apache-2.0
"""The knobs of the training loop, the same for every variant. No jax here: `--help` reads this file."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

Offload = Literal["none", "optimizer", "optimizer_and_ema"]


@dataclass(frozen=True)
class GrugTrainerConfig:
    """Steps, batches, and what the loop does beside the step."""

    steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 2000
    # Sequences per step, over all devices.
    batch_size: int = 512
    seq_len: int = 4096
    # Weight of lse**2 in the loss: keeps the log-sum-exp of the logits near zero (arXiv:2204.02311).
    z_loss_weight: float = 1e-4
    # Coefficient of the exponential moving average of the weights that is evaluated and saved too; None: no average.
    ema_beta: float | None = None
    seed: int = 0
    # Devices that share each layer (tensor parallelism); the others share the batch.
    model_axis: int = 1
    # Devices that share each sequence, a part of its positions each (context parallelism); for long ones.
    context_axis: int = 1
    # Of those that share the batch, how many share a layer's experts, too (expert parallelism); of use to a variant
    # that has some.
    expert_axis: int = 1
    # Slices: whole copies of the weights, each over devices of its own. Only gradients go from one to another, over the
    # slow network, once a step.
    replica_dcn: int = 1
    # State that lives in the host's memory between two updates, for a model that needs the device's; costs its copies.
    offload: Offload = "none"
    # Losses stay on the device between two of these steps.
    log_every: int = 10
    # True: start from a checkpoint or fail. Otherwise the run's own newest checkpoint is used when there is one.
    load_checkpoint: bool = False
    # Start from this directory's newest checkpoint instead of the run's own.
    load_checkpoint_path: str | None = None
    # Peak TFLOP/s of one device, for MFU, where this project does not know the device.
    peak_tflops: Annotated[float | None, tyro.conf.arg(aliases=["--peak-tflops"])] = None
    # Minutes without a step, an evaluated batch or a byte of a checkpoint, after which the run ends with exit code 7,
    # to be started again. None: never, as under a debugger.
    stall_minutes: float | None = 30.0
    # A kernel that refuses and is replaced by a slower one is an error, not a warning.
    require_kernels: Annotated[bool, tyro.conf.arg(aliases=["--require-kernels"])] = False

    def __post_init__(self):
        axes = ("model_axis", "context_axis", "expert_axis", "replica_dcn")
        for name in ("steps", "batch_size", "seq_len", *axes, "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"GrugTrainerConfig: {name}={getattr(self, name)}; it is at least 1.")
        if self.stall_minutes is not None and self.stall_minutes <= 0:
            raise ValueError(
                f"GrugTrainerConfig: stall_minutes={self.stall_minutes} is not positive; choose None for no watch."
            )
        if self.ema_beta is not None and not 0 < self.ema_beta < 1:
            raise ValueError(
                f"GrugTrainerConfig: ema_beta={self.ema_beta}; choose between 0 and 1, or None for no average."
            )
        if self.offload not in get_args(Offload):
            raise ValueError(
                f"GrugTrainerConfig: offload={self.offload!r}; choose none, optimizer or optimizer_and_ema."
            )
        if self.offload == "optimizer_and_ema" and self.ema_beta is None:
            raise ValueError(
                "GrugTrainerConfig: offload='optimizer_and_ema', and there is no average: set ema_beta, or choose"
                " offload='optimizer'."
            )

    @property
    def mesh_axes(self) -> dict[str, int]:
        """The axes of the mesh that are chosen; "data" takes the devices that these leave. For `create_mesh`."""
        shared = {"context": self.context_axis, "expert": self.expert_axis, "model": self.model_axis}
        return {"replica_dcn": self.replica_dcn} | shared

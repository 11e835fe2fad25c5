# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, built from one dataclass: AdamW (default) and Muon, with warmup and cosine decay."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import optax

PyTree = Any
# An optax.GradientTransformation, whose own types admit no Equinox module as parameters.
Optimizer = Any


@dataclass(frozen=True)
class GrugOptimizerConfig:
    """Knobs of the optimizer; everything that changes during a run is visible as `optim/*`."""

    name: Literal["adamw", "muon"] = "adamw"
    # The peak, reached after `warmup_steps`; then a cosine down to `min_lr_ratio` times it at the last step.
    learning_rate: float = 3e-3
    warmup_steps: int = 1000
    min_lr_ratio: float = 0.1
    # Decays every weight but those whose name holds "norm" or "sinks".
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    # Gradients with a larger global norm are scaled down to it.
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"GrugOptimizerConfig: name={self.name!r} is no optimizer; choose adamw or muon.")
        if self.learning_rate <= 0 or self.warmup_steps < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"GrugOptimizerConfig: learning_rate={self.learning_rate} must be positive, warmup_steps="
                f"{self.warmup_steps} not negative, and min_lr_ratio={self.min_lr_ratio} between 0 and 1."
            )

    def schedule(self, num_steps: int) -> "optax.Schedule":
        """Learning rate of the step that follows `count` completed ones.

        Raises:
          ValueError: the warmup is longer than the run.
        """
        import optax

        if self.warmup_steps >= num_steps:
            raise ValueError(
                f"GrugOptimizerConfig: warmup_steps={self.warmup_steps} is not below steps={num_steps}, so the learning"
                " rate would never reach its peak. Lower optimizer.warmup_steps."
            )
        # From 1/(warmup_steps+1) of the peak, not from zero: the first step is not wasted.
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (self.warmup_steps + 1),
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=num_steps,
            end_value=self.min_lr_ratio * self.learning_rate,
        )

    def build(self, num_steps: int, *, matrix_axes: Callable[[PyTree], PyTree]) -> "optax.GradientTransformation":
        """The optax transform for a run of `num_steps`.

        `update(grads, state, params, grad_norm=optax.global_norm(grads))` treats every parameter by itself, so that it
        may be called with some of them; without `grad_norm`, gradients are clipped by the norm of those that are given.

        matrix_axes: the model's own function from parameters to (axes summed over, axes written) of each matrix that
        Muon orthogonalises, None for every other leaf: those go to AdamW.
        """
        import optax
        import optax.contrib

        def adamw(learning_rate):
            return optax.adamw(
                learning_rate, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay, mask=is_decayed
            )

        def muon(learning_rate):
            matrices = optax.chain(
                optax.contrib.scale_by_muon(weight_dimension_numbers=partial(_dimensions, matrix_axes)),
                optax.add_decayed_weights(self.weight_decay),
                optax.scale_by_learning_rate(learning_rate),
            )
            kinds: dict[Hashable, Any] = {"muon": _on_whole_matrices(matrices), "adamw": adamw(learning_rate)}
            return optax.partition(kinds, partial(_kind_of_each, matrix_axes))

        def clipped(learning_rate):
            update = adamw(learning_rate) if self.name == "adamw" else muon(learning_rate)
            return optax.chain(_clip_by_global_norm(self.max_grad_norm), update)

        # inject_hyperparams keeps the current value in the state, where `hyperparameters` finds it.
        return optax.inject_hyperparams(clipped)(learning_rate=self.schedule(num_steps))


def is_decayed(params: PyTree) -> PyTree:
    """True for every leaf but norms and sinks, which are scales and logits: those have the word in their path."""
    import jax

    def decays(path, _) -> bool:
        return not any(word in jax.tree_util.keystr(path) for word in ("norm", "sinks"))

    return jax.tree_util.tree_map_with_path(decays, params)


def hyperparameters(opt_state: Any) -> dict[str, Any]:
    """`optim/*`: what the optimizer's last update used, as arrays on the device."""
    return {f"optim/{name}": value for name, value in opt_state.hyperparams.items()}


def _clip_by_global_norm(max_norm: float) -> "optax.GradientTransformationExtraArgs":
    """As Optax's, but the norm may be given: then each gradient is scaled by itself, whichever others are there."""
    import jax
    import optax

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, *, grad_norm: Any = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        norm = optax.global_norm(updates) if grad_norm is None else grad_norm
        return jax.tree.map(
            lambda g: jax.lax.select(norm < max_norm, g, g / norm.astype(g.dtype) * max_norm), updates
        ), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _on_whole_matrices(transform: "optax.GradientTransformation") -> "optax.GradientTransformation":
    """`transform`, given whole matrices on every device: Newton-Schulz multiplies a matrix by its own transpose, and
    split either way it would sum over shards at every product. Its state is whole too: a momentum per matrix."""
    import jax
    import optax

    def whole(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf if _mesh_of(leaf).empty else jax.reshard(leaf, jax.P()), tree)

    def init(params: PyTree) -> PyTree:
        return transform.init(whole(params))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        new, state = transform.update(whole(updates), state, whole(params))
        return jax.tree.map(_placed_like, new, updates), state

    def _mesh_of(leaf: Any) -> Any:
        return jax.typeof(leaf).sharding.mesh

    def _placed_like(leaf: Any, like: Any) -> Any:
        return leaf if _mesh_of(like).empty else jax.reshard(leaf, jax.typeof(like).sharding.spec)

    return optax.GradientTransformation(init, update)


def _dimensions(matrix_axes: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Muon's own description of each matrix; params hold nothing else by now."""
    import jax
    import optax.contrib

    def describe(pair: Any) -> Any:
        return optax.contrib.MuonDimensionNumbers(*pair)

    return jax.tree.map(describe, matrix_axes(params), is_leaf=_is_axes)


def _kind_of_each(matrix_axes: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    import jax

    return jax.tree.map(lambda _, axes: "adamw" if axes is None else "muon", params, matrix_axes(params))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and all(type(axes) is tuple for axes in node)

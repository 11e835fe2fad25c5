# SPDX-License-Identifier: Apache-2.0
"""What an implementation must know beside the arrays: the loss's constants, and how the mesh splits the arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from grug_kernels.cross_entropy.block_sizes import BlockSizes
from grug_kernels.sharding import Axes, mesh_of, sharded_axes, shards_of


@dataclass(frozen=True)
class Shards:
    """Mesh axes, each tuple empty where nothing is split.

    token_axes: split the tokens. vocab_axes: split the vocabulary and stay split.
    gather_axes: split hidden_dim of lm_head (FSDP), a subset of token_axes. The weight is gathered over them before
    its use, and its gradient is reduce-scattered over them.
    """

    token_axes: Axes = ()
    vocab_axes: Axes = ()
    gather_axes: Axes = ()

    @staticmethod
    def of(hidden: jax.Array, lm_head: jax.Array) -> "Shards":
        """Read from the arrays' own shardings; raises ValueError where hidden_dim of `hidden` is split."""
        token_axes, hidden_axes = sharded_axes(hidden)
        weight_axes, vocab_axes = sharded_axes(lm_head)
        if hidden_axes:
            raise ValueError(
                f"cross_entropy: hidden is sharded over {hidden_axes} in its hidden_dim"
                f" ({jax.typeof(hidden)}), but each token's vector must be whole on its device."
                f" Reshard it first: jax.reshard(hidden, P({token_axes or None}, None))."
            )
        # One axis cannot split both: devices with different tokens need the whole vocabulary between them for each.
        vocab_axes = tuple(axis for axis in vocab_axes if axis not in token_axes)
        # Over an axis that does not split tokens every device has the same gradient: nothing to reduce-scatter.
        gather_axes = tuple(axis for axis in weight_axes if axis in token_axes)
        return Shards(token_axes, vocab_axes, gather_axes)

    def place(self, hidden: jax.Array, lm_head: jax.Array, *per_token: jax.Array) -> tuple[jax.Array, ...]:
        """The arrays, moved to the layout of `map` where they have another; gradients move back.

        hidden [tokens, hidden_dim], lm_head [hidden_dim, vocab_size], per_token arrays [tokens].
        """
        arrays, layout = (hidden, lm_head, *per_token), self._layout(len(per_token))
        return tuple(
            x if sharded_axes(x) == axes else jax.reshard(x, _spec(axes))
            for x, axes in zip(arrays, layout, strict=True)
        )

    def map(self, local: Callable[..., Any], out_specs: Any, *arrays: jax.Array) -> Any:
        """`local(*arrays)` on each device's shards of arrays that `place` returned."""
        # Also where nothing is split: several devices run a Pallas kernel on copies only when told that they may.
        if AxisType.Explicit not in mesh_of(arrays[0]).axis_types:
            return local(*arrays)
        layout = self._layout(len(arrays) - 2)
        return jax.shard_map(local, in_specs=tuple(map(_spec, layout)), out_specs=out_specs)(*arrays)

    def gathered(self, lm_head: jax.Array) -> jax.Array:
        """The head with its hidden_dim whole. Its vocabulary stays sharded."""
        return lax.all_gather(lm_head, self.gather_axes, axis=0, tiled=True) if self.gather_axes else lm_head

    def scattered(self, dlm_head: jax.Array) -> jax.Array:
        """Summed over the tokens' shards; of the axes that the head was gathered over, each device keeps its rows."""
        if self.gather_axes:
            dlm_head = lax.psum_scatter(dlm_head, self.gather_axes, scatter_dimension=0, tiled=True)
        return lax.psum(dlm_head, self.reduce_axes)

    @property
    def reduce_axes(self) -> Axes:
        """Those that split tokens and not the head: its gradient is summed over them."""
        return tuple(axis for axis in self.token_axes if axis not in self.gather_axes)

    def _layout(self, num_per_token: int) -> tuple[tuple[Axes, ...], ...]:
        return (self.token_axes, ()), (self.gather_axes, self.vocab_axes), *(((self.token_axes,),) * num_per_token)


def _spec(axes_of_dimensions: tuple[Axes, ...]) -> P:
    return P(*(axes or None for axes in axes_of_dimensions))


def flattened(hidden: jax.Array, *per_token: jax.Array) -> tuple[jax.Array, ...]:
    """[batch, seq_len, ...] -> [tokens, ...]: every device puts its own rows one behind the other, and nothing moves.

    All arrays come in the same order, which is that of the batch where positions are not split, and of no matter where
    they are: losses are added up, or go back by `unflattened`. Arrays of [tokens, ...] stay as they are.
    """
    if hidden.ndim == 2:
        return hidden, *per_token
    rows = sharded_axes(hidden)[:2]
    per_token = tuple(x if sharded_axes(x) == rows else jax.reshard(x, _spec(rows)) for x in per_token)
    return tuple(
        _on_each_device(lambda x: x.reshape(-1, *x.shape[2:]), x, (sum(rows, ()), *sharded_axes(x)[2:]))
        for x in (hidden, *per_token)
    )


def unflattened(x: jax.Array, hidden: jax.Array) -> jax.Array:
    """[tokens] -> [batch, seq_len] of `hidden`, as it was before it was `flattened`."""
    if hidden.ndim == 2:
        return x
    rows = sharded_axes(hidden)[:2]
    return _on_each_device(lambda x: x.reshape(-1, hidden.shape[1] // shards_of(rows[1])), x, rows)


def _on_each_device(local: Callable[[jax.Array], jax.Array], x: jax.Array, out_axes: tuple[Axes, ...]) -> jax.Array:
    if AxisType.Explicit not in mesh_of(x).axis_types:
        return local(x)
    return jax.shard_map(local, in_specs=_spec(sharded_axes(x)), out_specs=_spec(out_axes))(x)


@dataclass(frozen=True)
class LossSettings:
    """The same for every implementation; all of it constant in the compiled program. `None`: no cap; choose blocks."""

    z_loss_weight: float = 0.0
    logit_soft_cap: float | None = None
    block_sizes: BlockSizes | None = None
    shards: Shards = Shards()

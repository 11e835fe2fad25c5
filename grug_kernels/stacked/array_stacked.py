# SPDX-License-Identifier: Apache-2.0
"""Equal blocks as one block whose arrays have a leading axis: compiled once, whatever the depth."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from grug_kernels.stacked.remat import rematerialised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayStacked[Block]:
    """`num_layers` blocks of one type. Every leaf of `stacked` is [num_layers, *shape of that leaf in one block].

    The layers run in one `lax.scan` whose xs are the parameters, so the program holds one layer and no copy of the
    whole stack: neither of the parameters nor of their gradients.
    """

    stacked: Block
    num_layers: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def init(num_layers: int, block_type: Any) -> Callable[..., "ArrayStacked"]:
        """`ArrayStacked.init(num_layers, Block)(cfg, key=key)`: layer i is `Block.init(cfg, key=split(key)[i])`."""
        if num_layers < 1:
            raise ValueError(f"ArrayStacked: num_layers={num_layers}; a stack has at least one layer.")

        def init_layers(*args: Any, key: jax.Array) -> ArrayStacked:
            keys = jax.random.split(key, num_layers)
            return ArrayStacked(jax.vmap(lambda layer_key: block_type.init(*args, key=layer_key))(keys), num_layers)

        return init_layers

    @jax.named_scope("stacked_layers")
    def fold(self, carry: Any, *shared: Any, per_layer: Any = None, remat: str = "none", unroll: int = 1) -> Any:
        """carry = block_i(carry, *shared[, per_layer[i]]) for every layer i in turn; returns the last carry.

        shared: the same for every layer (a mask, say). per_layer: a pytree of arrays [num_layers, ...], whose i-th
        slice is the last argument of layer i, or None. unroll: layers per step of the scan.

        Raises:
          ValueError: a leaf of `per_layer` has another leading axis, or `remat` is no policy.
        """
        self._check_per_layer(per_layer)

        def layer(carry, xs):
            block, extra = xs
            extras = () if per_layer is None else (extra,)
            return block(carry, *shared, *extras), None

        body = rematerialised(layer, remat, in_scan=True)
        carry, _ = jax.lax.scan(body, carry, (self.stacked, per_layer), unroll=unroll)
        return carry

    def get_layer(self, index: int) -> Block:
        """The block at `index`, its arrays without the leading axis."""
        return jax.tree.map(lambda leaf: leaf[index], self.stacked)

    def unstacked(self) -> tuple[Block, ...]:
        """All the blocks, first to last."""
        return tuple(self.get_layer(index) for index in range(self.num_layers))

    def _check_per_layer(self, per_layer: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(per_layer):
            if not leaf.ndim or leaf.shape[0] != self.num_layers:
                raise ValueError(
                    f"ArrayStacked.fold: per_layer{jax.tree_util.keystr(path)} has shape {leaf.shape}, but there are"
                    f" num_layers={self.num_layers} layers; its leading axis must be {self.num_layers}."
                )

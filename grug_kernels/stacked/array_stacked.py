# SPDX-License-Identifier: Apache-2.0
"""Blocks as one block whose arrays have a leading axis: compiled once, whatever the depth."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from grug_kernels.stacked.prefetch import fold_ahead
from grug_kernels.stacked.remat import Policy
from grug_kernels.stacked.scan import Layer, scan_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayStacked[Block]:
    """`num_layers` blocks of one type, or of several in turn, run by one `lax.scan`.

    stacked: of one type, a block whose every leaf is [num_layers, *shape of that leaf in one block]. Of n types, a
    tuple of n such blocks with leading axes num_layers / n: layer i is of the type i % n, at i // n.

    The parameters are the scan's xs, so the program holds one layer (one of each type) and no copy of the whole stack:
    neither of the parameters nor of their gradients.
    """

    stacked: Block | tuple[Any, ...]
    num_layers: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def init(num_layers: int, *block_types: Any) -> Callable[..., "ArrayStacked"]:
        """`ArrayStacked.init(num_layers, Block)(cfg, key=key)`: layer i is `Block.init(cfg, key=split(key)[i])`.

        Traced once for each type, whatever the depth. `ArrayStacked.init(24, Local, Local, Local, Global)` makes every
        fourth layer global.

        Raises:
          ValueError: num_layers is no positive multiple of the number of types.
        """
        if not block_types or num_layers < 1 or num_layers % len(block_types):
            raise ValueError(
                f"ArrayStacked: num_layers={num_layers} is no positive multiple of the {len(block_types)} block types"
                " that take turns. Choose a multiple, or put the rest in a stack of its own."
            )

        def init_layers(*args: Any, key: jax.Array) -> ArrayStacked:
            keys = jax.random.split(key, num_layers)
            segments = tuple(
                jax.vmap(lambda layer_key, of_type=block_type: of_type.init(*args, key=layer_key))(
                    keys[turn :: len(block_types)]
                )
                for turn, block_type in enumerate(block_types)
            )
            return ArrayStacked(segments if len(segments) > 1 else next(iter(segments)), num_layers)

        return init_layers

    def fold(
        self,
        carry: Any,
        *shared: Any,
        per_layer: Any = None,
        remat: str | Policy = "none",
        unroll: int = 1,
        prefetch: Callable[[Any], Any] | None = None,
    ) -> Any:
        """carry = block_i(carry, *shared[, per_layer[i]]) for every layer i in turn; returns the last carry.

        As `scan`, for blocks that return the carry alone. prefetch: block -> the block that is called in its place, its
        weights gathered from other devices; it is made while the layer before it works, forward and backward. Takes
        remat="full", blocks of one type, and integers alone as `shared` and `per_layer`.

        Raises:
          ValueError: as `scan`; prefetch with what it does not take.
        """

        def layer(carry: Any, block: Any, extras: tuple[Any, ...]) -> tuple[Any, None]:
            return block(carry, *shared, *extras), None

        if prefetch is None:
            return self._scan(layer, carry, per_layer, remat, unroll)[0]
        if remat != "full" or unroll != 1 or len(self._segments) > 1:
            raise ValueError(
                f"ArrayStacked: prefetch is for one block type, remat='full' and unroll=1, not {len(self._segments)},"
                f" {remat!r} and {unroll}. Leave it out, or change these."
            )
        self._check(per_layer)

        def with_extras(carry: Any, block: Any, shared: tuple[Any, ...], extras: Any) -> Any:
            return block(carry, *shared, *(() if per_layer is None else (extras,)))

        with jax.named_scope("stacked_layers"):
            return fold_ahead(with_extras, carry, self.stacked, shared, per_layer, prefetch)

    def scan(
        self,
        carry: Any,
        *shared: Any,
        per_layer: Any = None,
        remat: str | Policy = "none",
        unroll: int = 1,
        call: Callable[..., Any] = lambda block, *args: block(*args),
    ) -> tuple[Any, Any]:
        """carry, output[i] = block_i(carry, *shared[, per_layer[i]]) for every layer i in turn.

        shared: the same for every layer (a mask, say). per_layer: a pytree of arrays [num_layers, ...], whose i-th
        slice is the last argument of layer i (a window, a rope base), or None. remat: what a layer keeps for the
        backward pass, a name of `Remat` or a policy for `jax.checkpoint`. unroll: layers (of each type) per step of the
        scan. call: what to call in place of block_i, with block_i as its first argument: another method of it.

        Returns the last carry, and the outputs with a leading axis num_layers: norms, losses of a router, probes.

        Raises:
          ValueError: a leaf of `per_layer` has another leading axis; `remat` is no policy, or is "nested" where the
            layers cannot be grouped.
        """

        def layer(carry: Any, block: Any, extras: tuple[Any, ...]) -> tuple[Any, Any]:
            return call(block, carry, *shared, *extras)

        return self._scan(layer, carry, per_layer, remat, unroll)

    def get_layer(self, index: int) -> Any:
        """The block at `index`, its arrays without the leading axis."""
        turn, cycle = index % len(self._segments), index // len(self._segments)
        return jax.tree.map(lambda leaf: leaf[cycle], self._segments[turn])

    def unstacked(self) -> tuple[Any, ...]:
        """All the blocks, first to last."""
        return tuple(self.get_layer(index) for index in range(self.num_layers))

    @property
    def _segments(self) -> tuple[Any, ...]:
        return self.stacked if type(self.stacked) is tuple else (self.stacked,)

    @jax.named_scope("stacked_layers")
    def _scan(self, layer: Layer, carry: Any, per_layer: Any, remat: str | Policy, unroll: int) -> tuple[Any, Any]:
        self._check(per_layer)
        return scan_layers(layer, carry, self._segments, per_layer, remat=remat, unroll=unroll)

    def _check(self, per_layer: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(per_layer):
            if not leaf.ndim or leaf.shape[0] != self.num_layers:
                raise ValueError(
                    f"ArrayStacked: per_layer{jax.tree_util.keystr(path)} has shape {leaf.shape}, but there are"
                    f" num_layers={self.num_layers} layers; its leading axis must be {self.num_layers}."
                )

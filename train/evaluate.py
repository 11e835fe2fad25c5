# SPDX-License-Identifier: Apache-2.0
"""Loss and exact bits per byte on held-out text, for each tag, by Levanter's `TaggedEvaluator`.

Levanter's own bits per byte is the mean of each batch's ratio, and counts three bytes for a token that is part of a
character. Ours is the ratio of two sums over the same weighted tokens: of their nats, and of their bytes. Levanter
means both, by two evaluators that differ in the number they attach to a token; the count of tokens cancels:

    bits per byte = sum_t w[t] nats[t] / (ln 2 * sum_t w[t] bytes[t]) = mean nats / (ln 2 * mean bytes)
"""

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from train import lev
from train.data import BATCH_AXES, DataConfig, PreparedData, build_validation_sets, check_batch_size
from train.stall import beating

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh

# (params, batch) -> losses in nats, weights, target token ids: each [batch, seq_len].
PerTokenLosses = Callable[[Any, Any], tuple["Array", "Array", "Array"]]


@dataclass(frozen=True)
class GrugEvalConfig:
    """When to evaluate, and on how much."""

    # Steps between two evaluations.
    every: int = 200
    # Sequences of each validation set, a fixed sample of it. None: all.
    max_examples_per_dataset: int | None = 64
    # The weights being trained (eval/*), and their moving average if the run keeps one (eval/ema/*).
    eval_current: bool = True
    eval_ema: bool = True

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"GrugEvalConfig: every={self.every} steps; choose 1 or more.")
        if self.max_examples_per_dataset is not None and self.max_examples_per_dataset < 1:
            raise ValueError(
                f"GrugEvalConfig: max_examples_per_dataset={self.max_examples_per_dataset}; choose 1 or more, or None."
            )
        if not (self.eval_current or self.eval_ema):
            raise ValueError(
                "GrugEvalConfig: eval_current=False and eval_ema=False leave nothing to evaluate; set one of them, or"
                f" raise every={self.every} beyond the run's steps."
            )


class Evaluator:
    """`evaluator(params, prefix="eval")` gives the metrics of one evaluation, named as Levanter names them:

    <prefix>/{loss, macro_loss, bpb, macro_bpb, loading_time, total_time}, <prefix>/<tag>/{loss, bpb} and
    <prefix>/<parent>/{micro_loss, macro_loss, bpb, macro_bpb}: nats per token, bits per byte, seconds. Micro weights
    tokens alike (bytes, for bpb), macro weights tags alike.
    """

    def __init__(self, nats: Any, num_bytes: Any, mesh: "Mesh"):
        self._nats = nats
        self._num_bytes = num_bytes
        self._mesh = mesh
        self._mean_bytes: dict[str, float] | None = None

    def __call__(self, params: Any, prefix: str = "eval") -> dict[str, float]:
        mean_nats = self._evaluate(self._nats, params)
        if self._mean_bytes is None:
            # They depend on the data alone, so once is enough, and XLA drops the model from this program.
            self._mean_bytes = self._evaluate(self._num_bytes, params)
        metrics = mean_nats | bits_per_byte(mean_nats, self._mean_bytes)
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def _evaluate(self, evaluator: Any, params: Any) -> dict[str, float]:
        import jax

        with contextlib.ExitStack() as stack:

            def without_bar(batches: Any, *_: Any, **__: Any) -> Any:
                """In the place of Levanter's progress bar, which would cut through the run's."""
                # Levanter does not close what it reads from. Where an evaluation fails or is interrupted, the reading
                # thread would live on, and abort the interpreter at exit (code 134).
                stack.callback(batches.items.close)
                batches.items = beating(batches.items)
                return batches

            stack.enter_context(mock.patch.object(sys.modules[type(evaluator).__module__], "tqdm", without_bar))
            stack.enter_context(jax.set_mesh(self._mesh))
            stack.enter_context(lev.axis_mapping({"batch": BATCH_AXES}))
            return {name: float(value) for name, value in lev.eval_model(evaluator, params).items()}


def build_tagged_evaluator(
    prepared: PreparedData,
    data_cfg: DataConfig,
    cfg: GrugEvalConfig,
    seq_len: int,
    batch_size: int,
    mesh: "Mesh",
    per_token_losses: PerTokenLosses,
) -> Evaluator:
    """An `Evaluator` over the validation set of every component, a tag each.

    `per_token_losses(params, batch)` sees a `GrugLmExample` of [batch_size, seq_len], sharded over the mesh as in
    training. Where sequences run out, the last batch is filled with sequences of loss_weight 0: the weights it returns
    must be 0 there too, as `batch.loss_weight` is.

    Raises:
      ValueError: the batch does not divide over the mesh; a validation set is shorter than one sequence.
    """
    import jax.numpy as jnp

    check_batch_size(batch_size, mesh)
    byte_lengths = jnp.asarray(prepared.byte_lengths, jnp.float32)

    def per_token_bytes(params: Any, batch: Any) -> tuple["Array", "Array", "Array"]:
        import jax

        _, weights, token_ids = per_token_losses(params, batch)
        return byte_lengths.at[token_ids].get(out_sharding=jax.typeof(token_ids).sharding), weights, token_ids

    tagged_sets = [(dataset, [tag]) for tag, dataset in build_validation_sets(prepared, data_cfg, seq_len).items()]

    def evaluator_of(loss_fn: PerTokenLosses) -> Any:
        evaluator = lev.TaggedEvaluator(
            batch_size,
            tagged_sets,
            loss_fn,
            device_mesh=mesh,
            axis_mapping={"batch": BATCH_AXES},
            max_examples_per_dataset=cfg.max_examples_per_dataset,
        )
        # Levanter would read 100 batches ahead, all of them on the devices beside the training state.
        evaluator.loader.max_buffered_batches = 8
        return evaluator

    return Evaluator(evaluator_of(per_token_losses), evaluator_of(per_token_bytes), mesh)


def bits_per_byte(mean_nats: dict[str, float], mean_bytes: dict[str, float]) -> dict[str, float]:
    """Exact bits per byte for every mean loss, from the means per token of nats and of bytes under the same names.

    "<where>/loss" and "<where>/micro_loss" give "<where>/bpb"; "<where>/macro_loss" gives "<where>/macro_bpb", the mean
    over the tags below it.
    """
    bpb, of_tag = {}, {}
    for name, nats in mean_nats.items():
        where, kind = _split(name)
        if kind in ("loss", "micro_loss"):
            bpb[where + "bpb"] = nats / (math.log(2) * mean_bytes[name])
            if kind == "loss" and where:
                of_tag[where] = bpb[where + "bpb"]
    for name in mean_nats:
        where, kind = _split(name)
        if kind == "macro_loss":
            below = [value for tag, value in of_tag.items() if tag.startswith(where)]
            bpb[where + "macro_bpb"] = sum(below) / len(below)
    return bpb


def _split(name: str) -> tuple[str, str]:
    """ "python/code/loss" -> ("python/code/", "loss"); "loss" -> ("", "loss")."""
    where, slash, kind = name.rpartition("/")
    return where + slash, kind

# SPDX-License-Identifier: Apache-2.0
"""Loss and exact bits per byte on held-out text, for each tag, by Levanter's `TaggedEvaluator`.

python -m train.evaluate --checkpoint runs/NAME       a saved model, by the command in train/evaluate_saved.py

Levanter's own bits per byte, `bpb_compat` here, is the mean of each batch's ratio, and counts three bytes for a token
that is part of a character. Ours, `bpb`, is the ratio of two sums over the same weighted tokens: of their nats, and of
their bytes. Levanter means both, by two evaluators that differ in the number they attach to a token; the count of
tokens cancels:

    bits per byte = sum_t w[t] nats[t] / (ln 2 * sum_t w[t] bytes[t]) = mean nats / (ln 2 * mean bytes)
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from train import lev
from train.data import DataConfig, PreparedData, build_validation_sets, check_batch_size
from train.harness import HarnessConfig
from train.mesh import BATCH_AXES
from train.stall import beating

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import Mesh

# (params, batch) -> losses in nats, weights, target token ids: each [batch, seq_len].
PerTokenLosses = Callable[[Any, Any], tuple["Array", "Array", "Array"]]
# (batches done, batches)
Progress = Callable[[int, int], None]


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
    # lm-eval's tasks too, at steps of their own.
    harness: HarnessConfig = field(default_factory=HarnessConfig)

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
    tokens alike (bytes, for bpb), macro weights tags alike. Each bpb has beside it, as bpb_compat, what Levanter calls
    bpb; it depends on the batch size.

    `progress` is told, before each batch, how many are done, and of how many. After a call `tokens` has the number of
    those that were evaluated, by tag, weighted as their losses are.
    """

    def __init__(self, nats: Any, num_bytes: Any, mesh: "Mesh", num_batches: int):
        self._nats = nats
        self._num_bytes = num_bytes
        self._mesh = mesh
        self._num_batches = num_batches
        self._mean_bytes: dict[str, float] | None = None
        self.tokens: dict[str, int] = {}

    def __call__(self, params: Any, prefix: str = "eval", progress: Progress | None = None) -> dict[str, float]:
        found = self._evaluate(self._nats, params, progress)
        mean_nats = {name: value for name, value in found.items() if not name.endswith("bpb")}
        if self._mean_bytes is None:
            # They depend on the data alone, so once is enough, and XLA drops the model from this program.
            self._mean_bytes = self._evaluate(self._num_bytes, params, None)
        compat = {f"{name}_compat": value for name, value in found.items() if name.endswith("bpb")}
        metrics = mean_nats | compat | bits_per_byte(mean_nats, self._mean_bytes)
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def _evaluate(self, evaluator: Any, params: Any, progress: Progress | None) -> dict[str, float]:
        import jax

        means: Any = None  # Levanter's running ones, which know how many tokens they are of

        def accumulate(*args: Any) -> Any:
            nonlocal means
            means = accumulate_batch(*args)
            return means

        accumulate_batch = evaluator.accum_for_batch
        with contextlib.ExitStack() as stack:

            def without_bar(batches: Any, *_: Any, **__: Any) -> Any:
                """In the place of Levanter's progress bar, which would cut through the run's."""
                # Levanter does not close what it reads from. Where an evaluation fails or is interrupted, the reading
                # thread would live on, and abort the interpreter at exit (code 134).
                stack.callback(batches.items.close)
                batches.items = beating(batches.items)
                return batches if progress is None else _counted(batches, self._num_batches, progress)

            stack.enter_context(mock.patch.object(sys.modules[type(evaluator).__module__], "tqdm", without_bar))
            stack.enter_context(mock.patch.object(evaluator, "accum_for_batch", accumulate))
            stack.enter_context(jax.set_mesh(self._mesh))
            stack.enter_context(lev.axis_mapping({"batch": BATCH_AXES}))
            found = {name: float(value) for name, value in lev.eval_model(evaluator, params).items()}
        counts = jax.device_get(means.loss_per_tag.total)
        self.tokens = {tag: int(counts[index]) for tag, index in evaluator.dataset.tag_to_index.items()}
        return found


def _counted(batches: Iterable[Any], num_batches: int, progress: Progress) -> Iterator[Any]:
    for done, batch in enumerate(batches):
        progress(done, num_batches)
        yield batch


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

    def evaluator_of(loss_fn: PerTokenLosses, tokenizer: Any = None) -> Any:
        evaluator = lev.TaggedEvaluator(
            batch_size,
            tagged_sets,
            loss_fn,
            tokenizer=tokenizer,
            device_mesh=mesh,
            axis_mapping={"batch": BATCH_AXES},
            max_examples_per_dataset=cfg.max_examples_per_dataset,
        )
        # Levanter would read 100 batches ahead, all of them on the devices beside the training state.
        evaluator.loader.max_buffered_batches = 8
        return evaluator

    nats = evaluator_of(per_token_losses, lev.load_tokenizer(str(prepared.tokenizer_dir)))
    num_batches = -(-len(nats.dataset.as_sync_dataset()) // batch_size)
    return Evaluator(nats, evaluator_of(per_token_bytes), mesh, num_batches)


def bits_per_byte(mean_nats: dict[str, float], mean_bytes: dict[str, float]) -> dict[str, float]:
    """Exact bits per byte for every mean loss, from the means per token of nats and of bytes under the same names.

    "<where>/loss" and "<where>/micro_loss" give "<where>/bpb". Of several tags, "<parent>/macro_bpb" is the mean
    of those below a parent, and "macro_bpb" of all.
    """
    bpb, of_tag = {}, {}
    for name, nats in mean_nats.items():
        where, kind = _split(name)
        if kind in ("loss", "micro_loss"):
            bpb[where + "bpb"] = nats / (math.log(2) * mean_bytes[name])
            if kind == "loss" and where:
                of_tag[where] = bpb[where + "bpb"]
    for parent in {parent for tag in of_tag for parent in _parents(tag)} if len(of_tag) > 1 else ():
        below = [value for tag, value in of_tag.items() if tag.startswith(parent) and tag != parent]
        bpb[parent + "macro_bpb"] = sum(below) / len(below)
    return bpb


def _split(name: str) -> tuple[str, str]:
    """ "python/code/loss" -> ("python/code/", "loss"); "loss" -> ("", "loss")."""
    where, slash, kind = name.rpartition("/")
    return where + slash, kind


def _parents(tag: str) -> Iterator[str]:
    """ "a/b/c/" -> "", "a/", "a/b/"."""
    parts = tag.split("/")[:-1]
    return ("".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts)))


if __name__ == "__main__":
    from train.evaluate_saved import main

    main()

# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's lm-eval on a model that is being trained, or was: likelihoods of texts, many of them in a row.

    harness = build_harness(cfg, prepared, seq_len, batch_size, mesh, per_token_scores)
    tracker.log(harness(params), step=step)          # lm_eval/<task>/<metric>, lm_eval/averages/...

lm-eval is an extra (`uv sync --extra eval`), and imported where a harness is built.
"""

import contextlib
import importlib.util
import numbers
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

from train import lev, together
from train.data import PreparedData, check_batch_size
from train.mesh import BATCH_AXES
from train.progress import phase

if TYPE_CHECKING:
    import numpy as np
    from jax import Array
    from jax.sharding import Mesh

    from train.harness_packing import PackedBatch

# (params, batch) -> for every position the nats of the next token, and whether none is likelier: each [batch, seq_len].
PerTokenScores = Callable[[Any, Any], tuple["Array", "Array"]]

# lm-eval's own seed of few-shot examples, and its resamples for the standard error of what is no mean.
FEWSHOT_SEED, BOOTSTRAP_SAMPLES = 1234, 1000


@dataclass(frozen=True)
class HarnessConfig:
    """lm-eval's tasks while a run goes on. Needs `uv sync --extra eval`."""

    # Names, with commas between them: grug_continuation,grug_held_out are made of the held-out text. None: no harness.
    tasks: str | None = None
    # Steps between two evaluations; the last step has one too.
    every: int = 1000
    # Documents of each task, its first; None: all.
    limit: int | None = None
    # Solved examples before each question; None: as the task has it.
    num_fewshot: int | None = None
    # A folder with tasks of your own, YAML files as lm-eval reads them.
    include: str | None = None

    def __post_init__(self):
        for name, least in (("every", 1), ("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"HarnessConfig: {name}={value}; it is at least {least}.")
        if self.tasks is not None and not self.names:
            raise ValueError(f"HarnessConfig: tasks={self.tasks!r} names none; leave it out, or name one.")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(filter(None, (name.strip() for name in (self.tasks or "").split(",")))))

    def is_due(self, step: int, total_steps: int) -> bool:
        return bool(self.names) and (step % self.every == 0 or step == total_steps)


class Harness:
    """The tasks of a configuration, loaded, and the model that they are given to."""

    def __init__(self, cfg: HarnessConfig, tasks: Any, score: Any, build_model: Callable[..., Any]):
        self.remarks: dict[tuple[str, str], int] = {}  # what was not scored as its task has it: said once, and kept
        self._cfg, self._tasks, self._score, self._build_model = cfg, tasks, score, build_model

    def __call__(self, params: Any, prefix: str = "lm_eval") -> dict[str, float]:
        """What a tracker takes: see `metrics_of`."""
        return metrics_of(self.results(params), prefix)

    def results(self, params: Any) -> Any:
        """lm-eval's own `EvalResults`."""
        from lm_eval import evaluator

        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples at every step
        with phase("lm_eval") as say, quiet_and_seeded():
            return evaluator.evaluate(
                self._build_model(score=partial(self._score, params), say=say, remarks=self.remarks),
                self._tasks,
                limit=self._cfg.limit,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
                log_samples=False,
            )


def build_harness(
    cfg: HarnessConfig,
    prepared: PreparedData,
    seq_len: int,
    batch_size: int,
    mesh: "Mesh",
    per_token_scores: PerTokenScores,
) -> Harness | None:
    """The harness of a configuration, its tasks loaded; None where it names no task.

    `per_token_scores(params, batch)` sees a `GrugLmExample` of [batch_size, seq_len], sharded over the mesh as in
    training: requests, shorter ones several to a row, told apart by segment ids.

    Raises:
      ValueError: lm-eval is not installed; a task is unknown, needs text that is not on this machine or generates text;
        the batch does not divide over the mesh.
    """
    if not cfg.names:
        return None
    check_installed(cfg)
    check_batch_size(batch_size, mesh)
    if seq_len < 2:
        raise ValueError(f"lm_eval: {seq_len=} has no room for a token and one that is predicted; choose 2 or more.")
    with phase("lm_eval: loading tasks") as say:
        tokenizer = lev.load_tokenizer(str(prepared.tokenizer_dir))
        from train.harness_model import HarnessModel
        from train.harness_tasks import load_tasks

        with together.first_process_first("preparing lm-eval's tasks"), quiet_and_seeded():
            tasks = load_tasks(cfg, prepared, say)
    build_model = partial(HarnessModel, tokenizer, seq_len=seq_len, batch_size=batch_size)
    return Harness(cfg, tasks, scorer(per_token_scores, mesh), build_model)


def check_installed(cfg: HarnessConfig) -> None:
    """Raises ValueError where tasks are named and lm-eval is not there."""
    if cfg.names and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"lm_eval: {', '.join(cfg.names)} need lm-eval, which is not installed. Run `uv sync --extra eval` (or"
            " `uv run --extra eval python -m ...`), or name no tasks."
        )


def scorer(per_token_scores: PerTokenScores, mesh: "Mesh"):
    """(params, packed batch) -> both scores as NumPy arrays, the same in every process."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    by_row = NamedSharding(mesh, P(BATCH_AXES, None))

    @jax.jit
    def scores(params, example):
        return [jax.reshard(array, P(None, None)) for array in per_token_scores(params, example)]

    def place(array: "np.ndarray") -> "Array":
        return jax.make_array_from_callback(array.shape, by_row, lambda index: array[index])

    def score(params: Any, batch: "PackedBatch") -> tuple["np.ndarray", "np.ndarray"]:
        example = example_of(*map(place, (batch.tokens, batch.loss_weight, batch.segment_ids)))
        with jax.set_mesh(mesh):
            nats, likeliest = scores(params, example)
        return np.asarray(nats), np.asarray(likeliest)

    return score


def example_of(tokens: "Array", loss_weight: "Array", segment_ids: "Array") -> Any:
    """A `GrugLmExample`, what the training loop's batches are."""
    causal = lev.GrugLmExample(tokens, loss_weight)
    return lev.GrugLmExample(tokens, loss_weight, causal.attn_mask.with_segment_ids(segment_ids))


def metrics_of(results: Mapping[str, Any], prefix: str = "lm_eval") -> dict[str, float]:
    """lm-eval's results as Levanter names them.

    <prefix>/<task or group>/<metric>, and <metric>_stderr where there is one; ",none" is left out of their names.
    <prefix>/averages/macro_avg_<metric> over the tasks that have it, micro_avg_ weighted by their documents.
    """
    metrics = {
        f"{prefix}/{task}/{name.removesuffix(',none')}": float(value)
        for task, values in results["results"].items()
        for name, value in values.items()
        if _is_number(value)
    }
    documents = {task: count["effective"] for task, count in results["n-samples"].items()}
    rows: dict[str, list[tuple[float, int]]] = {}
    for task, weight in documents.items():
        for name, value in results["results"][task].items():
            if _is_number(value) and "," in name and "_stderr" not in name:
                rows.setdefault(name.removesuffix(",none"), []).append((float(value), weight))
    for name, values in rows.items():
        metrics[f"{prefix}/averages/macro_avg_{name}"] = sum(value for value, _ in values) / len(values)
        weights = sum(weight for _, weight in values)
        metrics[f"{prefix}/averages/micro_avg_{name}"] = sum(value * weight for value, weight in values) / weights
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@contextlib.contextmanager
def quiet_and_seeded() -> Iterator[None]:
    """Inside, lm-eval draws no progress bars, leaves stdout alone, and draws the same random numbers every time;
    outside, Python's and NumPy's go on as if nothing had happened."""
    import lm_eval.api.task
    import numpy as np

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # or it forks to resample, beside jax's threads
    drawn = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        without_bar = mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items)
        with without_bar, contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])

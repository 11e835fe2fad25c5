# SPDX-License-Identifier: Apache-2.0
"""State, step and loop of this variant. What every variant shares is called from `train/`, in a line each."""

from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from grug_kernels.attention import AttentionMask
from train import lev
from train.batches import say_if_data_moved
from train.checkpoint import Checkpoints, restore_latest_or_initialize
from train.compiled import compile_step, compile_watched_step, keep_compiled_programs, peak_of_device
from train.config import GrugTrainerConfig
from train.data import (
    PreparedData,
    build_train_dataset,
    build_train_loader,
    cache_directory,
    iter_from_step,
    prepare,
)
from train.evaluate import GrugEvalConfig, build_tagged_evaluator
from train.failure_bundle import Evidence, Loop
from train.harness import Harness, build_harness
from train.mesh import create_mesh
from train.metrics import Meter
from train.mixture import mixture_metrics, mixture_news
from train.offload import check_offload, in_parts, placed, shapes_of, to_device
from train.optimizer import Optimizer, hyperparameters
from train.outcome import advice_on_failure, already_finished, baselines, finish
from train.profile import Profile
from train.progress import Progress, phase
from train.rundir import as_dict, check_fit, check_vocab_size, open_run
from train.sample import sample
from train.shapes import check_splits
from train.sharding import write_sharding
from train.tracker import RunTracker, start_tracker
from train.tree_stats import watched
from train.watch import WatchConfig

from .model import GrugModelConfig, GrugModelParameters, Transformer, matrix_axes

if TYPE_CHECKING:
    from .launch import GrugBaseLaunchConfig


class GrugTrainState(eqx.Module):
    """Everything a checkpoint holds. `step` counts completed steps."""

    step: Int[Array, ""]
    params: GrugModelParameters
    opt_state: optax.OptState
    ema_params: GrugModelParameters | None
    training_key: PRNGKeyArray


def init_train_state(
    cfg: GrugModelConfig, optimizer: Optimizer, trainer: GrugTrainerConfig, *, key: PRNGKeyArray
) -> GrugTrainState:
    params_key, training_key = jax.random.split(key)
    params = Transformer.init(cfg, key=params_key)
    state = GrugTrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=params if trainer.ema_beta is not None else None,
        training_key=training_key,
    )
    return placed(state, trainer.offload)


def mask_of(batch: Any) -> AttentionMask:
    """Causal, and no document sees another."""
    return AttentionMask(causal=True, segment_ids=batch.attn_mask.segment_ids[0])


def training_loss(params: GrugModelParameters, batch: Any, trainer: GrugTrainerConfig):
    """The mean over the batch, and its parts. batch has tokens, loss_weight, attn_mask (a GrugLmExample)."""
    return params.next_token_loss(batch.tokens, batch.loss_weight, mask_of(batch), z_loss_weight=trainer.z_loss_weight)


def make_train_step(optimizer: Optimizer, trainer: GrugTrainerConfig, watch: WatchConfig | None = None):
    """train_step(state, batch) -> (state, metrics); batch as for `training_loss`."""

    @partial(jax.jit, donate_argnums=0)  # the old state's memory becomes the new state's
    def train_step(state: GrugTrainState, batch: Any) -> tuple[GrugTrainState, dict[str, Array]]:
        (loss, (parts, routing)), grads = jax.value_and_grad(training_loss, has_aux=True)(state.params, batch, trainer)
        grad_norm = optax.global_norm(grads)

        def update(grads, params, opt_state, ema_params):  # every parameter by itself
            updates, opt_state = optimizer.update(grads, opt_state, params, grad_norm=grad_norm)
            params = eqx.apply_updates(params, updates)
            if (beta := trainer.ema_beta) is not None:
                ema_params = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, ema_params, params)
            return updates, params, opt_state, ema_params

        with jax.named_scope("optimizer"):
            updates, params, opt_state, ema_params = in_parts(
                update, grads, state.params, state.opt_state, state.ema_params
            )
        metrics = {
            "train/loss": loss,
            "train/cross_entropy": parts.cross_entropy,
            "train/z_loss": parts.z_loss,
            "train/load_balance_loss": routing.load_balance_loss,
            "train/router_z_loss": routing.z_loss,
            "train/expert_load_max": routing.max_load,
            "train/grad_norm": grad_norm,
            "train/update_norm": optax.global_norm(updates),
            **hyperparameters(opt_state),
            **watched(watch, grads=grads, params=params, updates=updates, opt_state=opt_state),
        }
        step = state.step + 1
        return GrugTrainState(step, params, opt_state, ema_params, state.training_key), metrics

    return train_step


def per_token_losses(params: GrugModelParameters, batch: Any) -> tuple[Array, Array, Array]:
    """For evaluation: -log p, weight and target token of every position, each [batch, seq_len]."""
    losses = params.next_token_losses(batch.tokens, batch.loss_weight, mask_of(batch))
    return losses, batch.loss_weight, jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))


def per_token_scores(params: GrugModelParameters, batch: Any) -> tuple[Array, Array]:
    """For lm-eval: -log p of the next token of every position, and whether it is the most likely; [batch, seq_len]."""
    return params.next_token_scores(batch.tokens, batch.loss_weight, mask_of(batch))


def evaluations(state: GrugTrainState, evaluators: dict[str, Any], cfg: GrugEvalConfig) -> dict[str, float]:
    """By each evaluator <prefix>/* of the weights, and <prefix>/ema/* of their average, where there is one."""
    metrics = {}
    for prefix, evaluate in evaluators.items():
        if cfg.eval_current or state.ema_params is None:
            metrics |= evaluate(state.params, prefix)
        if cfg.eval_ema and state.ema_params is not None:
            metrics |= evaluate(to_device(state.ema_params), f"{prefix}/ema")
    return metrics


def run_grug(variant: str, config: "GrugBaseLaunchConfig") -> None:
    """Trains to the last step, from the newest checkpoint where there is one, and writes summary and report.

    Raises:
      ValueError, OSError: something does not fit, or cannot be read or written; the message says how to mend it.
      SystemExit: the run had to end (a loss that is not finite, a full disk); what is saved has been said.
    """
    started = perf_counter()
    trainer = config.trainer
    check_fit(config)
    mesh = create_mesh(trainer.batch_size, **trainer.mesh_axes)
    check_splits(Transformer, config.model, mesh)
    check_offload(trainer.offload, mesh)
    optimizer = config.optimizer.build(trainer.steps, matrix_axes=matrix_axes)
    run = open_run(variant, config)
    keep_compiled_programs(cache_directory(config.data))
    lev.import_in_background()
    with phase("data") as detail:
        data = prepare(config.data, detail)
    check_vocab_size(config, data.vocab_size)
    harness = build_harness(config.eval.harness, data, trainer.seq_len, trainer.batch_size, mesh, per_token_scores)

    with jax.set_mesh(mesh):
        key = jax.random.key(trainer.seed)
        init = partial(jax.jit(partial(init_train_state, config.model, optimizer, trainer)), key=key)
        state, resumed = restore_latest_or_initialize(
            [run.checkpoints, *filter(None, [trainer.load_checkpoint_path])],
            shapes_of(init),
            mesh=mesh,
            init=init,
            require=trainer.load_checkpoint,
        )
        if state.step >= trainer.steps and run.is_summarised:
            return already_finished(run, int(state.step))
        say_if_data_moved(resumed, config)
        run.write_config(config)
        write_sharding(run.path, state, mesh)
        with (
            start_tracker(run.path, run.run_id, as_dict(config), config.tracker) as tracker,
            advice_on_failure(run, config, init, tracker) as evidence,
            Profile(config.profile, run.profiler, tracker) as profile,
        ):
            checkpoints = Checkpoints(
                run.checkpoints, config.checkpoint, metadata=run.describe(config, data), resumed=resumed
            )
            evidence.wait_for_saves = checkpoints.wait
            state = train(config, data, optimizer, mesh, state, tracker, checkpoints, profile, harness, evidence)
            finish(run, started, lambda: sample(state.params, data.tokenizer))


def train(
    config: "GrugBaseLaunchConfig",
    data: PreparedData,
    optimizer: Optimizer,
    mesh: Mesh,
    state: GrugTrainState,
    tracker: RunTracker,
    checkpoints: Checkpoints,
    profile: Profile,
    harness: Harness | None,
    evidence: Evidence,
) -> GrugTrainState:
    """Every step from `state` to the last one: load, step, log, sometimes save, sometimes evaluate."""
    trainer, batch_size, seq_len = config.trainer, config.trainer.batch_size, config.trainer.seq_len
    start = int(state.step)
    dataset = build_train_dataset(data, config.data, seq_len, batch_size, trainer.seed)
    loader = build_train_loader(dataset, mesh, batch_size)
    evaluate = build_tagged_evaluator(data, config.data, config.eval, seq_len, batch_size, mesh, per_token_losses)
    tracker.log_summary(baselines(data))
    meter = Meter(
        tracker,
        total_steps=trainer.steps,
        batch_size=batch_size,
        seq_len=seq_len,
        flops=config.model.flops_per_token(seq_len),
        peak=peak_of_device(trainer.peak_tflops),
        log_every=trainer.log_every,
        start_step=start,
        skipped=dataset.skipped,
    )

    def evaluators(step: int) -> dict[str, Any]:
        """Those that are due after `step`, by the prefix of their metrics."""
        on_text = step % config.eval.every == 0 or step == trainer.steps
        on_tasks = config.eval.harness.is_due(step, trainer.steps)
        return {**({"eval": evaluate} if on_text else {}), **({"lm_eval": harness} if on_tasks else {})}

    with iter_from_step(loader, start) as batches, Progress(trainer.steps, start) as bar:
        meter.tell = bar.say
        first = next(batches)
        train_step = make_train_step(optimizer, trainer)
        train_step = compile_step(train_step, state, first, tracker, require_kernels=trainer.require_kernels)
        watched_step = compile_watched_step(partial(make_train_step, optimizer, trainer), config.watch, state, first)
        batches = chain([first], batches)
        loss = partial(training_loss, trainer=trainer)
        evidence.loop = Loop(meter, loader, train_step, loss, data.tokenizer_dir)
        if start and (due := evaluators(start)):  # perhaps not yet: it may have been stopped after the save
            tracker.log(evaluations(state, due, config.eval), step=start)
        for step in profile.steps(range(start + 1, trainer.steps + 1), meter, bar.say):
            with meter.loading():
                batch = next(batches)
            state, metrics = (watched_step if config.watch.is_due(step) else train_step)(state, batch)
            evidence.state = state
            meter.step(step, metrics)
            bar.update(step, meter.last)
            with meter.hooks():
                if news := mixture_news(dataset, step):
                    bar.say(news)
                if news or step % trainer.log_every == 0:
                    tracker.log(mixture_metrics(dataset, step), step=step)
                # Saved before it is evaluated, or a failing evaluation would cost the steps since the last checkpoint.
                # And looked at before it is saved: meter.flush raises where a loss, gradient or update is not finite.
                checkpoints.on_step(state, step, before_save=meter.flush)
                if due := evaluators(step):
                    meter.flush()
                    with checkpoints.interruptible(state, step):
                        tracker.log(evaluations(state, due, config.eval), step=step)
    checkpoints.save(state, trainer.steps)
    checkpoints.wait()
    return state

# SPDX-License-Identifier: Apache-2.0
"""In which shares the components are mixed, from which step on, and what to say of it."""

import math

from train.batches import TrainSequences, batch_number

Weights = dict[str, float]
Stages = list[tuple[int, Weights]]


def as_stages(weights: Weights | Stages) -> Stages:
    return [(0, weights)] if isinstance(weights, dict) else [(step, shares) for step, shares in weights]


def check_stages(weights: Weights | Stages, components: tuple[str, ...]) -> Stages:
    """`weights` as stages of (first step, shares).

    Raises:
      ValueError: a name that is no component, shares that are negative or all zero, stages not in order from step 0.
    """
    stages = as_stages(weights)
    steps = [step for step, _ in stages]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"DataConfig.weights: stages begin at steps {steps}; they must ascend from step 0.")
    for step, shares in stages:
        if unknown := [name for name in shares if name not in components]:
            raise ValueError(
                f"DataConfig.weights: no component is called {', '.join(map(repr, unknown))} (stage of step {step})."
                f" Those there are: {', '.join(components)}."
            )
        if min(shares.values(), default=0) < 0 or sum(shares.values()) <= 0:
            raise ValueError(
                f"DataConfig.weights: {shares} (stage of step {step}); shares are at least 0 and their sum is above 0."
            )
    return stages


def check_blocks(stages: Stages, batch_size: int, block_size: int) -> None:
    """Raises ValueError unless every stage begins with a block of the mixture, and every share has room in a block."""
    for step, shares in stages:
        if step * batch_size % block_size:
            every = block_size // math.gcd(batch_size, block_size)
            raise ValueError(
                f"DataConfig.weights: the stage of step {step} begins at sequence {step} x batch_size {batch_size} ="
                f" {step * batch_size}, which is not a multiple of mixture_block_size={block_size}. Begin it at a"
                f" multiple of {every} steps: {step // every * every} or {(step // every + 1) * every}."
            )
        for name, share in shares.items():
            # Levanter counts in whole sequences per block, and would leave the component out with a Python warning.
            if 0 < (sequences := share / sum(shares.values()) * block_size) < 1:
                raise ValueError(
                    f"DataConfig.weights: {name} has {share:g} of {sum(shares.values()):g} (stage of step {step}):"
                    f" that is {sequences:.2g} sequences of a block of {block_size}, so it would never be read. Choose"
                    f" a larger share, or mixture_block_size={math.ceil(block_size / sequences)} or more."
                )


def trained_on(stages: Stages) -> set[str]:
    """The components that some stage has a share of."""
    return {name for _, shares in stages for name, share in shares.items() if share > 0}


def mixture_metrics(dataset: TrainSequences, step: int) -> dict[str, float]:
    """The stage and shares that the batch of step `step` was drawn with, and how often each component was read before.

    Each component is counted up to the mixture block that the batch begins in; batches left out count as read.
    """
    mixture = dataset.mixture
    block = batch_number(step, dataset.skipped) * dataset.batch_size // mixture.block_size
    stage = _stage_of(dataset, step)
    metrics: dict[str, float] = {"mixture/stage": stage}
    for name, share in mixture.weight_stages[stage][1].items():
        metrics[f"mixture/weight/{name}"] = share
    for name, sequences in mixture.sequence_counts_before_block(block).items():
        metrics[f"mixture/epochs/{name}"] = sequences / len(mixture.datasets[name].as_sync_dataset())
    return metrics


def mixture_news(dataset: TrainSequences, step: int) -> str:
    """What step `step` did first: began another stage, or left batches out. Empty at most steps."""
    news = []
    before, batch = (batch_number(number, dataset.skipped) for number in (step - 1, step))
    if batch - before > 1:
        left_out = f"batch {before + 1} is" if batch - before == 2 else f"batches {before + 1} to {batch - 1} are"
        news.append(f"{left_out} left out (data.skip_batches)")
    if step > 1 and (stage := _stage_of(dataset, step)) != _stage_of(dataset, step - 1):
        stages = dataset.mixture.weight_stages
        shares = ", ".join(f"{name} {share:.4g}" for name, share in stages[stage][1].items())
        news.append(f"the data mixture enters stage {stage} (the last is {len(stages) - 1}): {shares}")
    return f"step {step}: {'; '.join(news)}" if news else ""


def _stage_of(dataset: TrainSequences, step: int) -> int:
    """The stage that the batch of step `step` begins in."""
    first = batch_number(step, dataset.skipped) * dataset.batch_size
    return sum(start <= first for start, _ in dataset.mixture.weight_stages) - 1

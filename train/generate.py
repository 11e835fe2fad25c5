# SPDX-License-Identifier: Apache-2.0
"""Token after token from a model: one reading of the prompts, then a step a token, with keys and values remembered.

Two programs, of fixed shapes, are compiled: the reading and the step. They ask three things of a variant's Transformer:
`empty_cache`, `extend` and `unembed`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from train.mesh import BATCH_AXES, batch_shards
from train.sample import Sampling


def generate(
    params: Any, prompts: list[list[int]], sampling: Sampling, *, eos_id: int, prompt_len: int | None = None
) -> Iterator[list[int | None]]:
    """The next token of every prompt, `sampling.new_tokens` times: None after the token that ended its document, and
    after the last that the model can read (max_seq_len).

    Stops when nothing is left to write. What is drawn for a prompt depends on the seed, on the prompt's place in the
    list and on the position, not on the devices.

    prompt_len: the length to which prompts are padded; that of the longest unless given. Calls with the same one share
    their programs.

    Raises:
      ValueError: a prompt is empty, or leaves no room for a token.
    """
    prompt_len = prompt_len or max(map(len, prompts))
    window = params.config.max_seq_len
    if min(map(len, prompts)) < 1 or prompt_len >= window:
        raise ValueError(
            f"sample: prompts have {', '.join(str(len(prompt)) for prompt in prompts)} tokens. A prompt has at least 1,"
            f" and the model reads {window} with those it writes (max_seq_len): at most {window - 1}."
        )
    shards = batch_shards(jax.sharding.get_abstract_mesh())
    rows = -(-len(prompts) // shards) * shards  # each shard takes an equal share: prompts are repeated
    tokens = np.full((rows, prompt_len), eos_id, np.int32)
    ends = np.empty(rows, np.int32)
    for row in range(rows):
        prompt = prompts[row % len(prompts)]
        tokens[row, : len(prompt)], ends[row] = prompt, len(prompt)

    chosen, cache = _read(params, tokens, ends, sampling, min(prompt_len + sampling.new_tokens, window))
    over = [False] * len(prompts)
    for position in range(sampling.new_tokens):  # after the prompt
        if position:
            chosen, cache = _write(params, chosen, ends + position - 1, cache, sampling)
        found = np.asarray(chosen).tolist()
        yield [None if over[row] else found[row] for row in range(len(prompts))]
        over = [over[row] or found[row] == eos_id or ends[row] + position + 1 == window for row in range(len(prompts))]
        if all(over):
            return


@partial(jax.jit, static_argnames=("sampling", "length"))
def _read(params: Any, tokens: Int[Array, "rows prompt_len"], ends: Int[Array, " rows"], sampling, length: int):
    """The first token after each prompt, which is its row's first `ends`; and a cache for `length` positions."""
    tokens, ends = jax.reshard((tokens, ends), (P(BATCH_AXES, None), P(BATCH_AXES)))
    cache = params.empty_cache(tokens.shape[0], length)
    hidden, cache = params.extend(tokens, jnp.zeros_like(ends), cache)
    last = hidden.at[jnp.arange(len(ends)), ends - 1].get(out_sharding=P(BATCH_AXES, None))
    return _chosen(params, last, ends, sampling), cache


@partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def _write(params: Any, tokens: Int[Array, " rows"], position: Int[Array, " rows"], cache: Any, sampling):
    """The token after the ones at `position`."""
    tokens, position = jax.reshard((tokens, position), P(BATCH_AXES))
    hidden, cache = params.extend(tokens[:, None], position, cache)
    return _chosen(params, hidden[:, 0], position + 1, sampling), cache


def _chosen(params: Any, hidden: Float[Array, "rows hidden_dim"], position: Int[Array, " rows"], sampling: Sampling):
    """A token for `position` of each row."""
    logits, position = jax.reshard((params.unembed(hidden[:, None])[:, 0], position), P())
    chosen = jnp.argmax(logits, axis=-1)
    if sampling.temperature > 0:
        row_key = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), jnp.arange(len(position)))
        keys = jax.vmap(jax.random.fold_in)(row_key, position)
        chosen = jax.vmap(jax.random.categorical)(keys, filtered(logits / sampling.temperature, sampling))
    return chosen.astype(jnp.int32)


def filtered(scores: Float[Array, "rows vocab_size"], sampling: Sampling) -> Float[Array, "rows vocab_size"]:
    """-inf for what may not be drawn: all but the `top_k` best, or all but the fewest that together have `top_p`."""
    if sampling.top_k is not None:
        least = jax.lax.top_k(scores, min(sampling.top_k, scores.shape[-1]))[0][:, -1:]
    elif sampling.top_p is not None:
        best = jnp.sort(scores, axis=-1, descending=True)
        share = jax.nn.softmax(best, axis=-1)
        needed = jnp.cumsum(share, axis=-1) - share < sampling.top_p  # those before it have less
        least = jnp.min(jnp.where(needed, best, jnp.inf), axis=-1, keepdims=True)
    else:
        return scores
    return jnp.where(scores >= least, scores, -jnp.inf)

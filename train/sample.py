# SPDX-License-Identifier: Apache-2.0
"""A few lines from the model, to look at: the whole sequence again for every token, nothing cached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = ("def main(", "The for statement is used", "import ")


def sample(
    logits: Callable[[Any, Any], Any],
    params: Any,
    tokenizer_dir: Path,
    *,
    max_seq_len: int,
    prompts: tuple[str, ...] = PROMPTS,
    new_tokens: int = 40,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[str]:
    """Continues each prompt by `new_tokens` tokens, or as many as `max_seq_len` leaves room for.

    logits: (params, tokens int32 [batch, seq_len]) -> float32 [batch, seq_len, vocab_size], causal. The batch is as
    many prompts as there are devices over ("replica_dcn", "data"), or more: prompts are repeated to fill it.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    mesh = jax.sharding.get_abstract_mesh().shape
    shards = mesh.get("replica_dcn", 1) * mesh.get("data", 1)
    # A model that reads few tokens sees the beginning of a prompt, and still writes something.
    rows = [tokenizer.encode(prompt).ids[: max_seq_len // 2] for prompt in prompts]
    batch = -(-len(rows) // shards) * shards
    new_tokens = min(new_tokens, max_seq_len - max(map(len, rows)))
    length = max(map(len, rows)) + new_tokens
    tokens = np.zeros((batch, length), np.int32)
    for index in range(batch):
        row = rows[index % len(rows)]
        tokens[index, : len(row)] = row
    ends = jnp.array([len(rows[index % len(rows)]) for index in range(batch)])

    @jax.jit
    def extend(params, tokens, ends, key):
        scores = jax.reshard(logits(params, tokens), P(None, None, None))[jnp.arange(batch), ends - 1]
        chosen = jax.random.categorical(key, scores / temperature)
        whole = jax.reshard(tokens, P(None, None)).at[jnp.arange(batch), ends].set(chosen)
        return jax.reshard(whole, P(("replica_dcn", "data"), None)), ends + 1

    tokens = jax.device_put(tokens, P(("replica_dcn", "data"), None))
    for key in jax.random.split(jax.random.key(seed), new_tokens):
        tokens, ends = extend(params, tokens, ends, key)
    written = np.asarray(tokens)
    return [tokenizer.decode(written[index, : len(row) + new_tokens].tolist()) for index, row in enumerate(rows)]

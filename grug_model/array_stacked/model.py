# SPDX-License-Identifier: Apache-2.0
"""The base transformer with its blocks stacked: one block whose arrays have a leading layer axis, run by one scan.

Compile time and program size do not grow with depth. RMSNorm, rotary positions, grouped-query attention, gated MLP,
untied head.

Plain arrays, sharding written where it happens. Under `jax.set_mesh`, weights are born split over FSDP and "model";
each is gathered over FSDP where it is used, activations are split over batch and positions.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from grug_kernels.attention import AttentionMask, Intervals, attention
from grug_kernels.cross_entropy import linear_cross_entropy, token_losses
from grug_kernels.mfu import TokenFlops
from grug_kernels.stacked import ArrayStacked

BATCH = ("replica_dcn", "data", "expert")
FSDP = ("data", "context")
HEADS = P(BATCH, None, "model", None)  # of a cache, whose positions are whole


@dataclass(frozen=True)
class GrugModelConfig:
    """Sizes of the model. The default is the 130M template."""

    vocab_size: int = 128_256
    hidden_dim: int = 512
    intermediate_dim: int = 1792
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64
    max_seq_len: int = 4096
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    # Weights are float32; activations, and weights where they are used, have this type.
    compute_dtype: str = "bfloat16"
    # What a layer keeps for the backward pass, from the most memory to the least: grug_kernels/stacked/remat.py.
    remat: Literal["none", "save_matmuls", "save_attention", "full", "nested", "offload"] = "full"
    # Whether weights of the next layer are gathered while a layer works, which hides them on a TPU7x; for remat "full".
    prefetch: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if type(size) in (int, float) and size <= 0:
                raise ValueError(f"GrugModelConfig: {field.name}={size}; sizes are positive.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"GrugModelConfig: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}."
                " Each key head serves num_heads // num_kv_heads query heads; choose a num_kv_heads that divides it."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"GrugModelConfig: head_dim={self.head_dim} is odd; rotary positions turn pairs of numbers."
            )
        if self.prefetch and self.remat != "full":
            raise ValueError(
                f"GrugModelConfig: prefetch takes remat='full', not {self.remat!r}; set it, or leave it out."
            )
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"GrugModelConfig: compute_dtype={self.compute_dtype!r}; choose bfloat16 or float32.")

    def flops_per_token(self, seq_len: int) -> "TokenFlops":
        """FLOPs of one token of a row of seq_len, by component."""
        d, n, k, h = self.hidden_dim, self.num_heads, self.num_kv_heads, self.head_dim
        projections = self.num_layers * 2 * d * h * (2 * n + 2 * k)
        attention = self.num_layers * 4 * seq_len * n * h
        causal = attention * (seq_len + 1) / 2 / seq_len
        mlp = self.num_layers * 6 * d * self.intermediate_dim
        # A layer that runs again stops short of w_down, whose output no gradient asks for; a group of layers does not.
        layer, group = projections + 2 / 3 * mlp, projections + mlp
        layers_again = {"none": 0, "save_matmuls": 0, "nested": group + layer}.get(self.remat, layer)
        attention_again = {"full": causal, "offload": causal, "nested": 2 * causal}.get(self.remat, 0)
        return TokenFlops(
            projections=projections,
            attention=attention,
            softmax=self.num_layers * 3 * seq_len * n,
            attention_causal=causal,
            mlp=mlp,
            head=2 * d * self.vocab_size,
            recompute=layers_again + attention_again + causal / 2,
        )


def init_weight(key: PRNGKeyArray, shape: tuple[int, ...], *, fan_in: int, spec: P) -> Array:
    """Normal with variance 1 / fan_in, cut at 3 standard deviations; float32, born with sharding `spec`."""
    return jax.random.truncated_normal(key, -3.0, 3.0, shape, out_sharding=spec) * fan_in**-0.5


def by_token(x: Array, *last: str | None) -> P:
    """Batch and positions split as those of x: over BATCH, and over "context" but while it samples; then `last`."""
    return P(*jax.typeof(x).sharding.spec[:2], *last)


class RMSNorm(eqx.Module):
    scale: Float[Array, " hidden_dim"]
    eps: float = eqx.field(static=True)

    @staticmethod
    def init(cfg: GrugModelConfig) -> "RMSNorm":
        return RMSNorm(scale=jnp.ones(cfg.hidden_dim, out_sharding=P(None)), eps=cfg.layer_norm_eps)

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "batch seq_len hidden_dim"]) -> Float[Array, "batch seq_len hidden_dim"]:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale).astype(x.dtype)


class Cache(NamedTuple):
    """Keys and values of a layer, for sampling: those of position p lie at p."""

    k: Float[Array, "*layers batch length num_kv_heads head_dim"]
    v: Float[Array, "*layers batch length num_kv_heads head_dim"]


def rotate(
    x: Float[Array, "batch seq_len heads head_dim"], theta: float, position: Int[Array, "batch seq_len"] | None = None
) -> Float[Array, "batch seq_len heads head_dim"]:
    """The pair (x[i], x[i + head_dim/2]) at position t turns by t * theta**(-2i/head_dim). Source: arXiv:2104.09864."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    turns = jnp.arange(x.shape[1], dtype=jnp.float32) if position is None else position.astype(jnp.float32)
    angle = turns[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(eqx.Module):
    w_q: Float[Array, "hidden_dim num_heads head_dim"]
    w_k: Float[Array, "hidden_dim num_kv_heads head_dim"]
    w_v: Float[Array, "hidden_dim num_kv_heads head_dim"]
    w_o: Float[Array, "num_heads head_dim hidden_dim"]
    rope_theta: float = eqx.field(static=True)

    @staticmethod
    def init(cfg: GrugModelConfig, *, key: PRNGKeyArray) -> "Attention":
        d, n, k, h = cfg.hidden_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        return Attention(
            w_q=init_weight(q_key, (d, n, h), fan_in=d, spec=P(FSDP, "model", None)),
            w_k=init_weight(k_key, (d, k, h), fan_in=d, spec=P(FSDP, "model", None)),
            w_v=init_weight(v_key, (d, k, h), fan_in=d, spec=P(FSDP, "model", None)),
            w_o=init_weight(o_key, (n, h, d), fan_in=n * h, spec=P("model", None, FSDP)),
            rope_theta=cfg.rope_theta,
        )

    @jax.named_scope("attention_layer")
    def __call__(
        self, x: Float[Array, "batch seq_len hidden_dim"], mask: AttentionMask | Intervals
    ) -> Float[Array, "batch seq_len hidden_dim"]:
        return self._mixed(*self._heads(x), mask)

    @jax.named_scope("attention_layer")
    def extend(self, x: Float[Array, "batch seq_len hidden_dim"], position: Int[Array, "batch seq_len"], cache: Cache):
        """As `__call__`, where each row has read what is in `cache` before its first position; and the cache then."""
        q, k, v = self._heads(x, position)
        row = jnp.arange(x.shape[0])[:, None]
        k = cache.k.at[row, position].set(k, out_sharding=HEADS)
        v = cache.v.at[row, position].set(v, out_sharding=HEADS)
        return self._mixed(q, k, v, Intervals(jnp.zeros_like(position), position + 1)), Cache(k, v)

    def _heads(self, x, position=None):
        """q [batch, seq_len, num_heads, head_dim]; k, v [batch, seq_len, num_kv_heads, head_dim]"""
        heads = by_token(x, "model", None)
        q = jnp.einsum("btd,dnh->btnh", x, self.w_q.astype(x.dtype), out_sharding=heads)
        k = jnp.einsum("bsd,dkh->bskh", x, self.w_k.astype(x.dtype), out_sharding=heads)
        v = jnp.einsum("bsd,dkh->bskh", x, self.w_v.astype(x.dtype), out_sharding=heads)
        return rotate(q, self.rope_theta, position), rotate(k, self.rope_theta, position), v

    def _mixed(self, q, k, v, mask):
        mixed = attention(q, k, v, mask)
        return jnp.einsum("btnh,nhd->btd", mixed, self.w_o.astype(q.dtype), out_sharding=by_token(q, None))


class MLP(eqx.Module):
    w_gate: Float[Array, "hidden_dim intermediate_dim"]
    w_up: Float[Array, "hidden_dim intermediate_dim"]
    w_down: Float[Array, "intermediate_dim hidden_dim"]

    @staticmethod
    def init(cfg: GrugModelConfig, *, key: PRNGKeyArray) -> "MLP":
        d, f = cfg.hidden_dim, cfg.intermediate_dim
        gate_key, up_key, down_key = jax.random.split(key, 3)
        return MLP(
            w_gate=init_weight(gate_key, (d, f), fan_in=d, spec=P(FSDP, "model")),
            w_up=init_weight(up_key, (d, f), fan_in=d, spec=P(FSDP, "model")),
            w_down=init_weight(down_key, (f, d), fan_in=f, spec=P("model", FSDP)),
        )

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "batch seq_len hidden_dim"]) -> Float[Array, "batch seq_len hidden_dim"]:
        wide = by_token(x, "model")
        gate = jnp.einsum("btd,df->btf", x, self.w_gate.astype(x.dtype), out_sharding=wide)
        up = jnp.einsum("btd,df->btf", x, self.w_up.astype(x.dtype), out_sharding=wide)
        return jnp.einsum(
            "btf,fd->btd", jax.nn.silu(gate) * up, self.w_down.astype(x.dtype), out_sharding=by_token(x, None)
        )


class Block(eqx.Module):
    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP

    @staticmethod
    def init(cfg: GrugModelConfig, *, key: PRNGKeyArray) -> "Block":
        attention_key, mlp_key = jax.random.split(key)
        return Block(
            attention_norm=RMSNorm.init(cfg),
            attention=Attention.init(cfg, key=attention_key),
            mlp_norm=RMSNorm.init(cfg),
            mlp=MLP.init(cfg, key=mlp_key),
        )

    def __call__(
        self, x: Float[Array, "batch seq_len hidden_dim"], mask: AttentionMask | Intervals
    ) -> Float[Array, "batch seq_len hidden_dim"]:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))

    def extend(self, x: Float[Array, "batch seq_len hidden_dim"], position: Int[Array, "batch seq_len"], cache: Cache):
        mixed, cache = self.attention.extend(self.attention_norm(x), position, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


def gathered(block: Block, dtype: str) -> Block:
    """Its matrices as its layer uses them: in the compute type, whole but for what "model" splits."""

    def whole(weight: Array) -> Array:
        spec = P(*(None if axis == FSDP else axis for axis in jax.typeof(weight).sharding.spec))
        return weight if weight.ndim == 1 else jax.reshard(weight.astype(dtype), spec)

    return jax.tree.map(whole, block)


class Transformer(eqx.Module):
    token_embed: Float[Array, "vocab_size hidden_dim"]
    blocks: ArrayStacked[Block]
    final_norm: RMSNorm
    lm_head: Float[Array, "hidden_dim vocab_size"]
    config: GrugModelConfig = eqx.field(static=True)

    @staticmethod
    def init(cfg: GrugModelConfig, *, key: PRNGKeyArray) -> "Transformer":
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        v, d = cfg.vocab_size, cfg.hidden_dim
        return Transformer(
            token_embed=init_weight(embed_key, (v, d), fan_in=1, spec=P(FSDP, "model")),
            blocks=ArrayStacked.init(cfg.num_layers, Block)(cfg, key=blocks_key),
            final_norm=RMSNorm.init(cfg),
            lm_head=init_weight(head_key, (d, v), fan_in=d, spec=P(FSDP, "model")),
            config=cfg,
        )

    def __call__(
        self, tokens: Int[Array, "batch seq_len"], mask: AttentionMask
    ) -> Float[Array, "batch seq_len hidden_dim"]:
        """The normalised output of the last layer: what the head reads."""
        batch, seq_len = tokens.shape
        if seq_len > self.config.max_seq_len:
            raise ValueError(
                f"Transformer: {seq_len=} is longer than max_seq_len={self.config.max_seq_len}."
                " Cut the sequences, or train with a larger max_seq_len."
            )
        x = self._embed(jax.reshard(tokens, P(BATCH, "context")))
        seen = mask.intervals(batch, seq_len, seq_len)  # once for all layers
        ahead = partial(gathered, dtype=self.config.compute_dtype) if self.config.prefetch else None
        x = self.blocks.fold(x, seen, remat=self.config.remat, prefetch=ahead)
        return self.final_norm(x)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` positions of every layer, on the mesh of `jax.set_mesh`."""
        cfg, spec = self.config, P(None, *HEADS)
        shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
        return Cache(*(jnp.zeros(shape, cfg.compute_dtype, out_sharding=spec) for _ in Cache._fields))

    def extend(self, tokens: Int[Array, "batch seq_len"], start: Int[Array, " batch"], cache: Cache):
        """As `__call__`, for rows whose positions before `start` are in `cache`; and the cache with tokens in it.

        What the cache held from `start` on is forgotten: rows that were padded go on where each of them ends.
        """
        position = start[:, None] + jnp.arange(tokens.shape[1])
        x, cache = self.blocks.scan(self._embed(tokens), position, per_layer=cache, call=Block.extend)
        return self.final_norm(x), cache

    def unembed(self, hidden: Float[Array, "batch seq_len hidden_dim"]) -> Float[Array, "batch seq_len vocab_size"]:
        """Float32 logits of what `__call__` or `extend` gave: for sampling. Training never holds them."""
        head = self.lm_head.astype(hidden.dtype)
        out = by_token(hidden, "model")
        return jnp.einsum("btd,dv->btv", hidden, head, out_sharding=out, preferred_element_type=jnp.float32)

    def logits(
        self, tokens: Int[Array, "batch seq_len"], mask: AttentionMask
    ) -> Float[Array, "batch seq_len vocab_size"]:
        return self.unembed(self(tokens, mask))

    def next_token_loss(
        self,
        tokens: Int[Array, "batch seq_len"],
        loss_weight: Float[Array, "batch seq_len"],
        mask: AttentionMask,
        *,
        z_loss_weight: float = 0.0,
    ):
        """Mean over positions, weighted, of -log p(next token) + z_loss_weight * lse**2; and its parts."""
        hidden, labels, weight = self._hidden_and_labels(tokens, loss_weight, mask)
        head = self.lm_head.astype(hidden.dtype)
        return linear_cross_entropy(hidden, head, labels, weight=weight, z_loss_weight=z_loss_weight)

    def next_token_losses(
        self, tokens: Int[Array, "batch seq_len"], loss_weight: Float[Array, "batch seq_len"], mask: AttentionMask
    ) -> Float[Array, "batch seq_len"]:
        """-log p(next token) of every position, for evaluation; at the last one, which has none, any number."""
        hidden, labels, _ = self._hidden_and_labels(tokens, loss_weight, mask)
        losses = token_losses(hidden, self.lm_head.astype(hidden.dtype), labels)[0]
        return jax.reshard(losses, P(BATCH, None))

    def next_token_scores(
        self, tokens: Int[Array, "batch seq_len"], loss_weight: Float[Array, "batch seq_len"], mask: AttentionMask
    ) -> tuple[Float[Array, "batch seq_len"], Bool[Array, "batch seq_len"]]:
        """`next_token_losses`, and whether the next token is the most likely one."""
        hidden, labels, _ = self._hidden_and_labels(tokens, loss_weight, mask)
        losses, *_, argmax = token_losses(hidden, self.lm_head.astype(hidden.dtype), labels, return_argmax=True)
        return jax.reshard((losses, argmax == labels), P(BATCH, None))

    def _embed(self, tokens):
        # Whole rows on every device make the lookup local; the gradient is summed back onto the shards.
        with jax.named_scope("embedding"):
            embed = jax.reshard(self.token_embed.astype(self.config.compute_dtype), P(None, None))
            return embed.at[tokens].get(out_sharding=by_token(tokens, None))

    def _hidden_and_labels(self, tokens, loss_weight, mask):
        """hidden [batch, seq_len, hidden_dim]; labels, the token that follows; weight, 0 where none does."""
        has_next = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
        # Whole rows of tokens come in, so that shifting them moves nothing between devices.
        labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        per_token = jax.reshard((labels, loss_weight * has_next), P(BATCH, "context"))
        return self(tokens, mask), *per_token


GrugModelParameters = Transformer


def matrix_axes(params: Transformer):
    """For Muon: which axes of each block matrix it sums over and which it writes; None where it is no such matrix.

    Counted from the end, so that a leading axis of layers changes nothing.
    """
    axes = {
        "w_q": ((-3,), (-2, -1)),
        "w_k": ((-3,), (-2, -1)),
        "w_v": ((-3,), (-2, -1)),
        "w_o": ((-3, -2), (-1,)),
        "w_gate": ((-2,), (-1,)),
        "w_up": ((-2,), (-1,)),
        "w_down": ((-2,), (-1,)),
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(getattr(path[-1], "name", "")), params)

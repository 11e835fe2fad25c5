# SPDX-License-Identifier: Apache-2.0
"""The stacked transformer with a mixture of experts in place of each MLP: a token goes through the `experts_per_token`
MLPs that its router scores highest, and its result is their sum, weighted by the softmax of those scores.

No expert has a capacity, and no token is dropped: rows sorted by expert are multiplied by `jax.lax.ragged_dot`. What a
token becomes depends on no other token. Two losses are added in training (docs/explanations/moe.md).

Sources: arXiv:1701.06538 (experts), arXiv:2101.03961 (load-balance loss), arXiv:2202.08906 (router z-loss),
arXiv:2211.15841 (without capacity, by grouped matmuls), arXiv:2401.04088 (softmax over the chosen).

Compile time and program size do not grow with depth. RMSNorm, rotary positions, grouped-query attention, untied head.

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
    # Of one expert.
    intermediate_dim: int = 896
    num_experts: int = 8
    experts_per_token: int = 2
    # Weights in the training loss of the means, over layers, of two losses of the router; see `Routing`.
    load_balance_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            may_be_zero = field.name.endswith("loss_weight")
            if isinstance(size, int | float) and (size < 0 or (size == 0 and not may_be_zero)):
                raise ValueError(f"GrugModelConfig: {field.name}={size}; sizes are positive.")
        if not 2 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"GrugModelConfig: experts_per_token={self.experts_per_token}; choose from 2 to num_experts="
                f"{self.num_experts}. One alone would always have weight 1, from which the router learns nothing."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"GrugModelConfig: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}."
                " Each key head serves num_heads // num_kv_heads query heads; choose a num_kv_heads that divides it."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"GrugModelConfig: head_dim={self.head_dim} is odd; rotary positions turn pairs of numbers."
            )
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"GrugModelConfig: compute_dtype={self.compute_dtype!r}; choose bfloat16 or float32.")

    def flops_per_token(self, seq_len: int) -> "TokenFlops":
        """FLOPs of one token of a row of seq_len, by component."""
        d, n, k, h = self.hidden_dim, self.num_heads, self.num_kv_heads, self.head_dim
        projections = self.num_layers * 2 * d * h * (2 * n + 2 * k)
        attention = self.num_layers * 4 * seq_len * n * h
        causal = attention * (seq_len + 1) / 2 / seq_len
        router = self.num_layers * 2 * d * self.num_experts
        experts = self.num_layers * self.experts_per_token * 6 * d * self.intermediate_dim
        # A layer that runs again stops short of w_down, whose output no gradient asks for; a group of layers does not.
        layer, group = projections + router + 2 / 3 * experts, projections + router + experts
        layers_again = {"none": 0, "save_matmuls": 0, "nested": group + layer}.get(self.remat, layer)
        attention_again = {"full": causal, "offload": causal, "nested": 2 * causal}.get(self.remat, 0)
        return TokenFlops(
            projections=projections,
            attention=attention,
            softmax=self.num_layers * 3 * seq_len * n,
            attention_causal=causal,
            mlp=router + experts,
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


class Places(NamedTuple):
    """Of k choices a token, counted token by token, and rows of these choices in another order: row i is choice
    order[i], choice j is row back[j]."""

    order: Int[Array, " rows"]
    back: Int[Array, " rows"]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_rows(tokens: Float[Array, "tokens dim"], places: Places, k: int) -> Float[Array, "rows dim"]:
    """The token of each row."""
    return tokens[places.order // k]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_tokens(rows: Float[Array, "rows dim"], places: Places, k: int) -> Float[Array, "tokens dim"]:
    """The sum of each token's rows."""
    return rows[places.back].reshape(-1, k, rows.shape[-1]).sum(1)


# Each is the other's transpose: both are gathers, where JAX would make scatters.
to_rows.defvjp(
    lambda tokens, places, k: (to_rows(tokens, places, k), places),
    lambda k, places, d_rows: (to_tokens(d_rows, places, k), None),
)
to_tokens.defvjp(
    lambda rows, places, k: (to_tokens(rows, places, k), places),
    lambda k, places, d_tokens: (to_rows(d_tokens, places, k), None),
)


class Routing(NamedTuple):
    """What the router of a layer did, for its losses and for the log. E experts, k of them for each of T tokens.

    load_balance_loss: E sum_e load[e] p[e], where load[e] is the part of the T k choices that fell on e, and p[e] the
      mean of its softmax probability. 1 where both are the same for all experts, E where one has everything.
    z_loss: mean over tokens of the squared log-sum-exp of the router's logits.
    max_load: E max_e load[e], how many times its share the busiest expert has to do.
    """

    load_balance_loss: Float[Array, "*layers"]
    z_loss: Float[Array, "*layers"]
    max_load: Float[Array, "*layers"]


class MoE(eqx.Module):
    router: Float[Array, "hidden_dim num_experts"]
    w_gate: Float[Array, "num_experts hidden_dim intermediate_dim"]
    w_up: Float[Array, "num_experts hidden_dim intermediate_dim"]
    w_down: Float[Array, "num_experts intermediate_dim hidden_dim"]
    experts_per_token: int = eqx.field(static=True)

    @staticmethod
    def init(cfg: GrugModelConfig, *, key: PRNGKeyArray) -> "MoE":
        e, d, f = cfg.num_experts, cfg.hidden_dim, cfg.intermediate_dim
        router_key, gate_key, up_key, down_key = jax.random.split(key, 4)
        return MoE(
            router=init_weight(router_key, (d, e), fan_in=d, spec=P(FSDP, None)),
            w_gate=init_weight(gate_key, (e, d, f), fan_in=d, spec=P("expert", FSDP, "model")),
            w_up=init_weight(up_key, (e, d, f), fan_in=d, spec=P("expert", FSDP, "model")),
            w_down=init_weight(down_key, (e, f, d), fan_in=f, spec=P("expert", "model", FSDP)),
            experts_per_token=cfg.experts_per_token,
        )

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "batch seq_len hidden_dim"]
    ) -> tuple[Float[Array, "batch seq_len hidden_dim"], Routing]:
        chosen, share, routing = self._route(x)
        tokens = by_token(x, None)
        mixed = jax.shard_map(
            _through_experts,
            in_specs=(tokens,) * 3 + (P("expert", FSDP, "model"),) * 2 + (P("expert", "model", FSDP),),
            out_specs=tokens,
        )
        return mixed(x, chosen, share.astype(x.dtype), self.w_gate, self.w_up, self.w_down), routing

    @jax.named_scope("router")
    def _route(self, x: Float[Array, "batch seq_len hidden_dim"]):
        """Experts of each token and their weights, both [batch, seq_len, experts_per_token]; and what that came to."""
        # Which expert is ahead may hang on the last bits: float32, and no bfloat16 passes where a TPU would take them.
        wide = x.astype(jnp.float32)
        logits = jnp.einsum("btd,de->bte", wide, self.router, precision="highest", out_sharding=by_token(x, None))
        num_experts = logits.shape[-1]
        chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), self.experts_per_token)[1]
        is_chosen = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32)
        share = jax.nn.softmax((is_chosen * logits[:, :, None]).sum(-1), axis=-1)
        load, probability = is_chosen.mean((0, 1, 2)), jax.nn.softmax(logits, axis=-1).mean((0, 1))
        routing = Routing(
            load_balance_loss=num_experts * (load * probability).sum(),
            z_loss=(jax.nn.logsumexp(logits, axis=-1) ** 2).mean(),
            max_load=num_experts * load.max(),
        )
        return chosen, share, routing


def _through_experts(x, chosen, share, w_gate, w_up, w_down):
    """On each device, of its tokens [batch, seq_len, hidden_dim] the weighted sum of what their experts make of them.

    Devices along "expert" hold other experts and other tokens. Each takes the tokens of all of them, runs its own
    experts on those that chose one, and the sums go back to where the tokens are from.
    """
    whole = partial(jax.lax.all_gather, axis_name=FSDP, tiled=True)
    w_gate, w_up = (whole(w.astype(x.dtype), axis=1) for w in (w_gate, w_up))
    w_down = whole(w_down.astype(x.dtype), axis=2)
    tokens, chosen, share = (
        jax.lax.all_gather(leaf.reshape(-1, leaf.shape[-1]), "expert", tiled=True) for leaf in (x, chosen, share)
    )
    # A row for each choice: those of this device's experts first, by expert, then those of others.
    num_own = w_gate.shape[0]
    expert = chosen.reshape(-1) - num_own * jax.lax.axis_index("expert")
    expert = jnp.where((expert >= 0) & (expert < num_own), expert, num_own)
    order = jnp.argsort(expert)
    sizes = (expert[:, None] == jnp.arange(num_own)).sum(0)
    # ragged_dot says nothing of rows behind the last group, which others see to: they may not reach sums or gradients.
    own = (jnp.arange(order.size) < sizes.sum())[:, None]
    places, k = Places(order, jnp.argsort(order)), share.shape[-1]
    rows = jnp.where(own, to_rows(tokens, places, k), 0)
    weight = jnp.where(own, to_rows(share.reshape(-1, 1), places, 1), 0)
    gate, up = (jax.lax.ragged_dot(rows, w, sizes) for w in (w_gate, w_up))
    # Weighted before w_down and not after it, so that no gradient asks for the result.
    out = jnp.where(own, jax.lax.ragged_dot(jax.nn.silu(gate) * up * weight, w_down, sizes), 0)
    mixed = jax.lax.psum_scatter(to_tokens(out, places, k), "expert", tiled=True)
    mixed = jax.lax.psum(mixed, "model").reshape(x.shape)
    # While it samples x is the same along "context", and so is this, which the gathered weights hide from JAX.
    return mixed if "context" in jax.typeof(x).manual_axis_type.varying else jax.lax.pmean(mixed, "context")


class Block(eqx.Module):
    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MoE

    @staticmethod
    def init(cfg: GrugModelConfig, *, key: PRNGKeyArray) -> "Block":
        attention_key, mlp_key = jax.random.split(key)
        return Block(
            attention_norm=RMSNorm.init(cfg),
            attention=Attention.init(cfg, key=attention_key),
            mlp_norm=RMSNorm.init(cfg),
            mlp=MoE.init(cfg, key=mlp_key),
        )

    def __call__(
        self, x: Float[Array, "batch seq_len hidden_dim"], mask: AttentionMask | Intervals
    ) -> tuple[Float[Array, "batch seq_len hidden_dim"], Routing]:
        x = x + self.attention(self.attention_norm(x), mask)
        mixed, routing = self.mlp(self.mlp_norm(x))
        return x + mixed, routing

    def extend(self, x: Float[Array, "batch seq_len hidden_dim"], position: Int[Array, "batch seq_len"], cache: Cache):
        mixed, cache = self.attention.extend(self.attention_norm(x), position, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))[0], cache


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
        return self._routed(tokens, mask)[0]

    def _routed(self, tokens, mask):
        """As `__call__`; and the `Routing` of all layers: the mean of each loss, the largest load."""
        batch, seq_len = tokens.shape
        if seq_len > self.config.max_seq_len:
            raise ValueError(
                f"Transformer: {seq_len=} is longer than max_seq_len={self.config.max_seq_len}."
                " Cut the sequences, or train with a larger max_seq_len."
            )
        x = self._embed(jax.reshard(tokens, P(BATCH, "context")))
        seen = mask.intervals(batch, seq_len, seq_len)  # once for all layers
        x, of_layers = self.blocks.scan(x, seen, remat=self.config.remat)
        routing = Routing(of_layers.load_balance_loss.mean(), of_layers.z_loss.mean(), of_layers.max_load.max())
        return self.final_norm(x), routing

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
        """Mean over positions, weighted, of -log p(next token) + z_loss_weight * lse**2, and the losses of the router;
        and the parts of both: LossParts, Routing."""
        hidden, labels, weight, routing = self._hidden_and_labels(tokens, loss_weight, mask)
        head = self.lm_head.astype(hidden.dtype)
        loss, parts = linear_cross_entropy(hidden, head, labels, weight=weight, z_loss_weight=z_loss_weight)
        loss += self.config.load_balance_loss_weight * routing.load_balance_loss
        loss += self.config.router_z_loss_weight * routing.z_loss
        return loss, (parts, routing)

    def next_token_losses(
        self, tokens: Int[Array, "batch seq_len"], loss_weight: Float[Array, "batch seq_len"], mask: AttentionMask
    ) -> Float[Array, "batch seq_len"]:
        """-log p(next token) of every position, for evaluation; at the last one, which has none, any number."""
        hidden, labels, *_ = self._hidden_and_labels(tokens, loss_weight, mask)
        losses = token_losses(hidden, self.lm_head.astype(hidden.dtype), labels)[0]
        return jax.reshard(losses, P(BATCH, None))

    def next_token_scores(
        self, tokens: Int[Array, "batch seq_len"], loss_weight: Float[Array, "batch seq_len"], mask: AttentionMask
    ) -> tuple[Float[Array, "batch seq_len"], Bool[Array, "batch seq_len"]]:
        """`next_token_losses`, and whether the next token is the most likely one."""
        hidden, labels, *_ = self._hidden_and_labels(tokens, loss_weight, mask)
        losses, *_, argmax = token_losses(hidden, self.lm_head.astype(hidden.dtype), labels, return_argmax=True)
        return jax.reshard((losses, argmax == labels), P(BATCH, None))

    def _embed(self, tokens):
        # Whole rows on every device make the lookup local; the gradient is summed back onto the shards.
        with jax.named_scope("embedding"):
            embed = jax.reshard(self.token_embed.astype(self.config.compute_dtype), P(None, None))
            return embed.at[tokens].get(out_sharding=by_token(tokens, None))

    def _hidden_and_labels(self, tokens, loss_weight, mask):
        """hidden [batch, seq_len, hidden_dim]; labels, the token that follows; weight, 0 where none does; and the
        `Routing`."""
        has_next = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
        # Whole rows of tokens come in, so that shifting them moves nothing between devices.
        labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        per_token = jax.reshard((labels, loss_weight * has_next), P(BATCH, "context"))
        hidden, routing = self._routed(tokens, mask)
        return hidden, *per_token, routing


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

# SPDX-License-Identifier: Apache-2.0
"""The loss and its gradients in float64 NumPy, written out by hand, and what the cross-entropy tests share."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from grug_kernels.cross_entropy import LossParts, linear_cross_entropy


@dataclass(frozen=True)
class Inputs:
    hidden: jax.Array
    lm_head: jax.Array
    labels: jax.Array
    weight: jax.Array

    @property
    def arrays(self):
        return self.hidden, self.lm_head, self.labels, self.weight


def random_inputs(tokens=37, hidden_dim=24, vocab_size=101, *, dtype=jnp.float32, scale=1.0, seed=0) -> Inputs:
    """Logits of standard deviation `scale`; every fifth token is ignored by its label, every seventh by its weight."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocab_size, tokens)
    labels[4::5] = -1
    weight = rng.uniform(0.1, 2.0, tokens)
    weight[6::7] = 0
    return Inputs(
        jnp.asarray(rng.normal(size=(tokens, hidden_dim)), dtype),
        jnp.asarray(rng.normal(size=(hidden_dim, vocab_size)) * scale / hidden_dim**0.5, dtype),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(weight, jnp.float32),
    )


def oracle(inputs: Inputs, *, z_loss_weight=0.0, logit_soft_cap=None, reduction="mean", cotangent=1.0) -> dict:
    """float64. Gradients are of cotangent * loss.

    Beside each gradient, `size_of_...`: the norm of the same expression with every term made positive. Rounding errors
    are in proportion to that, however much the terms cancel (a peaked softmax, equal losses).
    """
    hidden, lm_head, weight = (np.asarray(x, np.float64) for x in (inputs.hidden, inputs.lm_head, inputs.weight))
    labels = np.asarray(inputs.labels)
    logits = hidden @ lm_head
    cap_slope = 1.0
    if logit_soft_cap is not None:
        logits = logit_soft_cap * np.tanh(logits / logit_soft_cap)
        cap_slope = 1 - (logits / logit_soft_cap) ** 2
    lse = np.logaddexp.reduce(logits, axis=1)
    counts = (labels >= 0) & (weight != 0)
    weight = np.where(counts, weight, 0)
    one_hot = np.eye(logits.shape[1])[np.maximum(labels, 0)]
    cross_entropy = lse - (one_hot * logits).sum(axis=1)
    z_loss = z_loss_weight * lse**2
    weight_sum = weight.sum()
    divisor = weight_sum if reduction == "mean" else 1.0
    loss = (weight * (cross_entropy + z_loss)).sum() / divisor
    softmax = np.exp(logits - lse[:, None])
    push = (1 + 2 * z_loss_weight * lse)[:, None] * softmax
    per_loss = cotangent * (weight / divisor)[:, None] * cap_slope
    dlogits, dlogits_size = per_loss * (push - one_hot), abs(per_loss) * (push + one_hot)
    dweight = (cross_entropy + z_loss - (loss if reduction == "mean" else 0.0)) / divisor
    return {
        "loss": loss,
        "cross_entropy": (weight * cross_entropy).sum() / weight_sum,
        "z_loss": (weight * z_loss).sum() / weight_sum,
        "weight_sum": weight_sum,
        "dhidden": dlogits @ lm_head.T,
        "dlm_head": hidden.T @ dlogits,
        "dweight": cotangent * np.where(counts, dweight, 0),
        "size_of_dhidden": np.linalg.norm(dlogits_size @ abs(lm_head.T)),
        "size_of_dlm_head": np.linalg.norm(abs(hidden.T) @ dlogits_size),
        "size_of_dweight": np.linalg.norm(cotangent * counts * (cross_entropy + z_loss + abs(loss)) / divisor),
        "lse": lse,
        "token_loss": np.where(labels >= 0, cross_entropy, 0),
        "argmax": logits.argmax(axis=1),
    }


def plain_loss(hidden, lm_head, labels, *, weight, z_loss_weight=0.0, logit_soft_cap=None, reduction="mean"):
    """What one writes without this package, and nothing of this package in it: all the logits, float32, autodiff."""
    logits = jnp.dot(hidden, lm_head, preferred_element_type=jnp.float32)
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    weight = jnp.where((labels >= 0) & (weight != 0), weight, 0.0)
    lse = jax.nn.logsumexp(logits, axis=1)
    cross_entropy = lse - jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    z_loss = z_loss_weight * lse**2
    sums = [(weight * part).sum() for part in (cross_entropy + z_loss, cross_entropy, z_loss)]
    means = [part / weight.sum() for part in sums]
    return sums[0] if reduction == "sum" else means[0], LossParts(means[1], means[2], weight.sum())


def loss_and_gradients(inputs: Inputs, *, function=linear_cross_entropy, cotangent=1.0, **kwargs) -> dict:
    """The same names from `function(**kwargs)`, in one compiled program."""

    @jax.jit
    def run(hidden, lm_head, labels, weight):
        loss_of = partial(function, labels=labels, **kwargs)
        loss, pull, parts = jax.vjp(lambda h, m, w: loss_of(h, m, weight=w), hidden, lm_head, weight, has_aux=True)
        return loss, parts, pull(jnp.float32(cotangent))

    loss, parts, (dhidden, dlm_head, dweight) = run(*inputs.arrays)
    return {
        "loss": loss,
        "cross_entropy": parts.cross_entropy,
        "z_loss": parts.z_loss,
        "weight_sum": parts.weight_sum,
        "dhidden": dhidden,
        "dlm_head": dlm_head,
        "dweight": dweight,
    }


def error(x, truth) -> float:
    """Euclidean norm of the difference."""
    return float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(truth, np.float64)))


def relative_error(x, truth) -> float:
    return error(x, truth) / float(np.linalg.norm(np.asarray(truth, np.float64)))


def all_equations(jaxpr, times=1):
    """Every equation of a jaxpr and of those inside it, with how often it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner_times = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for inner in jaxprs_in_params(equation.params):
            yield from all_equations(inner, inner_times)

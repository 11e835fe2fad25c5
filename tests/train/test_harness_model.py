# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of packed requests against sums in float64 over the model's logits, each request in a row by itself.

Sixteen tokens a row, on eight devices (data=4, model=2), through lm-eval's own `Instance`s.
"""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from grug_kernels.attention import AttentionMask
from tests.model.variants import BATCH, MODELS, part, tiny_config
from train.harness import scorer
from train.harness_model import HarnessModel
from train.mesh import create_mesh

SEQ_LEN, BATCH_SIZE = 16, 4
EOS = 0
# Nats: float32 logits of about one, summed in another order where a request stands at another place.
TOLERANCE = 1e-4


class Letters:
    """A tokenizer of one token per character: "一" is 1, "丁" 2, ... 95 of them; a space is 95 too."""

    bos_token_id: int | None = None
    eos_token_id = EOS

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [EOS if letter == "$" else 95 if letter == " " else ord(letter) - 0x4E00 + 1 for letter in text]


def letters(tokens) -> str:
    return "".join(chr(0x4E00 + int(token) - 1) for token in tokens)


def text(length: int, seed: int = 0) -> str:
    return letters(np.random.default_rng([length, seed]).integers(1, 90, length))


@functools.cache
def mesh():
    return create_mesh(8, context=2, model=2)


@functools.cache
def params_of(variant: str):
    cfg = tiny_config(variant, max_seq_len=SEQ_LEN)
    with jax.set_mesh(mesh()):
        params = jax.jit(lambda key: part(variant, "model").Transformer.init(cfg, key=key))(jax.random.key(0))
        # As born, the head makes every token about as likely as any: nothing would hide a wrong position less.
        return jax.tree.map(lambda x: 2 * x, params)


@functools.cache
def score_of(variant: str):
    return functools.partial(scorer(part(variant, "train").per_token_scores, mesh()), params_of(variant))


def model(variant: str = "base", *, score=None, tokenizer=None, said=None, remarks=None) -> HarnessModel:
    return HarnessModel(
        tokenizer or Letters(),
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        score=score or score_of(variant),
        say=[].append if said is None else said.append,
        remarks={} if remarks is None else remarks,
    )


def requests(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=("some_task", i, 1)) for i, args in enumerate(arguments)]


@functools.cache
def _logits(variant: str):
    causal = AttentionMask(causal=True)
    return jax.jit(lambda params, tokens: jax.reshard(params.logits(tokens, causal), jax.P(None, None, None)))


def log_probabilities(tokens: list[int], variant: str = "base") -> np.ndarray:
    """float64 [len(tokens), vocab_size]: after each of the tokens, which begin a row and are alone in it."""
    row = np.zeros((BATCH_SIZE, SEQ_LEN), np.int32)
    row[0, : len(tokens)] = tokens
    with jax.set_mesh(mesh()):
        placed = jax.device_put(row, BATCH)
        logits = np.asarray(_logits(variant)(params_of(variant), placed), np.float64)[0, : len(tokens)]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def by_hand(context: list[int], continuation: list[int], variant: str = "base") -> tuple[float, bool]:
    """The last SEQ_LEN tokens of context and continuation, of which the continuation is scored."""
    whole = (context + continuation)[-SEQ_LEN:]
    rows = log_probabilities(whole, variant)[-len(continuation) - 1 : -1]
    targets = whole[-len(continuation) :]
    return float(rows[np.arange(len(targets)), targets].sum()), bool((rows.argmax(axis=1) == targets).all())


def rolling_by_hand(tokens: list[int], before: int = EOS) -> float:
    """Windows of SEQ_LEN - 1 predicted tokens; the last of them sees as much as fits into a row."""
    sequence, total, width = [before, *tokens], 0.0, SEQ_LEN - 1
    for start in range(0, len(tokens), width):
        end = min(start + width, len(tokens))
        total += by_hand(sequence[max(0, end + 1 - SEQ_LEN) : start + 1], sequence[start + 1 : end + 1])[0]
    return total


def encode(text: str) -> list[int]:
    return Letters().encode(text, add_special_tokens=False)


def greedy(context: str, length: int) -> str:
    """What the model itself would go on with."""
    tokens = encode(context)
    for _ in range(length):
        tokens.append(int(log_probabilities(tokens)[-1, 1:95].argmax()) + 1)
    return letters(tokens[-length:])


# Of every length, so that rows hold one, several and many of them; the last ones just fit, and just do not.
PAIRS = [(text(before), text(after, 1)) for before in (1, 2, 3, 5, 9) for after in (1, 2, 4, 7)]
PAIRS += [(text(15), text(1, 1)), (text(1), text(15, 1)), (text(9), text(7, 1)), (text(2), text(1, 2))]


@pytest.mark.parametrize("variant", MODELS)
def test_packed_requests_are_scored_as_if_each_were_alone(variant):
    said = []
    found = model(variant, said=said).loglikelihood(requests("loglikelihood", *PAIRS))
    expected = [by_hand(encode(before), encode(after), variant) for before, after in PAIRS]
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected], atol=TOLERANCE)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    assert said[-1] == f"loglikelihood, {len(PAIRS)} of {len(PAIRS)} sequences"


def test_their_order_does_not_matter():
    order = np.random.default_rng(0).permutation(len(PAIRS))
    found = model().loglikelihood(requests("loglikelihood", *(PAIRS[i] for i in order)))
    straight = model().loglikelihood(requests("loglikelihood", *PAIRS))
    np.testing.assert_allclose([nats for nats, _ in found], [straight[i][0] for i in order], atol=TOLERANCE)


def test_without_segment_ids_these_requests_would_see_each_other():
    """Or the tests above could not tell. The first of each row sees no other in any case: about half of these."""

    def one_segment(batch):
        return score_of("base")(replace(batch, segment_ids=np.zeros_like(batch.segment_ids)))

    found = model(score=one_segment).loglikelihood(requests("loglikelihood", *PAIRS))
    expected = [by_hand(encode(before), encode(after))[0] for before, after in PAIRS]
    away = np.abs(np.array([nats for nats, _ in found]) - expected)
    assert np.mean(away > 1000 * TOLERANCE) > 0.4


def test_greedy_only_if_every_token_is_the_likeliest():
    context = text(4)
    own = greedy(context, 6)
    other = letters([encode(own)[0] % 90 + 1])
    pairs = [(context, own), (context, own[:5] + other), (context, other + own[1:]), (context, own[:1])]
    found = model().loglikelihood(requests("loglikelihood", *pairs))
    assert [likeliest for _, likeliest in found] == [True, False, False, True]


def test_a_request_longer_than_a_row_loses_the_beginning_of_its_context_and_that_is_said(caplog):
    pairs = [(text(16), text(1, 1)), (text(40), text(9, 1)), (text(12), text(4, 1))]
    remarks = {}
    found = model(remarks=remarks).loglikelihood(requests("loglikelihood", *pairs))
    expected = [by_hand(encode(before), encode(after))[0] for before, after in pairs]
    np.testing.assert_allclose([nats for nats, _ in found], expected, atol=TOLERANCE)
    said = "2 of 3 requests of some_task are longer than 16 tokens: the beginning of their context is left out"
    assert caplog.text.count(said) == 1
    model(remarks=remarks).loglikelihood(requests("loglikelihood", *pairs))
    assert caplog.text.count(said) == 1  # once is enough, not at every evaluation of a run
    assert list(remarks.values()) == [2]


@pytest.mark.parametrize("length", [1, 14, 15, 16, 17, 30, 31, 50])
def test_a_rolling_text_is_the_sum_of_its_windows(length):
    [found] = model().loglikelihood_rolling(requests("loglikelihood_rolling", (text(length),)))
    assert found == pytest.approx(rolling_by_hand(encode(text(length))), abs=TOLERANCE)


def test_a_continuation_longer_than_a_row_is_scored_whole():
    before, after = text(5), text(37, 1)
    [(found, _)] = model().loglikelihood(requests("loglikelihood", (before, after)))
    assert found == pytest.approx(rolling_by_hand(encode(after), before=encode(before)[-1]), abs=TOLERANCE)


def test_without_a_context_a_text_follows_the_end_of_a_document_or_the_beginning_token():
    found = model().loglikelihood(requests("loglikelihood", ("", text(3)), ("", "$" + text(3))))
    assert [nats for nats, _ in found] == pytest.approx([by_hand([EOS], encode(text(3)))[0]] * 2, abs=TOLERANCE)

    tokenizer = Letters()
    tokenizer.bos_token_id = 93
    lm = model(tokenizer=tokenizer)
    found = lm.loglikelihood(requests("loglikelihood", ("", text(3)), (text(2), text(3))))
    expected = [by_hand([93], encode(text(3)))[0], by_hand([93, *encode(text(2))], encode(text(3)))[0]]
    assert [nats for nats, _ in found] == pytest.approx(expected, abs=TOLERANCE)


def test_a_continuation_without_a_token_counts_as_certain_and_that_is_said(caplog):
    found = model().loglikelihood(requests("loglikelihood", (text(3), ""), ("", ""), (text(2), text(1))))
    assert found[:2] == [(0.0, True), (0.0, True)]
    assert found[2][0] < 0
    assert "2 of 3 requests of some_task have a continuation that begins within a token of the context" in caplog.text
    assert model().loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]


def test_weights_that_are_not_finite_are_not_scored():
    def broken(batch):
        nats, likeliest = score_of("base")(batch)
        return np.where(batch.tokens == 7, np.nan, nats), likeliest

    with pytest.raises(ValueError, match="1 of 2 log-likelihoods are not finite"):
        model(score=broken).loglikelihood(requests("loglikelihood", (letters([7]), "丁"), (letters([8]), "丁")))


def test_generated_text_is_refused_by_the_name_of_its_task():
    with pytest.raises(ValueError, match=r"lm_eval: some_task: generated text \(generate_until\) cannot be evaluated"):
        model().generate_until(requests("generate_until", ("a", {})))

# SPDX-License-Identifier: Apache-2.0
"""Whole documents in a row: what a row holds, what is cut and said, and that padding counts nowhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from train.data import DataConfig, build_train_dataset, build_validation_sets
from train.evaluate import GrugEvalConfig, build_tagged_evaluator

from .test_data import BATCH_SIZE, mesh_of, tiny_corpus, tiny_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("cache"))


def test_packed_rows_hold_whole_documents_and_say_what_they_cut(prepared, caplog):
    cfg = DataConfig(vocab_size=300, weights={"code": 1}, packing="documents")
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    texts = tiny_corpus(prepared.cache_dir).texts("code", "train")
    documents = [tokenizer.encode(f"{text} <|endoftext|>").ids for text in texts]
    seq_len = sorted(map(len, documents))[-3] - 1  # three documents are longer
    lost = sum(max(len(ids) - seq_len, 0) for ids in documents)
    with caplog.at_level("INFO", "train"):
        dataset = build_train_dataset(prepared, cfg, seq_len, BATCH_SIZE, 0)
    share = 100 * lost / sum(map(len, documents))
    assert f"code: 3 of {len(texts)} documents are longer than seq_len={seq_len} and lose their ends" in caplog.text
    assert f"{share:.1f} % of all tokens" in caplog.text

    rows = list(dataset.mixture.datasets["code"].as_sync_dataset())
    assert f"code: {len(texts)} documents in {len(rows)} sequences" in caplog.text
    seen = []
    for row in rows:
        tokens, ids, weights = (np.asarray(a) for a in (row.tokens, row.attn_mask.segment_ids[0], row.loss_weight))
        assert (np.diff(ids[ids >= 0]) >= 0).all()
        seen += [tokens[ids == document].tolist() for document in np.unique(ids[ids >= 0])]
        # Nothing is learned from padding, nor from the last position, nor is padding predicted.
        assert (weights == np.append(ids[1:] >= 0, False)).all()
    assert sorted(seen) == sorted(ids[:seq_len] for ids in documents)


def test_padding_counts_in_no_loss_and_no_bits_per_byte(prepared):
    cfg = DataConfig(vocab_size=300, packing="documents")
    nats = np.random.default_rng(1).gamma(0.5, 8.0, prepared.vocab_size).astype(np.float32)

    def losses(params, batch):
        targets = jnp.roll(batch.tokens, -1, axis=1)
        return params.at[targets].get(out_sharding=jax.typeof(targets).sharding), batch.loss_weight, targets

    evaluate = build_tagged_evaluator(prepared, cfg, GrugEvalConfig(), 256, 4, mesh_of(1, 1), losses)
    metrics = evaluate(jnp.asarray(nats))
    for tag, dataset in build_validation_sets(prepared, cfg, 256).items():
        rows = dataset.as_sync_dataset().get_batch(range(len(dataset.as_sync_dataset())))
        # A position counts where a token of a document follows it.
        targets = [
            token
            for row in rows
            for token, document in zip(row.tokens[1:], row.attn_mask.segment_ids[0][1:], strict=True)
            if document >= 0
        ]
        assert len(targets) < 0.95 * 255 * len(rows)  # there is padding
        total = nats[targets].astype(np.float64).sum()
        # Levanter's running means are float32.
        assert metrics[f"eval/{tag}/loss"] == pytest.approx(total / len(targets), rel=1e-5)
        bpb = total / prepared.byte_lengths[targets].sum() / math.log(2)
        assert metrics[f"eval/{tag}/bpb"] == pytest.approx(bpb, rel=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Token caches, mixture and loader: what a batch holds, and that batch k is always the same batch."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer

import train.data
import train.token_cache
from train.corpus import COMPONENTS, SPLITS, Corpus, Document, build_corpus
from train.data import (
    DataConfig,
    PreparedData,
    build_train_dataset,
    build_train_loader,
    build_validation_sets,
    held_out_texts,
    iter_from_step,
    prepare,
    prepare_corpus,
)
from train.mesh import BATCH_AXES
from train.mixture import mixture_metrics

SEQ_LEN, BATCH_SIZE = 32, 8
CONFIG = DataConfig(vocab_size=300)


def tiny_documents(per_component: int = 60) -> list[Document]:
    """Prose of lower-case letters and code of digits: a token says which component it came from."""
    rng = np.random.default_rng(0)
    alphabets = {"prose": list("aeinorst"), "code": list("0123456789")}
    return [
        Document(component, f"{index}", "".join(rng.choice(alphabet, rng.integers(20, 400))))
        for component, alphabet in alphabets.items()
        for index in range(per_component)
    ]


def tiny_corpus(cache_dir: Path, progress=print) -> Corpus:
    return build_corpus(cache_dir, tiny_documents(), progress)


def tiny_data(cache_dir: Path, progress=print) -> PreparedData:
    return prepare_corpus(CONFIG, cache_dir, tiny_corpus(cache_dir, progress), progress)


def mesh_of(replica_dcn: int, data: int, model: int = 1):
    axes = ("replica_dcn", "data", "context", "expert", "model")
    devices = jax.devices()[: replica_dcn * data * model]
    return jax.make_mesh((replica_dcn, data, 1, 1, model), axes, axis_types=(AxisType.Explicit,) * 5, devices=devices)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("cache"))


def batches(prepared, steps, *, cfg=CONFIG, seed=0, start=0, mesh=None) -> list:
    """`steps` batches from number `start` on."""
    dataset = build_train_dataset(prepared, cfg, SEQ_LEN, BATCH_SIZE, seed)
    with iter_from_step(build_train_loader(dataset, mesh or mesh_of(1, 1), BATCH_SIZE), start) as iterator:
        return [next(iterator) for _ in range(steps)]


def texts_of(prepared, batch) -> list[str]:
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    return tokenizer.decode_batch(np.asarray(batch.tokens).tolist())


def test_every_document_is_in_the_cache_whole_and_ends_with_eos(prepared):
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    for component in COMPONENTS:
        for split in SPLITS:
            texts = tiny_corpus(prepared.cache_dir).texts(component, split)
            expected = sum(len(tokenizer.encode(text + " <|endoftext|>").ids) for text in texts)
            assert prepared.token_counts[component][split] == expected
    assert prepared.components == ("prose", "code")
    assert prepared.vocab_size == 300 == len(prepared.byte_lengths)


def test_held_out_documents_can_be_read_as_text(prepared):
    for component in COMPONENTS:
        texts = tiny_corpus(prepared.cache_dir).texts(component, "validation")
        assert held_out_texts(prepared, component) == texts
        assert held_out_texts(prepared, component, limit=2) == texts[:2]


def test_baselines_are_those_of_a_hand_count(prepared):
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    bits, num_bytes = [], []
    corpus = tiny_corpus(prepared.cache_dir)
    for component in COMPONENTS:
        text = "".join(corpus.texts(component, "validation"))
        share = [count / len(text) for count in Counter(text).values()]
        row = prepared.baselines[f"python/{component}"]
        assert row.byte_bpb == pytest.approx(-sum(p * math.log2(p) for p in share), rel=1e-12)

        ids = {
            split: [i for doc in corpus.texts(component, split) for i in tokenizer.encode(doc + " <|endoftext|>").ids]
            for split in SPLITS
        }
        train = Counter(ids["train"])
        total = len(ids["train"]) + prepared.vocab_size
        bits.append(-sum(math.log2((train[i] + 1) / total) for i in ids["validation"]))
        num_bytes.append(len(text) + len(corpus.texts(component, "validation")))  # a space before each eos
        assert row.token_bpb == pytest.approx(bits[-1] / num_bytes[-1], rel=1e-12)
    assert prepared.baselines["overall"].token_bpb == pytest.approx(sum(bits) / sum(num_bytes), rel=1e-12)
    mean = sum(prepared.baselines[f"python/{component}"].byte_bpb for component in COMPONENTS) / 2
    assert prepared.baselines["macro"].byte_bpb == pytest.approx(mean)


def test_a_second_start_builds_nothing(prepared, monkeypatch):
    said = []
    monkeypatch.setattr(train.token_cache, "preprocessor_of", None)  # would be called to tokenize
    again = tiny_data(prepared.cache_dir, said.append)
    assert said == []
    assert again.token_counts == prepared.token_counts
    assert again.baselines == prepared.baselines


def test_prepare_says_what_it_does_and_obeys_the_cache_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("GRUG_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setattr(train.data, "python_documents", lambda: tiny_documents(4))
    said = []
    prepared = prepare(CONFIG, said.append)
    assert prepared.cache_dir == tmp_path / "here"
    assert said[0] == "corpus: writing 8 documents"
    assert said[-1].startswith("tokens: code: 4 documents, 0.0 MB, at code/validation.jsonl:1")


def test_batches_are_sharded_over_the_axes_that_share_them(prepared):
    (batch,) = batches(prepared, 1, mesh=mesh_of(2, 2, 2))
    for array in (batch.tokens, batch.loss_weight, *batch.attn_mask.segment_ids):
        assert array.shape == (BATCH_SIZE, SEQ_LEN)
        assert array.sharding.spec == P(BATCH_AXES, None)
        assert array.addressable_shards[0].data.shape == (2, SEQ_LEN)
    assert (batch.tokens.dtype, batch.loss_weight.dtype) == (np.int32, np.float32)
    assert (np.asarray(batch.loss_weight) == (np.arange(SEQ_LEN) < SEQ_LEN - 1)).all()


def test_a_new_segment_begins_after_each_eos(prepared):
    ends = 0
    for batch in batches(prepared, 8):
        is_eos = np.asarray(batch.tokens) == prepared.tokenizer.eos_id
        expected = np.pad(is_eos[:, :-1], ((0, 0), (1, 0))).cumsum(axis=1)
        for segment_ids in batch.attn_mask.segment_ids:
            assert (np.asarray(segment_ids) == expected).all()
        ends += is_eos.sum()
    assert ends > 10


def test_batch_k_is_the_same_after_a_stop(prepared):
    through = batches(prepared, 6)
    resumed = batches(prepared, 3, start=3, mesh=mesh_of(1, 4))
    for whole, part in zip(through[3:], resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True))


def test_another_seed_is_another_order(prepared):
    assert texts_of(prepared, batches(prepared, 1, seed=0)[0]) != texts_of(prepared, batches(prepared, 1, seed=1)[0])


def test_left_early_the_iterator_is_closed(prepared):
    """An open one aborts the interpreter at exit, with code 134, after all the work is done."""
    dataset = build_train_dataset(prepared, CONFIG, SEQ_LEN, BATCH_SIZE, 0)
    with iter_from_step(build_train_loader(dataset, mesh_of(1, 1), BATCH_SIZE), 0) as iterator:
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)


def share_of_prose(prepared, chosen) -> float:
    texts = [text for batch in chosen for text in texts_of(prepared, batch)]
    return sum(any(c.isalpha() for c in text) for text in texts) / len(texts)


def test_shares_hold_exactly_in_every_block(prepared):
    cfg = DataConfig(vocab_size=300, weights={"prose": 3, "code": 1}, mixture_block_size=16)
    assert share_of_prose(prepared, batches(prepared, 2, cfg=cfg)) == 0.75
    assert share_of_prose(prepared, batches(prepared, 2, cfg=cfg, start=10)) == 0.75


def test_stages_change_the_shares_at_their_step(prepared):
    stages = [(0, {"prose": 1.0}), (4, {"prose": 0.25, "code": 0.75})]
    cfg = DataConfig(vocab_size=300, weights=stages, mixture_block_size=16)
    all_batches = batches(prepared, 6, cfg=cfg)
    assert share_of_prose(prepared, all_batches[:4]) == 1
    assert share_of_prose(prepared, all_batches[4:]) == 0.25

    dataset = build_train_dataset(prepared, cfg, SEQ_LEN, BATCH_SIZE, 0)
    sequences = prepared.token_counts["prose"]["train"] // SEQ_LEN
    assert mixture_metrics(dataset, 4) == {
        "mixture/stage": 0,
        "mixture/weight/prose": 1.0,
        "mixture/epochs/prose": 16 / sequences,
        "mixture/epochs/code": 0,
    }
    later = mixture_metrics(dataset, 7)
    assert later["mixture/stage"] == 1
    assert later["mixture/weight/prose"] == 0.25
    assert later["mixture/epochs/prose"] == (32 + 4) / sequences


def test_validation_sets_are_the_held_out_text_by_tag(prepared):
    sets = build_validation_sets(prepared, CONFIG, SEQ_LEN)
    assert list(sets) == ["python/prose", "python/code"]
    for component, dataset in zip(COMPONENTS, sets.values(), strict=True):
        sync = dataset.as_sync_dataset()
        assert len(sync) == prepared.token_counts[component]["validation"] // SEQ_LEN
        stream = "".join(
            f"{text} <|endoftext|>" for text in tiny_corpus(prepared.cache_dir).texts(component, "validation")
        )
        tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
        seen = [tokenizer.decode(np.asarray(e.tokens).tolist(), skip_special_tokens=False) for e in sync]
        assert len(set(seen)) == len(seen)
        assert all(text in stream for text in seen)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"prose": 1, "wiki": 1},
            r"no component is called 'wiki' \(stage of step 0\)\. Those there are: prose, code\.",
        ),
        ({"prose": -1, "code": 2}, "shares are at least 0 and their sum is above 0"),
        ({"prose": 0}, "shares are at least 0 and their sum is above 0"),
        ([(10, {"prose": 1})], r"stages begin at steps \[10\]; they must ascend from step 0"),
        ([(0, {"prose": 1}), (0, {"code": 1})], r"stages begin at steps \[0, 0\]; they must ascend"),
    ],
)
def test_weights_that_mean_nothing_are_refused_before_anything_is_built(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        prepare(DataConfig(cache_dir=str(tmp_path), weights=weights))
    assert list(tmp_path.iterdir()) == []


def test_a_share_too_small_for_a_block_is_refused(prepared):
    """Levanter rounds it down to no sequences at all, with a Python warning."""
    cfg = DataConfig(weights={"prose": 1, "code": 99}, mixture_block_size=64)
    with pytest.raises(ValueError, match=r"prose has 1 of 100 .* 0\.64 sequences of a block of 64.*block_size=100 or"):
        build_train_dataset(prepared, cfg, SEQ_LEN, 8, 0)


def test_a_stage_that_begins_within_a_block_is_refused(prepared):
    cfg = DataConfig(weights=[(0, {"prose": 1}), (100, {"code": 1})])
    message = (
        r"begins at sequence 100 x batch_size 6 = 600, which is not a multiple of mixture_block_size=64\."
        r" Begin it at a multiple of 32 steps: 96 or 128\."
    )
    with pytest.raises(ValueError, match=message):
        build_train_dataset(prepared, cfg, SEQ_LEN, 6, 0)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(prepared):
    dataset = build_train_dataset(prepared, CONFIG, SEQ_LEN, 6, 0)
    message = (
        r"batch_size=6 is not a multiple of the mesh's 4 data shards \(replica_dcn 2 x data 2 x expert 1\): choose"
    )
    with pytest.raises(ValueError, match=message):
        build_train_loader(dataset, mesh_of(2, 2), 6)


def test_a_sequence_longer_than_the_text_is_refused(prepared):
    with pytest.raises(ValueError, match=r"code has \d+ tokens to train on, less than one sequence of seq_len=100000"):
        build_train_dataset(prepared, DataConfig(weights={"code": 1}), 100_000, 8, 0)
    with pytest.raises(ValueError, match=r"prose has \d+ held-out tokens, less than one sequence of seq_len=100000"):
        build_validation_sets(prepared, CONFIG, 100_000)


@pytest.fixture
def copied(prepared, tmp_path):
    """The prepared data in a folder of its own, for a test to damage."""
    shutil.copytree(prepared.cache_dir, tmp_path / "cache")
    return tiny_data(tmp_path / "cache")


def edit_json(path: Path, edit) -> None:
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))


def test_a_moved_cache_is_still_good(prepared, copied):
    assert copied.cache_dir != prepared.cache_dir
    assert texts_of(copied, batches(copied, 1)[0]) == texts_of(prepared, batches(prepared, 1)[0])


def test_a_cache_of_another_tokenizer_is_refused(copied):
    def by_another(manifest):
        manifest["tokenizer"] |= {"directory": "/elsewhere", "digest": "0" * 64, "vocab_size": 999}

    edit_json(copied.caches["code"].splits["train"].parent / "manifest.json", by_another)
    message = (
        r"written with the tokenizer /elsewhere \(999 tokens, sha256 0{12}\), and this run uses .*Delete the cache"
    )
    with pytest.raises(ValueError, match=message):
        tiny_data(copied.cache_dir)


def test_a_cache_whose_ledger_names_another_tokenizer_is_refused(copied):
    """Levanter only warns; ids beyond the vocabulary are then clamped by the embedding lookup, silently."""
    ledger = copied.caches["code"].splits["train"] / "shard_ledger.json"
    edit_json(ledger, lambda contents: contents["metadata"]["preprocessor_metadata"].update(vocab_size=999))
    with pytest.raises(
        ValueError, match=r"tokens-code-\w+/train was written by .*'vocab_size': 999.* and this run would write it by"
    ):
        build_train_dataset(copied, CONFIG, SEQ_LEN, BATCH_SIZE, 0)

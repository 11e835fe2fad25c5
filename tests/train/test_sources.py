# SPDX-License-Identifier: Apache-2.0
"""Texts of the user: every format gives the same documents, nothing is dropped in silence, no cache is stale."""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer

import train.token_cache
from train import lev
from train.data import DataConfig, build_train_dataset, build_validation_sets, held_out_texts, prepare
from train.evaluate import GrugEvalConfig, build_tagged_evaluator
from train.sources import Source

from .test_data import mesh_of
from .test_evaluate import per_token_losses

TEXTS = [f"document {index}: naïve 世界\n" + "words " * (index % 7) for index in range(120)]
LINES = "".join(json.dumps({"text": text, "content": text, "n": 1}) + "\n" for text in TEXTS).encode()


def write(folder: Path, kind: str, lines: bytes = LINES) -> str:
    """The texts in one of the formats; what data.sources says of them."""
    folder.mkdir(exist_ok=True)
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
    elif kind == "gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif kind == "zst":  # two frames, as pzstd and appending write them
        half = len(lines) // 2
        compress = zstandard.ZstdCompressor().compress
        (folder / "a.jsonl.zst").write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "n": [1] * len(TEXTS)}), folder / "a.parquet", row_group_size=50)
    elif kind == "txt":
        for index, text in enumerate(TEXTS):
            (folder / f"{index:03}.txt").write_text(text, encoding="utf-8")
        os.link(folder / "119.txt", folder / "119.kept")
        os.remove(folder / "119.txt")
        os.symlink(folder / "119.kept", folder / "119.txt")  # a link is a file too
    return f"hf:{folder}" if kind == "hf" else f"{folder}/*.{kind if kind in ('parquet', 'txt') else '*'}"


def source(path: str, **changed) -> Source:
    return Source(
        **{"name": "web", "path": path, "held_out": None, "text_field": "text", "hold_out_every": 10} | changed
    )


def read(path: str, **changed) -> list[tuple[str, str, str]]:
    return [(split, record.text, record.problem) for split, record in source(path, **changed).documents()]


def held_out(text: str, every: int = 10) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % every == 0


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "txt"])
def test_every_format_gives_every_document_in_order(tmp_path, kind):
    expected = [("validation" if held_out(text) else "train", text, "") for text in TEXTS]
    assert 3 < sum(split == "validation" for split, *_ in expected) < 30
    assert read(write(tmp_path / "texts", kind)) == expected


def test_a_dataset_is_read_as_the_hub_library_gives_it(tmp_path, monkeypatch):
    """The library itself, on a folder in the place of a name of the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "org", "jsonl")
    os.rename(tmp_path / "org" / "a.jsonl", tmp_path / "org" / "train.jsonl")
    assert [text for _, text, _ in read(f"hf:{tmp_path}/org")] == TEXTS
    with pytest.raises(ValueError, match=r"cannot be read: Bad split: test.* Check the name and the connection"):
        read(f"hf:{tmp_path}/org#test")


def test_a_dataset_of_the_hub_without_a_network_is_refused():
    assert os.environ.get("HF_HUB_OFFLINE", "1") == "1"
    with pytest.raises(
        ValueError, match=r"data: hf:nobody/nothing cannot be read: .*unless you allow it: .*HF_HUB_OFF"
    ):
        read("hf:nobody/nothing")


def test_documents_with_problems_are_records_that_say_where(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"text": ""}',
        b'{"text": 5}',
        b"{broken",
        b'{"body": "x"}',
        b'{"text": "\xff"}',
    ]
    lines += [b'{"text": "\\ud800"}', b"[1]"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = [record for _, record in source(f"{tmp_path}/a.jsonl").documents()]
    assert [record.problem for record in records] == [
        *("", "empty", "whose text is no string", "not JSON", "without a field 'text'", "not UTF-8", "not UTF-8"),
        "without a field 'text'",
    ]
    assert records[3].where == f"{tmp_path}/a.jsonl:5"
    assert records[4].where == f"{tmp_path}/a.jsonl:6; its fields: body"


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_file_is_refused_and_not_read_half(tmp_path, kind, damage):
    write(tmp_path, kind)
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-20] if damage == "cut" else b"x" * 100)
    with pytest.raises(ValueError, match=r"a\.\S+ cannot be read to its end: .* Fetch or write it again"):
        read(f"{tmp_path}/*")


def test_what_is_not_there_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    cases = {
        f"{tmp_path}/none/*.jsonl": "there is no file",
        f"{tmp_path}/folder": r"is a folder, and no Levanter cache here .* by a glob: '\S+/folder/\*\*/\*\.jsonl'",
        "hf:": "'hf:' is no dataset of the hub",
    }
    for path, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare(DataConfig(cache_dir=str(tmp_path / "cache"), sources={"web": path}))
    assert not (tmp_path / "cache").exists()
    write(tmp_path / "table", "parquet")
    with pytest.raises(
        ValueError, match=r"has no column 'body'; its columns: text, n\. Name the one .* data\.text_fiel"
    ):
        read(f"{tmp_path}/table/*", text_field="body")


def test_the_digest_changes_with_files_fields_and_split(tmp_path):
    path = write(tmp_path, "jsonl")
    seen = {source(path).digest}
    assert source(path).digest in seen
    for changed in ({"text_field": "content"}, {"hold_out_every": 11}, {"held_out": path}):
        seen.add(source(path, **changed).digest)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    seen.add(source(path).digest)
    (tmp_path / "a.jsonl").write_bytes(LINES + b"\n")
    os.utime(tmp_path / "a.jsonl", (1, 1))
    seen.add(source(path).digest)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    seen.add(source(path).digest)
    assert len(seen) == 7


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with web/ and books/ in it, and the configuration that names them."""
    folder = tmp_path_factory.mktemp("texts")
    bad = b'{"text": 5}\n{"text": "one<|endoftext|>two"}\n'
    sources = {"web/en": write(folder / "web", "zst", bad + LINES), "books": write(folder / "books", "parquet")}
    weights = {"web/en": 0.5, "books": 0.25, "prose": 0.25}
    return DataConfig(
        cache_dir=str(folder / "cache"), sources=sources, weights=weights, vocab_size=300, hold_out_every=10
    )


@pytest.fixture(scope="module")
def prepared(written):
    return prepare(written, lambda _: None)


def test_sources_and_pythons_own_texts_are_mixed_and_evaluated_by_tag(prepared, written):
    assert prepared.components == ("prose", "books", "web/en")  # not "code", which nobody named
    dataset = build_train_dataset(prepared, written, 32, 8, seed=0)
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    block = dataset.mixture.as_sync_dataset().get_batch(range(64))
    texts = tokenizer.decode_batch([np.asarray(example.tokens).tolist() for example in block])
    assert sum("docu" in text or "words" in text or "naïve" in text for text in texts) >= 40  # of 48
    tags = list(build_validation_sets(prepared, written, 32))
    assert tags == ["python/prose", "books", "web/en"]
    assert set(prepared.baselines) == {*tags, "macro", "overall"}
    evaluate = build_tagged_evaluator(
        prepared, written, GrugEvalConfig(max_examples_per_dataset=4), 32, 4, mesh_of(1, 1), per_token_losses
    )
    metrics = evaluate(jnp.ones(prepared.vocab_size))
    names = ("eval/web/en/loss", "eval/web/en/bpb", "eval/books/bpb", "eval/python/prose/bpb", "eval/macro_bpb")
    assert all(metrics[name] > 0 for name in names)


def test_what_is_left_out_or_cut_is_said_at_every_start(prepared, written, caplog, monkeypatch):
    monkeypatch.setattr(train.token_cache, "preprocessor_of", None)  # nothing is tokenized again
    said = []
    again = prepare(written, said.append)
    assert said == []
    assert again.token_counts == prepared.token_counts
    assert "web/en: 1 documents left out: whose text is no string (first: " in caplog.text
    assert "a.jsonl.zst:1)" in caplog.text
    assert "web/en: 1 documents cut in parts: their text holds <|endoftext|>" in caplog.text
    assert again.caches["web/en"].manifest["splits"]["train"]["documents"] + len(held_out_texts(again, "web/en")) == 121


def test_held_out_files_are_what_is_evaluated(tmp_path):
    write(tmp_path / "web", "jsonl")
    (tmp_path / "val.txt").write_text("held out by its author " * 20)
    cfg = DataConfig(
        cache_dir=str(tmp_path / "cache"),
        sources={"web": f"{tmp_path}/web/*"},
        held_out={"web": f"{tmp_path}/val.txt"},
        text_fields={"web": "content"},
        vocab_size=300,
    )
    prepared = prepare(cfg, lambda _: None)
    assert held_out_texts(prepared, "web") == ["held out by its author " * 20]
    assert prepared.caches["web"].manifest["splits"]["train"]["documents"] == len(TEXTS)
    lengths = prepared.byte_lengths
    rows = build_validation_sets(prepared, cfg, 32)["web"].as_sync_dataset()
    tokens = np.concatenate([row.tokens for row in rows])
    assert 0 < lengths[tokens].sum() <= len("held out by its author " * 20)


def test_a_source_with_nothing_to_train_on_or_nothing_held_out_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n' * 3)
    (tmp_path / "one.txt").write_text("one document")
    for name, message in {
        "bad.jsonl": r"web has no document to train on\. Documents: 3 left out: without a field 'text' \(first: ",
        "one.txt": r"web has 1 documents, and none of them is held out .*\(--data\.held-out web PATH",
    }.items():
        cfg = DataConfig(cache_dir=str(tmp_path / "cache"), sources={"web": f"{tmp_path}/{name}"}, vocab_size=300)
        with pytest.raises(ValueError, match=message):
            prepare(cfg, lambda _: None)
        assert not list((tmp_path / "cache").glob("tokens-*"))


def adopt(prepared, folder: Path, **changed) -> DataConfig:
    """A configuration that names the Levanter cache `folder`, and the tokenizer it was written with."""
    fields = {
        "cache_dir": str(folder.parent / "cache"),
        "sources": {"theirs": str(folder)},
        "tokenizer": str(prepared.tokenizer_dir),
    }
    return DataConfig(**fields | changed)


def test_a_levanter_cache_is_used_where_it_lies(prepared, written, tmp_path, caplog):
    theirs = prepared.caches["books"].splits["train"].parent
    shutil.copytree(theirs, tmp_path / "theirs")
    os.remove(tmp_path / "theirs" / "manifest.json")
    cfg = adopt(prepared, tmp_path / "theirs")
    with caplog.at_level("INFO", "train"):
        adopted = prepare(cfg, lambda _: None)
    assert (
        f"theirs: the Levanter caches {tmp_path}/theirs/train and {tmp_path}/theirs/validation are used where they lie"
        in caplog.text
    )
    assert adopted.token_counts["theirs"] == prepared.token_counts["books"]
    assert adopted.baselines["theirs"].token_bpb == prepared.baselines["books"].token_bpb
    rows = build_train_dataset(adopted, cfg, 32, 8, 0).mixture.datasets["theirs"].dataset.as_sync_dataset()
    expected = build_train_dataset(prepared, written, 32, 8, 0).mixture.datasets["books"].dataset.as_sync_dataset()
    assert len(rows) == len(expected) > 50
    numbers = range(len(rows))
    both = zip(rows.get_batch(numbers), expected.get_batch(numbers), strict=True)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in both)


def test_a_levanter_cache_that_does_not_fit_is_refused(prepared, tmp_path):
    theirs = prepared.caches["books"].splits["train"].parent
    with pytest.raises(
        ValueError, match=r"theirs: a Levanter cache holds the ids of the tokenizer it was written with"
    ):
        prepare(adopt(prepared, theirs, cache_dir=str(tmp_path), tokenizer=None))
    shutil.copytree(theirs / "train", tmp_path / "flat")
    with pytest.raises(ValueError, match=r"flat is no Levanter cache to evaluate on, .* --data\.held-out theirs PATH"):
        prepare(adopt(prepared, tmp_path / "flat"))
    cfg = adopt(prepared, tmp_path / "flat", held_out={"theirs": str(theirs / "validation")})
    assert prepare(cfg, lambda _: None).token_counts["theirs"] == prepared.token_counts["books"]
    ledger = tmp_path / "flat" / "shard_ledger.json"
    contents = json.loads(ledger.read_text())
    contents["metadata"]["preprocessor_metadata"]["vocab_size"] = 999
    ledger.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"flat was written by .*'vocab_size': 999.*Another: choose the tokenizer"):
        prepare(cfg)


def test_ids_beyond_the_vocabulary_are_found_in_a_cache_that_says_it_fits(prepared, tmp_path):
    preprocessor = train.token_cache.preprocessor_of(prepared.tokenizer_dir)
    metadata = lev.CacheMetadata(preprocessor_metadata=preprocessor.metadata)
    for split in ("train", "validation"):
        path = str(tmp_path / "theirs" / split)
        with lev.SerialCacheWriter(path, preprocessor.output_exemplar, metadata=metadata) as writer:
            writer.write_batch([{"input_ids": [1, 5000, 2]}])
    with pytest.raises(ValueError, match=r"theirs/train holds the id 5000, and the tokenizer \S+ has 300 tokens"):
        prepare(adopt(prepared, tmp_path / "theirs"), lambda _: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": {"prose": "x"}}, "a component cannot be called 'prose'"),
        ({"sources": {"ema/x": "x"}}, "a component cannot be called 'ema/x'"),
        ({"sources": {"a b": "x"}}, "a component cannot be called 'a b'. Its name is a tag"),
        ({"sources": {"web": "x", "web/en": "y"}}, "web is a component and also the group of web/en"),
        ({"held_out": {"web": "x"}}, "DataConfig.held_out: web: data.sources names no such component"),
        ({"weights": "web 1"}, "'web 1' is neither shares, such as"),
        ({"weights": [[0, {"web": "much"}]]}, r"is neither shares, .* nor stages of them, such as \[\[0"),
        ({"packing": "tight"}, "packing='tight'; choose stream or documents"),
        ({"hold_out_every": 1}, "hold_out_every=1; it is at least 2"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_several_sources_need_weights():
    with pytest.raises(ValueError, match=r"there are 2 sources; say .* --data\.weights a 0\.5 b 0\.5\."):
        prepare(DataConfig(sources={"a": "x", "b": "y"}))

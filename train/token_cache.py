# SPDX-License-Identifier: Apache-2.0
"""Token caches: every document of a component tokenized once, as Levanter stores it, and what is known of the result.

    <cache_dir>/tokens-<component>-<key>/train/, validation/    a Levanter cache each
    <cache_dir>/tokens-<component>-<key>/manifest.json          counts, baseline, what was left out and why

The key is a hash of the component's documents and of the tokenizer, so a cache is never out of date. It appears whole
or not at all (`build_once`). A Levanter cache from elsewhere is used where it lies; only its manifest is here.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train import lev
from train.corpus import SPLITS, build_once
from train.sources import Record
from train.tokenizer import TokenizerFiles

log = logging.getLogger(__name__)

# Part of every cache's name: raise it when the same texts and tokenizer would give other files.
CACHE_FORMAT = 2

# Tokens of an adopted cache that are looked at to know how often each occurs.
SAMPLED_TOKENS = 1 << 24

Progress = Callable[[str], None]


class Component(Protocol):
    """What can be tokenized: `digest` is a hash of everything that `documents` depends on."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def documents(self) -> Iterator[tuple[str, Record]]: ...


@dataclass(frozen=True)
class TokenCache:
    """One component's tokens. `splits` has the Levanter cache of "train" and of "validation"."""

    splits: dict[str, Path]
    manifest: dict[str, Any]

    @property
    def token_counts(self) -> dict[str, int]:
        return {split: counts["tokens"] for split, counts in self.manifest["splits"].items()}


@dataclass
class _Split:
    """What is counted while a split is read."""

    token_ids: np.ndarray  # int64 [vocab_size]: how often each occurs
    text_bytes: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # how often each occurs
    documents: int = 0
    tokens: int = 0

    def add(self, texts: list[str], ids: np.ndarray) -> None:
        self.token_ids += np.bincount(ids, minlength=len(self.token_ids))
        for text in texts:
            self.text_bytes += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        self.documents += len(texts)
        self.tokens += len(ids)


@dataclass
class _LeftOut:
    """Documents that are not in the cache, or not as they were: problem -> [how many, where the first was]."""

    counts: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, problem: str, where: str) -> None:
        self.counts.setdefault(problem, [0, where])[0] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {problem} (first: {where})" for problem, (count, where) in self.counts.items())


def build_token_cache(
    cache_dir: Path, component: Component, tokenizer: TokenizerFiles, lengths: np.ndarray, progress: Progress
) -> TokenCache:
    """The cache of `component`, tokenized now if it is not there. lengths int32 [vocab_size]: bytes of each token.

    Raises:
      ValueError: there is no document to train on, or none held out; the cache is another tokenizer's.
    """
    directory = build_once(
        _directory(cache_dir, component.name, component.digest, tokenizer),
        lambda directory: _write(directory, component, tokenizer, lengths, progress),
        progress,
    )
    manifest = json.loads((directory / "manifest.json").read_text())
    check_tokenizer(directory, manifest["tokenizer"], tokenizer)
    for problem, (count, where) in manifest["left_out"].items():
        log.warning("%s: %d documents %s (first: %s)", component.name, count, problem, where)
    return TokenCache({split: directory / split for split in SPLITS}, manifest)


def is_levanter_cache(path: str) -> bool:
    """Whether `path` is a folder with a Levanter cache, or with one in train/."""
    return _split_in(path, "train") is not None


def levanter_caches(name: str, path: str, held_out: str | None) -> dict[str, Path]:
    """The cache in `path` (or its train/), and the one in `held_out` or `path` (or its validation/) to evaluate on.

    Raises:
      ValueError: there is none to evaluate on.
    """
    train, validation = _split_in(path, "train"), _split_in(held_out or path, "validation")
    if train is None or validation is None or validation == train:
        raise ValueError(
            f"data: {name}: {held_out or path} is no Levanter cache to evaluate on, nor has it one in validation/. Name"
            f" one in data.held_out: --data.held-out {name} PATH."
        )
    return {"train": train, "validation": validation}


def adopt_token_cache(
    cache_dir: Path,
    name: str,
    splits: dict[str, Path],
    tokenizer: TokenizerFiles,
    lengths: np.ndarray,
    progress: Progress,
) -> TokenCache:
    """Levanter caches from elsewhere: `splits` has that of "train" and that of "validation".

    Raises:
      ValueError: another kind of tokenizer wrote one; it holds ids that the tokenizer has not.
    """
    for split in SPLITS:
        check_preprocessor(splits[split], tokenizer)
    digest = hashlib.sha256(b"".join(_ledger(splits[split]).read_bytes() for split in SPLITS)).hexdigest()
    directory = build_once(
        _directory(cache_dir, name, f"{digest} {splits}", tokenizer),
        lambda directory: _describe_adopted(directory, splits, tokenizer, lengths, progress),
        progress,
    )
    log.info("%s: the Levanter caches %s and %s are used where they lie", name, *splits.values())
    return TokenCache(splits, json.loads((directory / "manifest.json").read_text()))


def check_preprocessor(path: Path, tokenizer: TokenizerFiles) -> None:
    """Raises ValueError where the Levanter cache `path` was written in another way than this run would write it.

    Levanter warns of it and goes on with the wrong ids, which the embedding lookup then clamps. The tokenizer's name
    may differ: folders are moved. What stays comparable is its size and which tokens are put around a document.
    """
    written = lev.CacheLedger.load(str(path)).metadata.preprocessor_metadata
    expected = preprocessor_of(tokenizer.directory).metadata
    if not written or {**written, "tokenizer": None} != {**expected, "tokenizer": None}:
        raise ValueError(
            f"data: the token cache {path} was written by {written}, and this run would write it by {expected}. A cache"
            " of this project's own: delete it, and it is made anew at the next start. Another: choose the tokenizer"
            " that it was written with (data.tokenizer)."
        )


def check_tokenizer(directory: Path, written_by: dict[str, Any], tokenizer: TokenizerFiles) -> None:
    """Ids of another tokenizer would be silently clamped to the vocabulary by the embedding lookup."""
    if written_by["digest"] != tokenizer.digest:
        raise ValueError(
            f"data: the token cache {directory} was written with the tokenizer {written_by['directory']}"
            f" ({written_by['vocab_size']} tokens, sha256 {written_by['digest'][:12]}), and this run uses"
            f" {tokenizer.directory} ({tokenizer.vocab_size} tokens, sha256 {tokenizer.digest[:12]}). Delete the cache;"
            " it is made anew at the next start."
        )


def preprocessor_of(tokenizer_dir: Path) -> Any:
    """Text to token ids; each document ends with the end-of-document token."""
    tokenizer = lev.load_tokenizer(str(tokenizer_dir))
    return lev.preprocessor_for_format(lev.TextLmDatasetFormat(), tokenizer, enforce_bos=True, enforce_eos=True)


def _write(
    directory: Path, component: Component, tokenizer: TokenizerFiles, lengths: np.ndarray, progress: Progress
) -> None:
    """Fills `directory` with a Levanter cache per split, and a manifest of what is in them."""
    progress(f"tokens: {component.name}: loading the data pipeline")
    preprocessor = preprocessor_of(tokenizer.directory)
    metadata = lev.CacheMetadata(preprocessor_metadata=preprocessor.metadata)
    counted = {split: _Split(np.zeros(tokenizer.vocab_size, np.int64)) for split in SPLITS}
    left_out = _LeftOut()
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                lev.SerialCacheWriter(str(directory / split), preprocessor.output_exemplar, metadata=metadata)
            )
            for split in SPLITS
        }
        for split, records in _batches(component.documents(), tokenizer.eos, left_out):
            texts = [record.text for record in records]
            rows = preprocessor([{"text": text} for text in texts])
            writers[split].write_batch(rows)
            counted[split].add(texts, np.concatenate([row["input_ids"] for row in rows]))
            done = sum(split.documents for split in counted.values())
            size = sum(int(split.text_bytes.sum()) for split in counted.values())
            progress(f"tokens: {component.name}: {done} documents, {size / 1e6:.1f} MB, at {records[-1].where}")
        _check_documents(component.name, counted, left_out)
    manifest = {"left_out": left_out.counts, **_describe(counted, lengths)}
    _write_manifest(directory, tokenizer, manifest)


def _batches(
    documents: Iterable[tuple[str, Record]], eos: str, left_out: _LeftOut
) -> Iterator[tuple[str, list[Record]]]:
    """64 documents of one split at a time, without those that have a problem."""
    waiting: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for split, record in documents:
        if record.problem:
            left_out.add(f"left out: {record.problem}", record.where)
            continue
        if eos in record.text:
            left_out.add(f"cut in parts: their text holds {eos}, which is read as the end of a document", record.where)
        waiting[split].append(record)
        if len(waiting[split]) == 64:
            yield split, waiting[split]
            waiting[split] = []
    yield from ((split, records) for split, records in waiting.items() if records)


def _check_documents(name: str, counted: dict[str, _Split], left_out: _LeftOut) -> None:
    problems = f" Documents: {left_out}." if left_out.counts else ""
    train, held_out = (counted[split].documents for split in SPLITS)
    if not train:
        raise ValueError(f"data: {name} has no document to train on.{problems} The field is set in data.text_fields.")
    if not held_out:
        raise ValueError(
            f"data: {name} has {train} documents, and none of them is held out to evaluate on.{problems} Name files to"
            f" evaluate on (--data.held-out {name} PATH), or choose a smaller data.hold_out_every."
        )


def _describe(counted: dict[str, _Split], lengths: np.ndarray, *, texts_are_whole: bool = True) -> dict[str, Any]:
    held_out = counted["validation"]
    splits = {
        split: {"documents": one.documents, "tokens": one.tokens, "text_bytes": int(one.text_bytes.sum())}
        for split, one in counted.items()
    }
    # Of the held-out text, with the space that Levanter puts before the end of each document; and as its tokens say.
    by_tokens = int(held_out.token_ids @ lengths)
    by_text = int(held_out.text_bytes.sum()) + held_out.documents if texts_are_whole else by_tokens
    baseline = unigram_baseline(held_out.text_bytes, counted["train"].token_ids, held_out.token_ids, by_text)
    return {"splits": splits, "held_out_bytes": [by_text, by_tokens], "baseline": baseline}


def unigram_baseline(
    byte_counts: np.ndarray, train: np.ndarray, validation: np.ndarray, num_bytes: int
) -> dict[str, float]:
    """byte_counts [256], num_bytes: of the validation text; train, validation [vocab_size]: how often each token is."""
    byte_counts = byte_counts[byte_counts > 0]
    byte_entropy = -(byte_counts * np.log2(byte_counts / byte_counts.sum())).sum() / byte_counts.sum()
    # Adding one keeps a token that the training text never used from costing infinitely many bits.
    token_bits = -np.log2((train + 1) / (train + 1).sum())
    return {"byte_bpb": float(byte_entropy), "token_bpb": float(validation @ token_bits / num_bytes)}


def _describe_adopted(
    directory: Path, splits: dict[str, Path], tokenizer: TokenizerFiles, lengths: np.ndarray, progress: Progress
) -> None:
    """A manifest for caches that others wrote, from the beginning of each: their texts are not to be had."""
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    counted, totals = {}, {}
    for split in SPLITS:
        progress(f"tokens: looking at {splits[split]}")
        cache = lev.load_lm_dataset_cache(
            str(splits[split]), lev.TextLmDatasetFormat(), lev.load_tokenizer(str(tokenizer.directory))
        )
        totals[split] = {"documents": len(cache), "tokens": cache.flat_field_length("input_ids")}
        counted[split] = _Split(np.zeros(tokenizer.vocab_size, np.int64))
        for rows in itertools.batched(range(len(cache)), 256):
            ids = [np.asarray(row["input_ids"]) for row in cache.get_batch_sync(list(rows))]
            if (largest := max(int(row.max(initial=0)) for row in ids)) >= tokenizer.vocab_size:
                raise ValueError(
                    f"data: the token cache {splits[split]} holds the id {largest}, and the tokenizer"
                    f" {tokenizer.directory} has {tokenizer.vocab_size} tokens. Choose the one it was written with."
                )
            counted[split].add(decoder.decode_batch([row.tolist() for row in ids]), np.concatenate(ids))
            if counted[split].tokens >= SAMPLED_TOKENS:
                break
    manifest = {"left_out": {}, **_describe(counted, lengths, texts_are_whole=False)}
    for split in SPLITS:
        manifest["splits"][split] |= totals[split]
    _write_manifest(directory, tokenizer, manifest)


def _write_manifest(directory: Path, tokenizer: TokenizerFiles, manifest: dict[str, Any]) -> None:
    manifest = {"tokenizer": asdict(tokenizer) | {"directory": str(tokenizer.directory)}, **manifest}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _directory(cache_dir: Path, name: str, digest: str, tokenizer: TokenizerFiles) -> Path:
    key = hashlib.sha256(f"{CACHE_FORMAT} {digest} {tokenizer.digest}".encode()).hexdigest()[:16]
    return cache_dir / f"tokens-{name.replace('/', '_')}-{key}"


def _split_in(path: str, split: str) -> Path | None:
    """The Levanter cache of `split` in `path`, or `path` itself where it is one."""
    return next((folder for folder in (Path(path, split), Path(path)) if _ledger(folder).is_file()), None)


def _ledger(folder: Path) -> Path:
    return folder / "shard_ledger.json"

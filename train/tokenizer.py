# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer trained on the corpus, and the exact byte length of every token of any such tokenizer.

A tokenizer is a directory with `tokenizer.json` and `tokenizer_config.json` (which names the end-of-document token),
as Levanter and the Hugging Face libraries read it.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.corpus import COMPONENTS, Corpus, build_once

EOS = "<|endoftext|>"

# 256 bytes and the end of a document.
SMALLEST_VOCAB_SIZE = 257


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's directory, read once: what it is called, what it holds and what it is equal to."""

    directory: Path
    digest: str  # sha256 of both files: two tokenizers with one digest tokenize alike
    vocab_size: int
    eos_id: int


def build_tokenizer(
    cache_dir: Path, corpus: Corpus, vocab_size: int, progress: Callable[[str], None] = print
) -> TokenizerFiles:
    """Trains a byte-level BPE on the corpus's training split, unless it is there already.

    Any text survives encoding and decoding, since all 256 bytes are tokens. A small corpus may give fewer tokens than
    `vocab_size`: the result's `vocab_size` is what it has.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and the end-of-document token.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise ValueError(
            f"tokenizer: vocab_size={vocab_size} is too small for a byte-level tokenizer, which starts from 256"
            f" bytes and 1 end-of-document token; choose vocab_size >= {SMALLEST_VOCAB_SIZE}."
        )
    # The library's version is part of the key: another one may break ties between merges another way.
    key = f"{corpus.digest} {vocab_size} {importlib.metadata.version('tokenizers')}"
    directory = Path(cache_dir) / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def train(into: Path) -> None:
        texts = [text for component in COMPONENTS for text in corpus.texts(component, "train")]
        size = f"{sum(map(len, texts)) / 1e6:.1f} M characters"
        progress(f"tokenizer: training {vocab_size} byte-level BPE tokens on {size}")
        _trained(texts, vocab_size).save(str(into / "tokenizer.json"))
        (into / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "pad_token": EOS}, indent=2) + "\n")

    return read_tokenizer(build_once(directory, train, progress))


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Reads what the data pipeline must know of a tokenizer's directory.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: there is no end-of-document token: documents would run into one another unseen.
    """
    directory = Path(directory)
    contents = [_read(directory, name) for name in ("tokenizer.json", "tokenizer_config.json")]
    eos = json.loads(contents[1]).get("eos_token")
    name = eos["content"] if isinstance(eos, dict) else eos
    ids = _token_ids(json.loads(contents[0]))
    if name not in ids:
        raise ValueError(
            f"tokenizer: {directory} has no end-of-document token: tokenizer_config.json says eos_token={name!r}, which"
            " is not among the tokens of tokenizer.json. Documents are told apart by it: set eos_token to one of those."
        )
    return TokenizerFiles(
        directory=directory,
        digest=hashlib.sha256(b"\0".join(contents)).hexdigest(),
        vocab_size=max(ids.values()) + 1,
        eos_id=ids[name],
    )


def token_byte_lengths(directory: Path) -> np.ndarray:
    """How many bytes of text each token id stands for: int32 [vocab_size], special tokens 0.

    The sum over a text's tokens is exactly `len(text.encode())`, for tokens that are part of a character too. (Decoding
    each token by itself instead turns such a part into U+FFFD, which counts as 3 bytes.)

    Raises:
      ValueError: the tokenizer is not byte-level, so its tokens do not say how many bytes they are.
    """
    contents = json.loads(_read(Path(directory), "tokenizer.json"))
    added = {token["content"]: token for token in contents["added_tokens"]}
    ids = _token_ids(contents)
    alphabet = _byte_level_alphabet()
    lengths = np.zeros(max(ids.values()) + 1, np.int32)
    for token, index in ids.items():
        if token in added:
            lengths[index] = 0 if added[token]["special"] else len(token.encode())
        elif alphabet.issuperset(token):
            lengths[index] = len(token)  # One character of this alphabet stands for one byte.
        else:
            raise ValueError(
                f"tokenizer: {directory} is not byte-level: token {index} is {token!r}, which has characters outside"
                " of the 256 that stand for bytes, so bits per byte cannot be exact. Use a byte-level BPE tokenizer, or"
                " None to train one on the corpus."
            )
    return lengths


def _trained(texts: list[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(_byte_level_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _byte_level_alphabet() -> set[str]:
    from tokenizers import pre_tokenizers

    return set(pre_tokenizers.ByteLevel.alphabet())


def _token_ids(contents: dict) -> dict[str, int]:
    """Token -> id, of a parsed tokenizer.json. Added tokens may or may not be repeated in the model's own table."""
    return contents["model"]["vocab"] | {token["content"]: token["id"] for token in contents["added_tokens"]}


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer: {path} does not exist. A tokenizer is a directory with tokenizer.json and"
            " tokenizer_config.json (as `save_pretrained` writes it); names of models are not looked up. None trains"
            " one on the corpus."
        )
    return path.read_bytes()

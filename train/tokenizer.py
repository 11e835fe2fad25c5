# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer trained on the texts, and the byte length of every token of any tokenizer.

A tokenizer is a directory with `tokenizer.json` and `tokenizer_config.json` (which names the end-of-document token),
as Levanter and the Hugging Face libraries read it.
"""

import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.corpus import build_once

log = logging.getLogger(__name__)

EOS = "<|endoftext|>"

# 256 bytes and the end of a document.
SMALLEST_VOCAB_SIZE = 257

# Characters of text a tokenizer is trained on at most; more change its merges little, and take minutes and memory.
TRAINING_CHARACTERS = 100_000_000


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's directory, read once: what it is called, what it holds and what it is equal to."""

    directory: Path
    digest: str  # sha256 of both files: two tokenizers with one digest tokenize alike
    vocab_size: int
    eos: str
    eos_id: int


def build_tokenizer(
    cache_dir: Path,
    digest: str,
    texts: Callable[[], list[Iterable[str]]],
    vocab_size: int,
    progress: Callable[[str], None] = print,
) -> TokenizerFiles:
    """Trains a byte-level BPE on the texts of every component alike, unless it is there already.

    `digest` is a hash of the texts, which are not read where the tokenizer is there, nor beyond `TRAINING_CHARACTERS`.
    Any text survives encoding and decoding, since all 256 bytes are tokens. Little text may give fewer tokens than
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
    key = f"{digest} {vocab_size} {importlib.metadata.version('tokenizers')}"
    directory = Path(cache_dir) / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def train(into: Path) -> None:
        progress("tokenizer: reading texts")
        components = texts()
        share = TRAINING_CHARACTERS // len(components)
        chosen = [text for component in components for text in _beginning(component, share)]
        size = f"{sum(map(len, chosen)) / 1e6:.1f} M characters (of each component, the first {share / 1e6:.0f} M)"
        progress(f"tokenizer: training {vocab_size} byte-level BPE tokens on {size}")
        _trained(chosen, vocab_size).save(str(into / "tokenizer.json"))
        (into / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "pad_token": EOS}, indent=2) + "\n")

    return read_tokenizer(build_once(directory, train, progress))


def read_tokenizer(directory: Path) -> TokenizerFiles:
    """Reads what the data pipeline must know of a tokenizer's directory.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: there is no end-of-document token, or it is read as text: documents would run into one another unseen.
    """
    directory = Path(directory)
    contents = [_read(directory, name) for name in ("tokenizer.json", "tokenizer_config.json")]
    eos = json.loads(contents[1]).get("eos_token")
    name = eos["content"] if isinstance(eos, dict) else eos
    tokenizer = _load(directory)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if name not in ids:
        raise ValueError(
            f"tokenizer: {directory} has no end-of-document token: tokenizer_config.json says eos_token={name!r}, which"
            " is not among the tokens of tokenizer.json. Documents are told apart by it: set eos_token to one of those."
        )
    if tokenizer.encode(f"a {name}", add_special_tokens=False).ids[-1:] != [ids[name]]:
        raise ValueError(
            f"tokenizer: {directory} reads its own eos_token={name!r} as text, so no document would end. Put it among"
            " the added_tokens of tokenizer.json, as special."
        )
    return TokenizerFiles(
        directory=directory,
        digest=hashlib.sha256(b"\0".join(contents)).hexdigest(),
        vocab_size=max(ids.values()) + 1,
        eos=name,
        eos_id=ids[name],
    )


def token_byte_lengths(files: TokenizerFiles) -> np.ndarray:
    """How many bytes of text each token id stands for: int32 [vocab_size], special tokens 0.

    For byte-level tokenizers, and for those of SentencePiece that change no character, the sum over a document's tokens
    is exactly the length of the text in UTF-8 (and of the space that Levanter puts before its end), for tokens that are
    part of a character too. (Decoding each token by itself instead turns such a part into U+FFFD, 3 bytes.) A tokenizer
    that puts a space before every document, which is none of the text, has it taken off again by the token that ends
    each document: that one may stand for -1 bytes. (A text that begins with a space gets none from some, and is 1 off.)

    A tokenizer that drops or replaces characters (lower case, no spaces, unknown words) cannot be told from its tokens
    alone: for it `check_byte_lengths` compares with the text.
    """
    tokenizer = _load(files.directory)
    contents = json.loads(_read(files.directory, "tokenizer.json"))
    length = _byte_level_length if '"ByteLevel"' in json.dumps(contents["decoder"]) else _piece_length
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(files.vocab_size, np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[index] = length(token)
    for index, token in added.items():
        lengths[index] = 0 if token.special else len(token.content.encode())
    lengths[files.eos_id] = 0
    probe = tokenizer.encode(f"a {files.eos}", add_special_tokens=False).ids
    lengths[files.eos_id] = len(b"a ") - lengths[probe].sum()
    return lengths


def check_byte_lengths(lengths: np.ndarray, held_out_bytes: dict[str, list[int]]) -> np.ndarray:
    """`lengths`, or where they do not add up to the text, `lengths` scaled so that they do: float32 [vocab_size].

    held_out_bytes: component -> bytes of its held-out text, as they are and as `lengths` say.
    """
    wrong = {name: counted / true - 1 for name, (true, counted) in held_out_bytes.items() if counted != true}
    if not wrong:
        return lengths
    true, counted = map(sum, zip(*held_out_bytes.values(), strict=True))
    errors = ", ".join(f"{name} {error:+.3%}" for name, error in wrong.items())
    log.warning(
        "the tokens of this tokenizer do not say how many bytes of text they stand for: on held-out text they are off"
        " by %s. Bits per byte count every token %.5f times as long: exact over all of that text, else estimates.",
        *(errors, true / counted),
    )
    return (lengths * (true / counted)).astype(np.float32)


def _byte_level_length(token: str) -> int:
    return len(token)  # One character of this alphabet stands for one byte.


def _piece_length(token: str) -> int:
    """Of a piece as SentencePiece or WordPiece writes it: "▁" for a space, "<0x0A>" for a byte, "##" for "goes on"."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())


def _beginning(texts: Iterable[str], characters: int) -> Iterator[str]:
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= characters:
            return


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


def _load(directory: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"tokenizer: {directory / 'tokenizer.json'} cannot be read: {error}.") from error


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer: {path} does not exist. A tokenizer is a directory with tokenizer.json and"
            " tokenizer_config.json (as `save_pretrained` writes it); names of models are not looked up. None trains"
            " one on the corpus."
        )
    return path.read_bytes()

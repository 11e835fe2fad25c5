# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: ours and those of others, and that the bytes of their tokens add up to the text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from train.tokenizer import EOS, build_tokenizer, check_byte_lengths, read_tokenizer, token_byte_lengths

TEXTS = [f"Text number {index}: naïve 世界,\n  def f(x):\treturn x + {index} ▁ é\n" * 5 for index in range(50)]


def build(cache_dir: Path, vocab_size: int):
    return build_tokenizer(cache_dir, "digest of TEXTS", lambda: [TEXTS], vocab_size)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cache"), 300)


def test_token_bytes_add_up_to_the_text(tokenizer):
    """Decoding token by token counts 3 bytes for each part of a character: 55 for a text of 26."""
    lengths, encoder = token_byte_lengths(tokenizer), Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))

    @settings(deadline=None, max_examples=200)
    @given(text=st.text())
    def check(text):
        assert lengths[encoder.encode(text).ids].sum() == len(text.encode())

    check()


def test_special_tokens_have_no_bytes_and_added_ones_do(tokenizer, tmp_path):
    trained = Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    trained.add_tokens(["世界"])
    trained.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tokenizer.directory / "tokenizer_config.json", tmp_path)
    lengths = token_byte_lengths(read_tokenizer(tmp_path))
    assert lengths[trained.token_to_id(EOS)] == 0
    assert lengths[trained.token_to_id("世界")] == 6


def test_training_again_gives_the_same_tokenizer(tokenizer, tmp_path):
    again = build(tmp_path, 300)
    assert (again.digest, again.vocab_size, again.eos_id) == (tokenizer.digest, 300, 0)


def test_another_vocab_size_is_another_tokenizer(tokenizer):
    assert build(tokenizer.directory.parent, 280).directory != tokenizer.directory


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small .* choose vocab_size >= 257"):
        build(tmp_path, 256)


def test_a_tokenizer_without_end_of_document_is_refused(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer.directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match=r"no end-of-document token: .* eos_token='</s>'"):
        read_tokenizer(tmp_path)


def test_a_name_instead_of_a_directory_is_refused():
    with pytest.raises(
        FileNotFoundError, match=r"gpt2/tokenizer\.json does not exist.*names of models are not looked up"
    ):
        read_tokenizer(Path("gpt2"))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)


def test_an_end_of_document_that_is_read_as_text_is_refused(tokenizer, tmp_path):
    """In the vocabulary, but not among the added tokens: no document would end."""
    shutil.copytree(tokenizer.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Ġn"}))
    with pytest.raises(ValueError, match="reads its own eos_token='Ġn' as text, so no document would end"):
        read_tokenizer(tmp_path)


def test_every_component_has_its_share_of_what_a_tokenizer_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("train.tokenizer.TRAINING_CHARACTERS", 1000)
    said, read = [], []

    def endless(letter):
        while True:
            read.append(letter)
            yield letter * 100

    build_tokenizer(tmp_path, "", lambda: [endless("a"), endless("b")], 260, said.append)
    assert (read.count("a"), read.count("b")) == (5, 5)
    assert "1 byte" not in said[-1]
    assert said[-1].endswith("on 0.0 M characters (of each component, the first 0 M)")


# What others' tokenizers look like: SentencePiece as BPE (Llama 2, Mistral) and as Unigram (T5), both with a token for
# each byte, and WordPiece (BERT), which drops spaces and capitals.


def sentencepiece_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.train_from_iterator(ASCII, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"]))
    return with_bytes(tokenizer)


def sentencepiece_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(ASCII, trainer)
    return with_bytes(tokenizer)


def with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """As SentencePiece adds them, and the trainers here do not: <0x00> to <0xFF>, for what is in no other token."""
    contents = json.loads(tokenizer.to_str())
    vocab, pieces = contents["model"]["vocab"], [f"<0x{byte:02X}>" for byte in range(256)]
    contents["model"]["byte_fallback"] = True
    if isinstance(vocab, dict):
        vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    else:
        vocab += [[piece, -20.0] for piece in pieces]
    return Tokenizer.from_str(json.dumps(contents))


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(ASCII, trainer)
    return tokenizer


ASCII = [f"Text number {index}: some words, and more of them\n" for index in range(200)]


def saved(tokenizer: Tokenizer, directory: Path):
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return read_tokenizer(directory)


def counted(tokenizer: Tokenizer, lengths: np.ndarray, text: str) -> float:
    """Bytes that the tokens of a document say, as Levanter writes it."""
    return lengths[tokenizer.encode(f"{text} </s>", add_special_tokens=False).ids].sum()


@pytest.mark.parametrize("made_by", [sentencepiece_bpe, sentencepiece_unigram])
def test_bytes_of_sentencepiece_tokens_add_up_to_each_document(tmp_path, made_by):
    """The space it puts before a document, which is none of the text, is taken off by the token that ends it."""
    tokenizer = made_by()
    lengths = token_byte_lengths(saved(tokenizer, tmp_path))
    assert lengths[tokenizer.token_to_id("</s>")] == -1
    for text in [*ASCII[:5], "x", "naïve 世界, \t\n  two  spaces", "🙂🙂"]:
        assert counted(tokenizer, lengths, text) == len(text.encode()) + 1


def test_bytes_that_tokens_do_not_tell_are_scaled_to_the_text_and_said(tmp_path, caplog):
    tokenizer = wordpiece()
    lengths = token_byte_lengths(saved(tokenizer, tmp_path))
    assert lengths[tokenizer.token_to_id("##s")] == 1
    true = sum(len(text.encode()) + 1 for text in ASCII)
    said = sum(int(counted(tokenizer, lengths, text)) for text in ASCII)
    assert said < 0.9 * true  # no spaces
    scaled = check_byte_lengths(lengths, {"web": [true, said], "exact": [50, 50]})
    assert scaled.dtype == np.float32
    total = sum(counted(tokenizer, scaled, text) for text in ASCII)
    assert total + 50 * scaled.max() / lengths.max() == pytest.approx(true + 50, rel=1e-5)
    assert f"off by web {said / true - 1:+.3%}. Bits per byte count every token" in caplog.text
    assert check_byte_lengths(lengths, {"exact": [50, 50]}) is lengths

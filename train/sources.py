# SPDX-License-Identifier: Apache-2.0
"""Texts of your own as a stream of documents, and which of them are held out. Files may be local or at any fsspec URL.

    web/*.jsonl, .jsonl.gz, .jsonl.zst     a JSON object per line, its text in a field (.json, .ndjson likewise)
    books/*.parquet                        a text column
    src/**/*.py, notes.txt.gz              anything else: a document per file
    hf:org/name                            a dataset of the Hugging Face hub, when HF_HUB_OFFLINE=0 allows the network;
                                           hf:org/name:config@revision#split names more of it

What cannot be read is a record too, with the problem in the place of the text: whoever reads them counts and says it.
"""

import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from train import lev

# Part of every digest: raise it when the same files would give other documents or another split.
SOURCE_FORMAT = 1

_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_HUB = re.compile(r"hf:(?P<path>[^:@#]+)(:(?P<name>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")


class Record(NamedTuple):
    """One document, or the problem that there is in its place. `where` says where it was read: "web.jsonl.gz:17"."""

    where: str
    text: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """A component of the user's: `path` is a file, a glob or a dataset of the hub, as in the module's docstring."""

    name: str
    path: str
    held_out: str | None  # the like for the documents to evaluate on; None: some of `path`, by the hash of their text
    text_field: str
    hold_out_every: int

    @property
    def digest(self) -> str:
        """Sha256 of what the documents depend on: the names, sizes and times of the files, and the fields above.

        Not of their contents, which for a large corpus would take longer to read at each start than to train on. A file
        that was touched is tokenized again, which costs time and nothing else.
        """
        files = [self._identity(path) for path in (self.path, self.held_out) if path]
        facts = [SOURCE_FORMAT, files, self.text_field, None if self.held_out else self.hold_out_every]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def documents(self) -> Iterator[tuple[str, Record]]:
        """(split, record) of every document, in the order of the files' names; records with a problem are of "train".

        Held out is one document in `hold_out_every`, by the sha256 of its text: the same on every machine, whatever
        lies beside it, and copies of one text are all on one side.
        """
        for record in self._records(self.path):
            is_held_out = not self.held_out and not record.problem and _hash(record.text) % self.hold_out_every == 0
            yield "validation" if is_held_out else "train", record
        if self.held_out:
            yield from (("validation", record) for record in self._records(self.held_out))

    def check(self) -> None:
        """Raises FileNotFoundError or ValueError where there is nothing to read; nothing has been written then."""
        for path in filter(None, (self.path, self.held_out)):
            self._identity(path)

    def _identity(self, path: str) -> Any:
        if path.startswith("hf:"):
            return sorted(_hub_dataset(path).items())
        return [[name, info["size"], str(info.get("mtime") or info.get("ETag"))] for name, info in _files(path)[1]]

    def _records(self, path: str) -> Iterator[Record]:
        if path.startswith("hf:"):
            rows = _hub_rows(_hub_dataset(path), path)
            yield from (_of_row(row, self.text_field, f"{path}[{i}]") for i, row in enumerate(rows))
            return
        filesystem, files = _files(path)
        for name, _ in files:
            yield from read_file(filesystem, name, self.text_field)


def read_file(filesystem: Any, name: str, text_field: str) -> Iterator[Record]:
    """The documents of one file.

    Raises:
      ValueError: it is damaged or ends too early; a parquet file has no column `text_field`.
    """
    stem = next((name.removesuffix(suffix) for suffix in _COMPRESSED if name.endswith(suffix)), name)
    try:
        with filesystem.open(name, "rb", compression=None if name.endswith(".zst") else "infer") as file:
            if name.endswith(".zst"):
                file = _unzstd(file)
            if stem.endswith(_JSON_LINES):
                yield from (_of_line(line, text_field, f"{name}:{i}") for i, line in enumerate(file, 1) if line.strip())
            elif stem.endswith(".parquet"):
                yield from _of_table(lev.ParquetFile(file), text_field, name)
            else:
                yield _of_bytes(file.read(), name)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, lev.ArrowInvalid) as error:  # cut off, or damaged
        raise ValueError(f"data: {name} cannot be read to its end: {error}. Fetch or write it again.") from error


def _files(path: str) -> tuple[Any, list[tuple[str, dict[str, Any]]]]:
    """The file system and the files, by name, that `path` or glob stands for.

    Raises:
      FileNotFoundError: there are none.
      ValueError: it is a folder.
    """
    filesystem, pattern = lev.url_to_fs(os.path.expanduser(path))
    found = filesystem.glob(pattern, detail=True)
    # A link is of type "other", whatever it leads to.
    files = [(name, info) for name, info in sorted(found.items()) if info["type"] == "file" or filesystem.isfile(name)]
    if not files and found:
        raise ValueError(
            f"data: {path} is a folder, and no Levanter cache here (no shard_ledger.json, nor train/shard_ledger.json;"
            f" one at a URL must be copied first). Name the files in it by a glob: '{path.rstrip('/')}/**/*.jsonl'."
        )
    if not files:
        raise FileNotFoundError(f"data: there is no file {path}. Globs may use *, ? and **.")
    return filesystem, files


def _hub_dataset(path: str) -> dict[str, str]:
    """The arguments of `datasets.load_dataset` that "hf:path:name@revision#split" stands for."""
    found = _HUB.fullmatch(path)
    if found is None:
        raise ValueError(f"data: {path!r} is no dataset of the hub; write hf:org/name, or hf:org/name:config#split.")
    return {"split": "train"} | {key: value for key, value in found.groupdict().items() if value}


def _hub_rows(dataset: dict[str, str], path: str) -> Iterator[dict[str, Any]]:
    try:
        yield from lev.load_dataset(**dataset, streaming=True)
    except (OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        advice = "Check the name and the connection, or download the files and name them instead."
        if offline and isinstance(error, OSError):
            advice = (
                "Nothing is fetched from a network unless you allow it: run it again with HF_HUB_OFFLINE=0 set, or"
                " download the files and name them instead."
            )
        raise ValueError(f"data: {path} cannot be read: {str(error).splitlines()[0]}. {advice}") from error


def _of_line(line: bytes, field: str, where: str) -> Record:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(where, problem="not UTF-8")
    except ValueError:
        return Record(where, problem="not JSON")
    return _of_row(row, field, where)


def _of_row(row: Any, field: str, where: str) -> Record:
    if not isinstance(row, dict) or field not in row:
        there_are = f"; its fields: {', '.join(row)}" if isinstance(row, dict) else ""
        return Record(where + there_are, problem=f"without a field {field!r}")
    return _of_text(row[field], where)


def _of_text(text: Any, where: str) -> Record:
    if not isinstance(text, str):
        return Record(where, problem="whose text is no string")
    if not text.strip():
        return Record(where, problem="empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return Record(where, problem="not UTF-8")
    return Record(where, text)


def _of_bytes(content: bytes, where: str) -> Record:
    try:
        return _of_text(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        return Record(where, problem="not UTF-8")


def _of_table(table: Any, field: str, name: str) -> Iterator[Record]:
    if field not in table.schema_arrow.names:
        raise ValueError(
            f"data: {name} has no column {field!r}; its columns: {', '.join(table.schema_arrow.names)}. Name the one"
            " that holds the text in data.text_fields."
        )
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[field]):
        for text in batch.column(0).to_pylist():
            yield _of_text(text, f"{name}[{row}]")
            row += 1


def _unzstd(file: IO[bytes]) -> IO[bytes]:
    """`file` decompressed. fsspec's own reader stops without a word after the first frame, and where a file is cut."""
    return io.BufferedReader(_Zstd(file), 1 << 20)


class _Zstd(io.RawIOBase):
    def __init__(self, file: IO[bytes]):
        self._file, self._frame, self._ready = file, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame is None or self._frame.eof:
                left = self._frame.unused_data if self._frame else b""
                if not (left := left or self._file.read(1 << 20)):
                    return 0
                self._frame = lev.ZstdDecompressor().decompressobj()
            elif not (left := self._file.read(1 << 20)):
                raise EOFError("the last zstd frame is not complete")
            try:
                self._ready = self._frame.decompress(left)
            except lev.ZstdError as error:
                raise OSError(str(error)) from error
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

# SPDX-License-Identifier: Apache-2.0
"""An offline corpus: the texts that every Python installation brings along, no account and no download.

    prose   `pydoc_data.topics`, the language reference as `help("topics")` shows it (about 0.5 MB of English)
    code    the standard library's own modules (about 8 MB of Python)

Documents are ordered by the sha256 of their id, and every n-th of that order is held out, so the split depends on
nothing but the ids. The corpus lives in `<cache_dir>/corpus-<digest of all texts>`: another Python patch release is
another corpus, and one on disk is never out of date.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from train.sources import Record

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")

# One document in this many is held out. There is little prose, so it gives up a larger share for a steady number.
HOLD_OUT_EVERY = {"prose": 8, "code": 20}

COMPONENTS = tuple(HOLD_OUT_EVERY)

# Not worth reading: tests, vendored or installed packages, and tables that only look like code. `encodings` alone is
# 1.4 MB of character maps; `pydoc_data` holds the prose.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
# Written when this Python was built: paths and flags of the machine that built it.
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One text. `id` names it within its component, the same on every machine: "asyncio/events.py"."""

    component: str
    id: str
    text: str

    @property
    def sort_key(self) -> str:
        return hashlib.sha256(f"{self.component}/{self.id}".encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk: `directory/<component>/<split>.jsonl`, one {"id", "text"} per line, and manifest.json.

    `digest` is the sha256 of every id and text in it, and the key of everything derived from it.
    """

    directory: Path
    digest: str

    @property
    def manifest(self) -> dict:
        return json.loads((self.directory / "manifest.json").read_text())

    def texts(self, component: str, split: str) -> list[str]:
        """The texts of one split, in corpus order."""
        with open(self.directory / component / f"{split}.jsonl", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]


@dataclass(frozen=True)
class CorpusComponent:
    """One component of a corpus, to be tokenized."""

    corpus: Corpus
    name: str

    @property
    def digest(self) -> str:
        return f"{self.corpus.digest} {self.name}"

    def documents(self) -> Iterator[tuple[str, Record]]:
        """(split, document), in corpus order."""
        for split in SPLITS:
            for index, text in enumerate(self.corpus.texts(self.name, split)):
                yield split, Record(f"{self.name}/{split}.jsonl:{index + 1}", text)


def python_documents() -> list[Document]:
    """Reads the running Python's own texts; 30 ms once they are in the page cache.

    Raises:
      FileNotFoundError: this Python came without its sources or without the topics of `help()`.
    """
    return _prose() + _code(Path(sysconfig.get_paths()["stdlib"]))


def build_corpus(cache_dir: Path, documents: list[Document], progress: Callable[[str], None] = print) -> Corpus:
    """Writes `documents` below `cache_dir`, unless they are there already, and says where.

    Raises:
      ValueError: a component has fewer than two documents, one to train on and one to hold out.
    """
    documents = sorted(documents, key=lambda document: document.sort_key)
    digest = _digest(documents)
    splits: dict[tuple[str, str], list[Document]] = {}
    for component in COMPONENTS:
        chosen = [document for document in documents if document.component == component]
        if len(chosen) < 2:
            raise ValueError(
                f"corpus: {len(chosen)} documents of {component!r}; at least 2 are needed, one of them to hold out."
            )
        splits[component, "validation"] = chosen[:: HOLD_OUT_EVERY[component]]
        splits[component, "train"] = [d for i, d in enumerate(chosen) if i % HOLD_OUT_EVERY[component]]

    def write(directory: Path) -> None:
        progress(f"corpus: writing {len(documents)} documents")
        files = {"/".join(key): _write_split(directory, *key, chosen) for key, chosen in splits.items()}
        manifest = {"python_version": platform.python_version(), "sha256": digest, "files": files}
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    return Corpus(build_once(Path(cache_dir) / f"corpus-{digest[:16]}", write, progress), digest)


def build_once(directory: Path, build: Callable[[Path], None], progress: Callable[[str], None] = print) -> Path:
    """Returns `directory`, after letting `build` fill it if it is not there: it appears whole or not at all.

    `build` writes into `<directory>.tmp`, which is then renamed, and removed where it raises. A lock keeps a second
    process waiting meanwhile; the kernel drops it however its holder ends, kill -9 included, and the next holder clears
    away what was half done.
    """
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / ".lock", "w") as lock_file, _locked(lock_file, progress):
        if not directory.exists():
            unfinished = directory.with_name(directory.name + ".tmp")
            if unfinished.exists():
                logger.warning("%s: clearing away what a stopped process had begun", unfinished)
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            try:
                build(unfinished)
            except Exception:
                shutil.rmtree(unfinished)
                raise
            os.rename(unfinished, directory)
    return directory


@contextmanager
def _locked(file: IO[str], progress: Callable[[str], None]) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress(f"waiting for another process that is building in {Path(file.name).parent}")
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # Closing the file unlocks it.


def _prose() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            f"corpus: Python {platform.python_version()} came without pydoc_data.topics, the texts of help(). Some"
            " distributions ship it in a separate package (python3-doc, libpython3-stdlib); `uv python install` has it."
        ) from error
    return [Document("prose", topic, text) for topic, text in topics.items()]


def _code(stdlib: Path) -> list[Document]:
    documents = []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and not _is_built(name)]
        for name in names:
            if name.endswith(".py") and not _is_built(name):
                path = Path(folder, name)
                text = path.read_text(encoding="utf-8")
                documents.append(Document("code", path.relative_to(stdlib).as_posix(), text))
    if len(documents) < 100:
        raise FileNotFoundError(
            f"corpus: found {len(documents)} modules of the standard library below {stdlib}, and expected several"
            " hundred .py files. This Python keeps its library in an archive or as bytecode only; use another, such"
            " as the one `uv python install` gives."
        )
    return documents


def _is_built(name: str) -> bool:
    return name.startswith(_SKIPPED_PREFIXES)


def _digest(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.component, document.id, document.text):
            encoded = part.encode()
            # The lengths keep ("a", "bc") and ("ab", "c") apart.
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _write_split(directory: Path, component: str, split: str, documents: list[Document]) -> dict:
    """Writes one .jsonl file; returns its line in the manifest."""
    path = directory / component / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    content = "".join(json.dumps({"id": document.id, "text": document.text}) + "\n" for document in documents)
    path.write_text(content, encoding="utf-8")
    return {
        "documents": len(documents),
        "text_bytes": sum(len(document.text.encode()) for document in documents),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }

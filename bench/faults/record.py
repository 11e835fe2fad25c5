# SPDX-License-Identifier: Apache-2.0
"""What came of each fault, and the table of it; work in child processes that may crash or hang."""

import json
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint_read import verify
from train.command import markdown
from train.prove_resume import digests, forked, wait_for

HANG_SECONDS = 120.0
OUTCOMES = NEWEST, OLDER, REFUSED, SKIPPED, FAILED = ("newest", "older", "refused", "skipped", "FAILED")


class BrokenError(AssertionError):
    """One of the things that must hold after a fault does not."""


def hold(condition: object, what: str) -> None:
    """Raises BrokenError where `what` is not so."""
    if not condition:
        raise BrokenError(what)


@dataclass
class Record:
    """One line for each kind of fault: how often it was tried, and what came of it."""

    counts: dict[str, Counter] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def try_once(self, kind: str, fault: Callable[[], str], what: str = "") -> None:
        """Notes the outcome that `fault` returns, or why what must hold after it did not."""
        try:
            outcome = fault()
        except BrokenError as broken:
            outcome = FAILED
            self.failures.append(f"{kind} {what}: {broken}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        self.counts.setdefault(kind, Counter())[outcome] += 1

    def table(self) -> str:
        """In Markdown."""
        rows = [["fault", "tried", *OUTCOMES]]
        for kind, counts in self.counts.items():
            rows.append([kind, str(counts.total()), *(str(counts[outcome] or "") for outcome in OUTCOMES)])
        totals = sum(self.counts.values(), Counter())
        rows.append(["all", str(totals.total()), *(str(totals[outcome] or "") for outcome in OUTCOMES)])
        return "\n".join(markdown(rows))


def inspect(checkpoints: Sequence[Path]) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Of each checkpoint, by its path, what `verify` finds wrong with it, and where that is nothing its `digests`."""
    problems = {str(path): verify(str(path)) for path in checkpoints}
    return {path: (wrong, {} if wrong else digests(path)) for path, wrong in problems.items()}


def inspected(checkpoints: Sequence[Path], folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """`inspect`, in a child: a process that has used TensorStore may not fork another."""
    found = answer(lambda: {"found": inspect(checkpoints)}, folder)
    hold("found" in found, f"looking at {checkpoints} ended with {found.get('ended')}\n{found['log'][-800:]}")
    return found["found"]


def answer(work: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What `work` returns in a child process, with all that it printed as "log"; of one that ends otherwise "ended"."""
    file, log = folder / "answer.json", folder / "log"
    file.unlink(missing_ok=True)

    def write() -> None:
        found = work()
        # What struck the work is not to strike its answer.
        os.seteuid(os.getuid())
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.write_text(json.dumps(found))

    end = time.monotonic() + HANG_SECONDS
    child = forked(write, log)
    code = wait_for(child, lambda: time.monotonic() > end)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = log.read_text()
    if code != 0 or not file.exists():
        return {"ended": "hung" if code is None else f"exit code {code}", "log": text}
    return json.loads(file.read_text()) | {"log": text}

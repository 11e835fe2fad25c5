# SPDX-License-Identifier: Apache-2.0
"""The commands of README.md and docs/ that train or plan: every flag is one, and the run would begin.

Those of four lines of docs/recipes/debug-on-a-tpu.md ended with "warmup_steps=20 is not below steps=20" until 2026-11.
"""

import re
import shlex
from pathlib import Path

import pytest

from train import plan, run
from train.run import choose, parse
from train.rundir import check_fit

ROOT = Path(__file__).parents[2]
OPTIONS = {"run": run.Options, "plan": plan.Options}
# To the end of the line, or of the quotation that it stands in. A page of --help is another test's.
COMMAND = re.compile(r'python -m train\.(run|plan) ([^`"\n]*-[^`"\n]*)')
# What the reader has, and we have not.
NOT_HERE = re.compile(r"--(resume|config) \S+|--variant (mine|relu2)|[\[\]]|…|\.\.\.")


def commands() -> dict[tuple[str, str], str]:
    """(tool, flags) -> a page that has them."""
    found = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for tool, flags in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            argv = shlex.split(NOT_HERE.sub("", flags), comments=True)
            if "--help" not in argv:
                found.setdefault((tool, shlex.join(argv)), str(page.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(("tool", "flags", "page"), [(*command, page) for command, page in commands().items()])
def test_it_is_understood(tool, flags, page):
    argv = shlex.split(flags)
    chosen, start = choose(argv, OPTIONS[tool]())
    _, launch = parse(argv, chosen, start, prog=f"python -m train.{tool}", description=page)
    check_fit(launch)
    launch.optimizer.schedule(launch.trainer.steps)

# SPDX-License-Identifier: Apache-2.0
"""Does a variant win, and what does it cost? `python -m grug_model.score base mine`; docs/recipes/score-a-variant.md.

command.py     the command: checks, then measures, then says
contract.py    the contract tests of the variants
cost.py        their training step, compiled for a TPU
runs.py        short runs over several seeds, kept and gone on with
stats.py       intervals and p-values
card.py        all that was found, and the verdict in a sentence
text.py        as a table for a terminal
page.py        as a page
ledger.py      every score that was made, and the last one of each variant
"""

from .command import main
from .ledger import last_scores

__all__ = ["last_scores", "main"]

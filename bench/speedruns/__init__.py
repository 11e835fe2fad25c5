# SPDX-License-Identifier: Apache-2.0
"""Speedruns: useful for exploration, not canonical. The model and the loop are those of `grug_model/`; a file here is a
snapshot of one configuration and an entry point, to be copied and changed, and deleted once it has been superseded.

    starter.py, vs_125m.py      the entries: python -m bench.speedruns.starter
    entry.py                    what an entry does: plan, train its seeds, say how it stands, add its row
    tracks.py                   what is raced for: a target loss, and the data that must stay as it is
    ledger.py, results.json     the rows, and the rule by which one counts
    leaderboard.py              the rows as docs/reports/speedruns.md: python -m bench.speedruns

docs/recipes/speedrun.md tells how to make one.
"""

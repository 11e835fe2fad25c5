# SPDX-License-Identifier: Apache-2.0
"""python -m bench.speedruns: writes docs/reports/speedruns.md anew from results.json, and prints it."""

from bench.speedruns import leaderboard, ledger
from train.command import errors_explained

if __name__ == "__main__":
    with errors_explained():
        leaderboard.write()
        print(ledger.PAGE.read_text(), end="")

# SPDX-License-Identifier: Apache-2.0
"""Cards as a score makes them, without anything measured."""

import dataclasses

from grug_model.score.card import Card, Row
from grug_model.score.contract import Contract
from grug_model.score.cost import Cost
from grug_model.score.runs import SeedRun

MIB = 2**20
COST = Cost("v5p:2x2x1", "130m", 150_000_000, 1000 * MIB, 900 * MIB, 0.1, 40.0, 61.0)
PASSED = Contract(passed=19)


def row(variant: str, losses, *, cost: Cost = COST, contract: Contract = PASSED, folder: str = "runs", **costs) -> Row:
    """A loss that is a text is the reason of a failure. costs: fields of COST that are different."""
    runs = tuple(
        SeedRun(seed, f"{folder}/{variant}{seed}", failure=loss)
        if isinstance(loss, str)
        else SeedRun(seed, f"{folder}/{variant}{seed}", "2 × cpu", loss, loss / 2, 5000.0, 3e7)
        for seed, loss in enumerate(losses)
    )
    return Row(variant, "abcd1234", 5_000_000, runs, contract, dataclasses.replace(cost, **costs))


def card(*rows: Row) -> Card:
    seeds = tuple(range(len(rows[0].runs)))
    return Card(rows, "laptop", 60, seeds, (), "2026-11-22T07:00:00+00:00", "1234567")

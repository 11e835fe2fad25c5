# SPDX-License-Identifier: Apache-2.0
"""python -m bench.scaling: compiles the cases that results.json lacks, and writes the report and its pictures anew.

python -m bench.scaling --only 7b v5p         of them those with these words: of preset, chip, chips, split
python -m bench.scaling --anew --only 130m    those that are there already too
python -m bench.scaling --only none           compiles nothing: the report and its pictures from results.json
"""

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from time import perf_counter

from bench.plan.sweep import WORKERS, quietly
from bench.scaling import report, row
from bench.scaling.cases import CASES, Case
from train.command import errors_explained
from train.progress import StatusLine
from train.summary import clock


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases that have all of these words")
    parser.add_argument("--anew", action="store_true", help="compile what is there already too")
    options = parser.parse_args()
    wanted = [case for case in CASES if set(options.only) <= words(case)]
    if not wanted and options.only != ["none"]:
        known = sorted({word for case in CASES for word in words(case)})
        raise ValueError(f"--only {' '.join(options.only)}: no case has all of these. There are {', '.join(known)}.")
    rows = row.read()
    compile_all([case for case in wanted if options.anew or case not in rows], rows)
    for path in report.write(rows):
        print(path)


def words(case: Case) -> set[str]:
    return {case.preset, case.chip, str(case.chips), case.split.replace(" ", "")}


def compile_all(cases: list[Case], rows: dict[Case, row.Row]) -> None:
    """Adds them to `rows`. Two at a time; each is written as it comes, so that a stop loses none."""
    line, start = StatusLine(), perf_counter()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), initializer=quietly) as pool:
        waiting = {pool.submit(row.compiled, case): case for case in cases}
        try:
            for done, future in enumerate(as_completed(waiting), start=1):
                case = waiting[future]
                rows[case] = future.result()
                row.write(rows)
                spent = perf_counter() - start
                left = f", about {clock(spent / done * (len(cases) - done))} left" if done < len(cases) else ""
                line.keep(
                    f"{done} of {len(cases)}: {case.preset} on {case.topology}, {case.split}: {clock(spent)}{left}"
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    with errors_explained():
        main()

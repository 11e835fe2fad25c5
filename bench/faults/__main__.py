# SPDX-License-Identifier: Apache-2.0
"""python -m bench.faults --kills 100 --corruptions 100 --disk 20: the campaign; its parts are in `bench/faults`.

Prints a table by kind of fault. Exit code: 0 where everything held that must hold, 1 otherwise.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from bench import faults


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description=faults.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--corruptions", type=int, default=20)
    parser.add_argument("--disk", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of each run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty folder for what is written; a temporary one if not given")
    known = parser.parse_args()
    # Every child compiles anew otherwise; and none is here for its speed.
    folder = known.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.chmod(0o755) if folder.exists() else folder.mkdir(parents=True)
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.absolute() / "compiled"))

    from bench.faults.corruptions import corrupt
    from bench.faults.disk import spoil_disks
    from bench.faults.kills import kill
    from bench.faults.record import Record
    from train.prove_resume import import_everything
    from train.stopping import catch_signals

    start, record = time.monotonic(), Record()
    import_everything()
    try:
        with catch_signals():
            if known.corruptions:
                corrupt(folder / "corruptions", known.corruptions, random.Random(known.seed), record)
            if known.disk:
                spoil_disks(folder / "disks", known.disk, random.Random(known.seed), record)
            if known.kills:
                kill(folder / "kills", known.kills, random.Random(known.seed), record, steps=known.steps)
    finally:  # of a campaign that is broken off, what there is
        print(f"\n{record.table()}\n\nseed {known.seed}, {time.monotonic() - start:.0f} s")
        print(*record.failures, sep="\n", flush=True)
    return 1 if record.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())

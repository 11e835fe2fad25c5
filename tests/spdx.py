# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.spdx FILE…`: fails, naming them, when files lack the licence line."""

import sys
from pathlib import Path

LINE = "# SPDX-License-Identifier: Apache-2.0"

if __name__ == "__main__":
    missing = [name for name in sys.argv[1:] if LINE not in Path(name).read_text().split("\n", 2)[:2]]
    if missing:
        raise SystemExit(f"these files must begin with {LINE!r}: {', '.join(missing)}")

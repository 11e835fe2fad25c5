# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.faults`: faults by the hundred, each at a moment or place drawn at random, and what comes of it.

    kills         SIGKILL of a run while it starts, after a step, in a save
    corruptions   a checkpoint's file cut, emptied, deleted, with a bit flipped or a page of zeros
    disk          a full disk, a limit on file sizes, a read-only disk, missing permissions: at the start or in a save

After each of them:

    kept          the newest intact checkpoint is what a run goes on from, or an older good one, with the reason said
    right         every array has the bits that were saved; anything else is refused
    explained     every refusal and every error names a file or an array
"""

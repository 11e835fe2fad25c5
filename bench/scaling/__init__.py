# SPDX-License-Identifier: Apache-2.0
"""How far the template scales, from the compiler alone: `python -m bench.scaling`. See docs/explanations/scaling.md."""

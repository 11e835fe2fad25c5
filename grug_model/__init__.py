# SPDX-License-Identifier: Apache-2.0
"""Variants, each one directory of model.py, train.py, launch.py; and tools to work on them, which no variant imports.

workflow      variants: the command; variants_edit; archive, git
comparison    diff: the command; diff_code, diff_facts, diff_page
"""

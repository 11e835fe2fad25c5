# SPDX-License-Identifier: Apache-2.0
"""A model file's configuration without its model, so that `--help` answers in half a second instead of three."""

import ast
import dataclasses
import sys
import types
import typing
from pathlib import Path


def only_the_knobs(file: Path, module_name: str) -> None:
    """Puts a module with only the plain dataclasses of `file` in place of `module_name`.

    Importing the whole file imports jax, which takes longer than reading the help. A dataclass that needs more than
    `dataclasses` and `typing` cannot be had this way: then nothing is put in place, and the help takes its time.
    """
    tree = ast.parse(file.read_text())
    tree.body = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and any(map(_is_dataclass, node.decorator_list))
    ]
    module = types.ModuleType(module_name)
    module.__file__ = str(file)
    vars(module).update(vars(typing) | vars(dataclasses) | {"__name__": module_name, "dataclasses": dataclasses})
    sys.modules[module_name] = module  # dataclasses looks its module up while it is being made
    try:
        exec(compile(tree, str(file), "exec"), vars(module))
    except NameError:
        del sys.modules[module_name]


def _is_dataclass(decorator: ast.expr) -> bool:
    name = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(name, ast.Name) and name.id == "dataclass"

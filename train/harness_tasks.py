# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: ours of held-out text, your own, lm-eval's. Imports lm-eval: import this module late."""

import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from train.data import PreparedData
from train.harness import FEWSHOT_SEED, HarnessConfig
from train.harness_model import no_generation
from train.held_out_tasks import held_out_tasks

log = logging.getLogger(__name__)

GENERATION = "generate_until"


def load_tasks(cfg: HarnessConfig, prepared: PreparedData, say: Callable[[str], None]) -> dict[str, Any]:
    """What `lm_eval.evaluator.evaluate` takes: the tasks of `cfg`, and the groups that they are of.

    Every request is made once, so that a task whose template fails for one of its rows fails here, not in mid-run.

    Raises:
      ValueError: a name is unknown; a task cannot be loaded, or generates text.
    """
    folders: list[str | Path] = [held_out_tasks(prepared, say), *_own_folder(cfg)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_knows(manager, name) for name in cfg.names):
        say("reading the list of lm-eval's own")  # thousands of files, some seconds
        manager = TaskManager(include_path=folders)
    if unknown := [name for name in cfg.names if not _knows(manager, name)]:
        raise ValueError(_no_such_tasks(unknown, manager, folders))
    if generating := {name for name in cfg.names if _generates(manager, name)}:
        raise ValueError(no_generation(generating))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in cfg.names:
        say(name)
        for kind, entries in _load(manager, name, cfg).items():
            loaded[kind] |= entries
    if generating := {name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == GENERATION}:
        raise ValueError(no_generation(generating))
    return loaded


def _own_folder(cfg: HarnessConfig) -> list[Path]:
    if cfg.include is None:
        return []
    folder = Path(cfg.include).expanduser()
    if not any(folder.glob("**/*.yaml")):
        raise ValueError(
            f"lm_eval: include={cfg.include} is no folder with task files (*.yaml). docs/recipes/lm-eval.md has one to"
            " start from."
        )
    return [folder]


def _knows(manager: TaskManager, name: str) -> bool:
    return name in manager.task_index or Path(name).is_file()


def _generates(manager: TaskManager, name: str) -> bool:
    """By its file alone: nothing should be fetched for a task that is refused."""
    entry = manager.task_index.get(name)
    return entry is not None and (entry.cfg or {}).get("output_type") == GENERATION


def _no_such_tasks(unknown: list[str], manager: TaskManager, folders: list[str | Path]) -> str:
    ours = sorted(
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path and any(entry.yaml_path.is_relative_to(folder) for folder in folders)
    )
    near = {name: difflib.get_close_matches(name, manager.all_tasks, n=4) for name in unknown}
    said = [f"lm_eval: there is no task {', '.join(unknown)}."]
    said += [f"Like {name}: {', '.join(names)}." for name, names in near.items() if names]
    said.append(f"Of held-out text and your own: {', '.join(ours)}.")
    read = {entry.yaml_path for entry in manager.task_index.values()}
    if skipped := [
        str(file) for folder in folders for file in sorted(Path(folder).glob("**/*.yaml")) if file not in read
    ]:
        # lm-eval passes over them in silence.
        said.append(f"Files without a task that lm-eval can read: {', '.join(skipped)}.")
    return " ".join(said)


def _load(manager: TaskManager, name: str, cfg: HarnessConfig) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dict(manager.load([name]))
        for task_name, task in loaded["tasks"].items():
            _set_fewshot(task_name, task, cfg.num_fewshot)
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(limit=cfg.limit)
        return loaded
    except OSError as error:  # of the hub: no network, offline by choice, no such data set
        raise ValueError(
            f"lm_eval: the data of the task {name} are not on this machine ({type(error).__name__}: {_first(error)})."
            " Nothing is downloaded unless HF_HUB_OFFLINE=0 is set: once, to fetch them. Or choose tasks of held-out"
            " text (grug_continuation, grug_held_out), or of your own files (dataset_path: json)."
        ) from error
    except Exception as error:  # whatever lm-eval meets in a task's file
        raise ValueError(
            f"lm_eval: the task {name} cannot be loaded: {type(error).__name__}: {_first(error)}. lm-eval's guide to"
            " task files says what belongs into one; docs/recipes/lm-eval.md has one that works."
        ) from error


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _set_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    """As `lm_eval.simple_evaluate` does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", own or 0)
    elif own == 0 and num_fewshot:
        log.warning("lm_eval: %s keeps num_fewshot=0, which its file says; %d is for the others", name, num_fewshot)
    else:
        task.set_config("num_fewshot", num_fewshot)

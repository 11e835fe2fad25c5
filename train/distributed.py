# SPDX-License-Identifier: Apache-2.0
"""One run in many processes: how they find each other. `train/last_words.py` is how all of them end when one does.

    GRUG_PROCESSES=4 GRUG_PROCESS=2 GRUG_COORDINATOR=host0:1234 python -m train.run ...

Flags win over these variables, and they over what SLURM, Open MPI or a TPU pod say. Where nothing says that there are
several, nothing is started. JAX's coordination service, in process 0, is where they meet; `train/together.py` is what
they do with it. No jax here until `join`.
"""

import dataclasses
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from train import last_words
from train.together import LostProcessError

log = logging.getLogger(__name__)

BY_HAND = "flags and environment"
VARIABLES = {"processes": "GRUG_PROCESSES", "process": "GRUG_PROCESS", "coordinator": "GRUG_COORDINATOR"}


@dataclass(frozen=True)
class DistributedConfig:
    """Whether this process is one of several that train one run. None: as the environment says."""

    # How many there are. None: GRUG_PROCESSES, or as SLURM, Open MPI or a TPU pod say. 1: this one is alone, whatever
    # they say.
    processes: int | None = None
    # Which of them this is, from 0. None: GRUG_PROCESS, or as they say.
    process: int | None = None
    # host:port at which process 0 is to listen. None: GRUG_COORDINATOR, or as they say.
    coordinator: str | None = None
    # For all of them to meet.
    start_seconds: int = 300
    # Without a sign of life, after which a process counts as lost and all others end.
    lost_seconds: int = 60

    def __post_init__(self):
        for name in ("start_seconds", "lost_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"DistributedConfig: {name}={getattr(self, name)}; it is at least 1.")


@dataclass(frozen=True)
class Place:
    """One process among several. coordinator: host:port."""

    processes: int
    process: int
    coordinator: str
    said_by: str


def environment_of(processes: int, process: int, coordinator: str) -> dict[str, str]:
    """The variables that tell one process its place: what a launcher of any kind has to set."""
    return {
        VARIABLES["processes"]: str(processes),
        VARIABLES["process"]: str(process),
        VARIABLES["coordinator"]: coordinator,
    }


def place_of(cfg: DistributedConfig) -> Place | None:
    """This process among several, or None where it is alone.

    Raises:
      ValueError: what is said of it is not enough, or makes no sense.
    """
    said: dict[str, Any] = {name: os.environ.get(variable) for name, variable in VARIABLES.items()}
    said |= {name: value for name in VARIABLES if (value := getattr(cfg, name)) is not None}
    said = {name: value for name, value in said.items() if value is not None}
    for name in said.keys() & {"processes", "process"}:
        said[name] = _number(name, said[name])
    if said.get("processes") == 1:
        return None
    if len(said) == len(VARIABLES):
        return _checked(Place(**said, said_by=BY_HAND))
    cluster = _of_cluster()
    if not said:
        return cluster
    if cluster is not None:
        return _checked(dataclasses.replace(cluster, **said))
    there_is = ", ".join(f"{name} {value}" for name, value in said.items())
    missing = [f"--distributed.{name} ({variable})" for name, variable in VARIABLES.items() if name not in said]
    raise ValueError(
        f"distributed: {there_is} is said, but not {', '.join(missing)}; and this is no SLURM step, Open MPI job or TPU"
        " pod, which would say it. Give all three: the number of processes and process 0's host:port alike everywhere,"
        " and to each process its own number."
    )


def _number(name: str, text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"distributed: {VARIABLES[name]}={text!r} is no whole number.") from None


def _checked(place: Place) -> Place:
    host, _, port = place.coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(
            f"distributed: the coordinator {place.coordinator!r} is no host:port, such as node0:1234: an address of"
            " process 0's machine that the others reach, and a port that is free there."
        )
    if not 0 <= place.process < place.processes:
        raise ValueError(
            f"distributed: this is process {place.process} of {place.processes}, by {place.said_by}. They are numbered"
            f" from 0 to {place.processes - 1}."
        )
    return place


def _of_cluster() -> Place | None:
    """As JAX's own detection says, where it finds more than one process."""
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        # Kubernetes' would ask an API server, mpi4py's start MPI: they are not asked.
        if cluster.opt_in_only_method or cluster.__name__ == "K8sCluster":
            continue
        try:
            if cluster.is_env_present():
                return _place_in(cluster)
        except Exception as problem:  # of the network, of a variable that is not what it should be
            log.warning("%s cannot tell whether there are other processes, and this one is taken to be alone: %s. Say"
                        " it with --distributed.processes", cluster.__name__, problem)  # fmt: skip
    return None


def _place_in(cluster: Any) -> Place | None:
    # A shell in an allocation of many tasks is itself a step of one.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1" or (count := cluster.get_process_count()) == 1:
        return None
    address = cluster.get_coordinator_address(60, os.environ.get("JAX_COORDINATOR_PORT"))
    return Place(count, cluster.get_process_id(), address, f"JAX's detection ({cluster.__name__})")


def join(cfg: DistributedConfig) -> None:
    """Meets the others, where this process is one of several; says so, and which. Before the first look for devices.

    Raises:
      ValueError: as `place_of`.
      LostProcessError: process 0 did not answer within `cfg.start_seconds`.
    """
    place = place_of(cfg)
    if place is None:
        return
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"process {place.process}: %(levelname)s %(name)s: %(message)s"))
    log.info("%d processes are to meet at %s", place.processes, place.coordinator)
    import jax

    from train.mesh import quiet_libtpu

    quiet_libtpu()
    _meet(place, cfg)
    last_words.listen(cfg.lost_seconds)
    here, platform = jax.local_device_count(), jax.default_backend()
    log.info("process %d of %d has %d of %d devices (%s)",
             place.process, place.processes, here, jax.device_count(), platform)  # fmt: skip
    if place.process:  # what goes well, process 0 says for all
        logging.getLogger("train").setLevel(logging.WARNING)


def _meet(place: Place, cfg: DistributedConfig) -> None:
    import jax

    until = time.monotonic() + cfg.start_seconds
    if place.process:
        _wait_for_process_0(place, cfg, until)
    met = threading.Event()
    # Where somebody is missing JAX aborts with a page of C++: this thread is there first, and says it.
    threading.Thread(target=_give_up, args=(place, cfg, until, met), daemon=True).start()
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        cluster_detection_method="deactivate" if place.said_by == BY_HAND else None,
        initialization_timeout=cfg.start_seconds + 60,
        heartbeat_timeout_seconds=cfg.lost_seconds + 60,  # likewise: last_words is first
    )
    met.set()


def _wait_for_process_0(place: Place, cfg: DistributedConfig, until: float) -> None:
    host, _, port = place.coordinator.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise LostProcessError(
                    f"distributed: nobody listens at {place.coordinator} after {cfg.start_seconds} s ({error}), where"
                    f" process 0 should; this is process {place.process} of {place.processes}, by {place.said_by}. Is"
                    " process 0 running? Is that an address of its machine, which this one reaches?"
                ) from error
            time.sleep(0.5)


def _give_up(place: Place, cfg: DistributedConfig, until: float, met: threading.Event) -> None:
    if not met.wait(max(until - time.monotonic(), 1.0)):
        last_words.end_now(
            f"distributed: not all of {place.processes} processes have come to {place.coordinator} within"
            f" {cfg.start_seconds} s; this is process {place.process}, by {place.said_by}. Each says in its log that it"
            " is to meet there: the one that does not is not running, or has another address or number."
        )

"""Run jobs on a Ray cluster, on machines that have room; a job whose process dies is tried once more."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import unmoved
from unmoved.core import messages
from unmoved.core.errors import UnmovedError, require_number, require_whole
from unmoved.core.files import write_atomic
from unmoved.experiments.local_pool import DEATHS, JobError, ProcessDied

logger = logging.getLogger("unmoved")
JobT = TypeVar("JobT")
Answer = tuple[str, str]  # the result of a job: done, mistake (of a user), error, unfit (machine); and a message
PATIENCE = 10.0  # seconds: network file systems show new files late
STORE = 100 * 2**20  # bytes of shared memory of a cluster of our own: nothing large passes through it


@dataclass(frozen=True)
class Cluster:
    """Say which cluster jobs are sent to, and what each of them takes.

    Attributes:
        address: ``"host:port"``; ``"local"`` starts a cluster of this machine alone. By default the one that
            RAY_ADDRESS names, or that runs on this machine, or else a local one.
        cpus: cores per job.
        gpus: GPUs per job; a fraction if jobs are to share one.

    Raises:
        UnmovedError: an invalid address or number.
    """

    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        keep = object.__setattr__
        keep(self, "cpus", require_whole("--cpus-per-run", self.cpus, at_least=1))
        keep(self, "gpus", require_number("--gpus-per-run", self.gpus, at_least=0))
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UnmovedError(f"--gpus-per-run: expected a share of one GPU or a whole number, came {self.gpus:g}")
        if self.address not in (None, "auto", "local"):
            _host_and_port("--ray-address", str(self.address))


def each(
    act: Callable[[JobT], object],
    jobs: Sequence[JobT],
    count: int,
    poll: Callable[[], None] | None = None,
    *,
    cluster: Cluster,
    shared: Path,
) -> Generator[tuple[int, BaseException | None]]:
    """Do the jobs on the cluster, ``count`` at a time; yield each one's number as it ends, with its error or None.

    Args:
        act: a function of a module that every machine can import, called with a job in a process of the cluster.
        poll: called a few times a second.
        shared: a folder that every machine must see; made where it is missing.

    Raises:
        UnmovedError: Ray is not installed; no cluster at the address; a machine that does not see ``shared``, or on
            which this version of the package cannot be imported. What still runs is ended.
    """
    with _connected(cluster) as ray, _token(shared) as token:
        lost = ray.exceptions
        deadly = (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError, lost.ObjectLostError)
        # Ray's own retries would come at once; ours come after the other jobs, when there is more room.
        task = ray.remote(max_retries=0, num_cpus=cluster.cpus, num_gpus=cluster.gpus)(_traveller())
        setting = (str(token), os.getcwd(), cluster.gpus, PATIENCE)
        waiting, deaths = deque(range(len(jobs))), Counter[int]()
        busy: dict[object, int] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < count:
                    number = waiting.popleft()
                    busy[task.remote(unmoved.__version__, pickle.dumps((act, jobs[number])), setting)] = number
                for reference in ray.wait(list(busy), timeout=0.3)[0]:
                    number = busy.pop(reference)
                    error: BaseException | None
                    try:
                        error = _error_of(ray.get(reference))
                    except deadly:
                        deaths[number] += 1
                        if deaths[number] < DEATHS:
                            waiting.append(number)
                            continue
                        error = ProcessDied()
                    except lost.RayError as trouble:
                        error = JobError(f"Ray: {type(trouble).__name__}: {trouble}")
                    yield number, error
                if poll is not None:
                    poll()
        finally:
            for reference in busy:
                ray.cancel(reference, force=True)
            if busy:
                ray.wait(list(busy), num_returns=len(busy), timeout=30)


def _error_of(answer: Answer) -> BaseException | None:
    kind, words = answer
    if kind == "unfit":  # it would fail one job after the other
        raise UnmovedError(words)
    return {"done": None, "mistake": UnmovedError(words), "error": JobError(words)}[kind]


# --- on the machines


def _traveller() -> Callable[..., Answer]:
    """Return the function that does a job on a machine; it is sent as code, since the package may be missing there."""

    def run(version: str, payload: bytes, setting: tuple[str, str, float, float]) -> Answer:
        try:
            import unmoved

            there = f"version {unmoved.__version__}"
            if unmoved.__version__ == version:
                from unmoved.experiments import ray_cluster as cluster

                return cluster.attempt(payload, *setting)
        except ImportError as error:
            there = str(error)
        import socket

        return "unfit", (
            f"{socket.gethostname()}: expected unmoved {version} on every machine of the cluster, came: {there} "
            f"(with {sys.executable}); install the same version there, with pip install 'unmoved[ray]'"
        )

    return run


def attempt(payload: bytes, token: str, folder: str, gpus: float, patience: float) -> Answer:
    """Do a job in this process, which has this package: ``payload`` is (act, job), pickled."""
    name, deadline = socket.gethostname(), time.monotonic() + patience
    while not os.path.exists(token):
        if time.monotonic() > deadline:
            return "unfit", (
                f"{name}: expected a machine that sees the folder of the runs, came one where {Path(token).parent} is "
                "missing or another one; choose an --out on a file system that all machines of the cluster share"
            )
        time.sleep(0.1)
    with suppress(OSError):  # so that relative paths in recipes work if this folder is shared
        os.chdir(folder)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves all GPUs visible to a job that asked for none
    for variable in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[variable]  # set for the processes that Ray was started with; a run is not one of several
    act, job = pickle.loads(payload)  # an ImportError here is the package's own
    if gpus:
        import torch

        if not torch.cuda.is_available():
            return "unfit", (
                f"{name}: expected a PyTorch that sees the {gpus:g} GPU(s) which Ray set aside for a run, came "
                f"{torch.__version__}, which sees none; install one that is built for them"
            )
    try:
        with messages.shown():
            act(job)
    except UnmovedError as error:
        return "mistake", str(error)
    except JobError as error:
        return "error", str(error)
    except Exception as error:  # as text: other processes may be unable to unpickle its type
        return "error", f"{type(error).__name__}: {error}"
    return "done", ""


# --- on the driver


@contextmanager
def _connected(cluster: Cluster) -> Iterator[ModuleType]:
    """Join the cluster and yield ``ray``; a connection that exists already is used as it is, and stays."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UnmovedError("--on ray needs the extra: pip install 'unmoved[ray]'") from error
    if ray.is_initialized():
        _say_where_nothing_fits(ray, cluster, started=False)
        yield ray
        return
    started = _connect(ray, cluster.address)
    try:
        _say_where_nothing_fits(ray, cluster, started=started)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str | None) -> bool:
    """Join the cluster, or start one and return True."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = os.environ.get("RAY_ADDRESS", "") if address in (None, "auto") else address
    if named not in ("", None, "auto", "local"):
        _require_listener(*_host_and_port("--ray-address" if named == address else "RAY_ADDRESS", str(named)))
    where = None if address == "auto" else address
    init = partial(ray.init, address=where, include_dashboard=False, logging_level=logging.ERROR)
    try:
        with _elsewhere():
            try:
                init(object_store_memory=STORE)
                return True
            except ValueError:  # raised if there is a running cluster, whose memory cannot be set
                init()
                return False
    except Exception as error:  # Ray raises plain ones, too
        what = f"join the Ray cluster {named}" if named else "start Ray on this machine"
        raise UnmovedError(f"could not {what}: {error}") from error


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Change to the root folder inside the block, since Ray's workers import modules from its starting folder first.

    A struct.py in that folder would replace the standard library's. Every machine has a root folder, and only its
    administrator can write there.
    """
    here = os.getcwd()
    os.chdir(os.path.abspath(os.sep))
    try:
        yield
    finally:
        os.chdir(here)


def _host_and_port(source: str, address: str) -> tuple[str, int]:
    """Parse ``"host:port"``; an error names where the address comes from."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UnmovedError(
            f"{source}: expected host:port, auto or local, came {address!r}; with a ray:// address, run the command on "
            "a machine of the cluster instead"
        )
    return host.strip("[]"), int(port)


def _require_listener(host: str, port: int) -> None:
    """Raise `UnmovedError` if nothing answers at the address; Ray would try for minutes, then end the process."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise UnmovedError(
            f"expected a Ray cluster at {host}:{port}, came no answer ({error}); start one there with "
            "`ray start --head`, or choose another --ray-address"
        ) from error


def _say_where_nothing_fits(ray: ModuleType, cluster: Cluster, *, started: bool) -> None:
    """Log that no machine is large enough, or raise `UnmovedError` on a local cluster; Ray would wait silently."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = {(machine.get("CPU", 0.0), machine.get("GPU", 0.0)) for machine in machines}
    if any(cpus >= cluster.cpus and gpus >= cluster.gpus for cpus, gpus in sizes):
        return
    came = ", ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in sorted(sizes))
    message = f"expected a machine with {cluster.cpus} CPUs and {cluster.gpus:g} GPUs for a run, came {came}"
    if started:
        raise UnmovedError(f"{message}; ask for less with --cpus-per-run and --gpus-per-run")
    logger.warning("%s; waiting until one joins the cluster", message)


@contextmanager
def _token(shared: Path) -> Iterator[Path]:
    """Make a file by which a machine checks that it sees this folder and not another of the same name."""
    token = shared.absolute() / f".cluster.{uuid.uuid4().hex}.tmp"
    write_atomic(token, b"")
    try:
        yield token
    finally:
        with suppress(OSError):
            token.unlink()

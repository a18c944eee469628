"""Jobs of a sweep. Each job has its own process and its own GPUs; a failed job stops no other.

Hydra decides which jobs there are. Hydra's launcher decides where and when each job starts.
`harness.run` does the work of a job. As a program, `python -m harness.sweep DIRECTORY` runs one job
and reads its resolved configuration from standard input.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from harness.errors import REPORTED
from harness.results import KEYS_WITHOUT_EFFECT
from repository import read_env, search_path

logger = logging.getLogger(__name__)

LOG, JOB, FAILURE, SUMMARY = "log.txt", "job.json", "failure.json", "summary.json"
POLL_S = 0.5


def run_job(config: DictConfig, sweep_dir: str | Path, overrides: Sequence[str]) -> None:
    """Run one job to its end. The result goes to the job's directory and to the log.

    Args:
        config: the configuration of the job.
        sweep_dir: the folder of all jobs. Each job has a folder in it, whose name depends only on
            the job's configuration. So a sweep that is started again continues its jobs.
        overrides: the overrides that made the job, for the record.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    directory = Path(sweep_dir) / job_name(plain)
    directory.mkdir(parents=True, exist_ok=True)
    shown = f"{directory.name} ({' '.join(overrides)})"
    with _devices(plain["method"]["llm"].get("tensor_parallel_size") or 1) as devices:
        _write(directory / JOB, {"overrides": list(overrides)})
        logger.info("starts: %s", shown)
        status = _run_process(plain, directory, devices)
    failure = directory / FAILURE
    if status == 0:
        failure.unlink(missing_ok=True)
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        score = "not evaluated" if summary["score"] is None else f"{summary['score']:.3f}"
        speed = f"{summary['tokens_per_second']:.1f} tokens/s"
        logger.info("complete: %s: %s %s, %s", shown, summary["metric"], score, speed)
    else:
        error = _last_words(directory / LOG, status)
        _write(failure, {"overrides": list(overrides), "error": error})
        logger.error("failed: %s: %s", shown, error)


def job_name(plain: Mapping[str, Any]) -> str:
    """Data set, method, and eight digits: a hash of the whole configuration."""
    counted = {key: value for key, value in plain.items() if key not in KEYS_WITHOUT_EFFECT}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    name = f"{plain['dataset']['name']}-{plain['method']['name']}-{digest[:8]}"
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


class ListJobs(Callback):
    """Hydra's callback that lists at the end of a sweep how its jobs ended.

    It exits with 1 if a job failed or did not end.
    """

    sweep_dir: ClassVar[Path]
    start: ClassVar[float]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        ListJobs.sweep_dir = Path(config.hydra.sweep.dir)
        ListJobs.start = time.time()
        # Hydra and some launchers list the jobs too, but not always.
        for name in ("hydra", "hydra_plugins"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if list_jobs(self.sweep_dir, self.start):
            sys.exit(1)


def list_jobs(sweep_dir: Path, start: float) -> int:
    """Print how each job ended that started after `start`, a time in seconds since the epoch.

    Returns the number of jobs that failed or did not end.
    """
    # A file's time may be coarser than the clock.
    jobs = [path for path in sorted(sweep_dir.glob(f"*/{JOB}")) if path.stat().st_mtime > start - 2]
    unwell = [path for path in jobs if (path.parent / FAILURE).exists() or not _is_complete(path)]
    num_complete = len(jobs) - len(unwell)
    print(f"{num_complete} jobs complete, {len(unwell)} failed, in {sweep_dir}", flush=True)
    for path in unwell:
        failure = path.parent / FAILURE
        known = json.loads((failure if failure.exists() else path).read_text(encoding="utf-8"))
        overrides = " ".join(known["overrides"])
        error = known.get("error", f"has not ended; see {LOG}")
        print(f"failed: {path.parent.name} ({overrides}): {error}", flush=True)
    return len(unwell)


def _is_complete(job: Path) -> bool:
    return (job.parent / SUMMARY).exists()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _run_process(plain: Mapping[str, Any], directory: Path, devices: "_Devices") -> int:
    # The progress bar writes its lines to a file here, so it is updated seldom.
    defaults = {"TQDM_MININTERVAL": "10", "PYTHONPATH": search_path()}
    with (directory / LOG).open("a", encoding="utf-8") as log:
        return subprocess.run(
            [sys.executable, "-m", "harness.sweep", str(directory)],
            input=OmegaConf.to_yaml(OmegaConf.create({**plain, "save_path": str(directory)})),
            text=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **defaults, **devices.environment},
            # The job inherits the locks. If this process is killed and the job is not, its GPUs
            # stay locked.
            pass_fds=[file.fileno() for file in devices.locks],
        ).returncode


def _last_words(log: Path, status: int) -> str:
    if status < 0:
        return f"killed by signal {-status}"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"


class _Devices(NamedTuple):
    environment: dict[str, str]
    locks: Sequence[IO[str]]


@contextlib.contextmanager
def _devices(num_devices: int) -> Iterator[_Devices]:
    """An environment that shows `num_devices` GPUs that no other job on this host has.

    This waits until that many GPUs are free. If the host has too few, the environment is empty.
    """
    visible = _visible_devices()
    if len(visible) < num_devices:  # vLLM runs on the CPU, or says that there are too few GPUs
        yield _Devices({}, ())
        return
    with contextlib.ExitStack() as stack:
        while len(locked := _lock(visible, num_devices)) < num_devices:
            for file in locked.values():
                file.close()
            time.sleep(POLL_S)
        for file in locked.values():
            stack.enter_context(file)  # closing it unlocks, unless the job still holds it
        yield _Devices({"CUDA_VISIBLE_DEVICES": ",".join(locked)}, tuple(locked.values()))


def _lock(visible: Mapping[str, str], num_devices: int) -> dict[str, IO[str]]:
    """Up to `num_devices` GPUs that this call locked, each with its locked file."""
    folder = Path(tempfile.gettempdir()) / f"speculative-ensemble-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    locked: dict[str, IO[str]] = {}
    for device, uuid in visible.items():
        if len(locked) == num_devices:
            break
        file = (folder / f"{uuid}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            locked[device] = file
    return locked


def _visible_devices() -> dict[str, str]:
    """The GPUs that this process may use: their names in `CUDA_VISIBLE_DEVICES`, and their UUIDs.

    A UUID means the same to every process. A number does not: each job of a cluster may see its own
    GPU as number 0.
    """
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        uuids = []
    else:
        uuids = re.findall(r"^GPU \d+:.*\(UUID: ([^)]+)\)", listed.stdout, re.MULTILINE)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(len(uuids))) if given is None else map(str.strip, given.split(","))
    return {
        name: uuids[int(name)] if name.isdigit() and int(name) < len(uuids) else name
        for name in names
        if name
    }


def main() -> None:
    from harness.run import run

    read_env()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        run(OmegaConf.create(sys.stdin.read()), sys.argv[1])
    except REPORTED as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Runs one untrusted Python program in a confined process and says whether it reached its end.

This module knows processes, resource limits and system calls. It does not know tasks, or what a
program tests. The parent imports this file; the confined child runs it as a script (see
`_child_main`).

The confinement is made for programs that a language model wrote. Such programs do harm by mistake.
They are not written to break out of this sandbox. `docs/tasks.md` lists what is prevented and what
is not.
"""

import contextlib
import ctypes
import functools
import logging
import math
import os
import platform
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

logger = logging.getLogger(__name__)

# What the child can be kept from, besides running too long. The child reports which ones it
# achieved.
PROTECTIONS = ("files", "memory", "network", "processes")
# For each protection: code that does what is prevented, and the error that shows the protection.
_USES = {
    "files": ("open('file', 'w')", "PermissionError"),
    "memory": ("bytearray(1 << 30)", "MemoryError"),
    "network": ("import socket; socket.socket()", "PermissionError"),
    "processes": ("import os; os.fork() or os._exit(0)", "PermissionError"),
}
_USES_MEMORY_MB = 512

_PROGRAM_FILE = "program.py"
_STARTUP_LOG = "startup.log"
_TOKEN_BYTES = 32
_STARTUP_TIMEOUT_S = 60.0  # for the interpreter alone; only a broken or overloaded machine needs it
_MAX_LINE_BYTES = 4096


class ExecutionResult(NamedTuple):
    passed: bool
    reason: str  # "passed", "timed out", "failed: ...", or how the process ended early


# ---------------------------------------------------------------------------------------------
# The parent
# ---------------------------------------------------------------------------------------------


def run_program(
    source: str,
    timeout_s: float = 3.0,
    memory_mb: int = 2048,
) -> ExecutionResult:
    """Execute `source` in a fresh, confined interpreter; it passes if it runs to its end.

    A program fails on an exception, on an exit of any kind, or after more than `timeout_s` seconds
    of wall time. The time counts from when the interpreter is ready. The program's output is
    discarded, and none of its processes outlives the call. Thread-safe.

    Raises:
        RuntimeError: the confined interpreter could not be started. This says nothing about the
            program.
    """
    token = os.urandom(_TOKEN_BYTES // 2).hex().encode()
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        # A model's text may hold lone surrogates. They are the program's fault, so let it fail.
        with open(os.path.join(folder, _PROGRAM_FILE), "wb") as file:
            file.write(source.encode("utf-8", "surrogatepass"))
        result_fd, child_fd = os.pipe()
        with open(result_fd, "rb", buffering=0):
            try:
                child = _start_child(folder, child_fd, timeout_s, memory_mb)
            finally:
                os.close(child_fd)
            try:
                reader = _LineReader(result_fd)
                _hand_over(child, token)
                _await_ready(reader, folder)
                verdict = reader.read_line(timeout_s)
            finally:
                _kill_group(child)
    return _judge(verdict, token, child.returncode)


def find_missing_protections() -> list[str]:
    """The PROTECTIONS that programs do not have here; a program tries each one to find out.

    If the confined interpreter does not start, all of them are missing.
    """
    try:
        results = {name: run_program(_use(name), 20.0, _USES_MEMORY_MB) for name in PROTECTIONS}
    except (OSError, RuntimeError):
        return list(PROTECTIONS)
    return [name for name, result in results.items() if not result.passed]


def _use(protection: str) -> str:
    """A program that tries what `protection` prevents. It passes if the try is refused."""
    use, refusal = _USES[protection]
    return f"try:\n    {use}\nexcept {refusal}:\n    pass\nelse:\n    raise AssertionError"


@functools.cache
def warn_of_execution() -> None:
    """Log, once per process, what executing generated code risks."""
    logger.warning(
        "evaluate.execute_code=true: code written by a language model will be executed on this "
        "machine. It runs in a confined subprocess. The code can still read every file that you "
        "can read. Use a container, or a machine without secrets."
    )


@functools.cache
def _warn_of_missing(missing: tuple[str, ...]) -> None:
    logger.warning(
        "executed programs can use %s, because this project knows no way to prevent that on this "
        "platform. Use a container.",
        ", ".join(missing),
    )


def _start_child(
    folder: str,
    child_fd: int,
    timeout_s: float,
    memory_mb: int,
) -> subprocess.Popen:
    # One thread per library. By default a library starts a thread per core when it is imported,
    # which exceeds the limits.
    environment = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    if "LD_LIBRARY_PATH" in os.environ:  # the Python of many clusters needs it to start
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    arguments = [str(child_fd), str(timeout_s), str(memory_mb)]
    with open(os.path.join(folder, _STARTUP_LOG), "wb") as startup_log:
        return subprocess.Popen(
            [sys.executable, "-I", "-B", os.path.abspath(__file__), *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=startup_log,
            pass_fds=(child_fd,),
            start_new_session=True,
        )


def _hand_over(child: subprocess.Popen, token: bytes) -> None:
    # The child may have died while starting. `_await_ready` then finds no ready line.
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
        pipe.write(token)


def _await_ready(reader: "_LineReader", folder: str) -> None:
    line = reader.read_line(_STARTUP_TIMEOUT_S)
    word, _, active = (line or b"").decode(errors="replace").partition(" ")
    if word != "ready":
        with open(os.path.join(folder, _STARTUP_LOG), errors="replace") as file:
            log = file.read().strip()
        why = "it took too long" if line is None else log or "it printed nothing"
        raise RuntimeError(f"the confined interpreter for generated code did not start: {why}")
    missing = tuple(name for name in PROTECTIONS if name not in active.split(","))
    if missing:
        _warn_of_missing(missing)


def _kill_group(child: subprocess.Popen) -> None:
    """End the child and what it started. A child that has already exited keeps its exit code."""
    # macOS raises either error for a group whose only member is a zombie.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # before `wait`, so no other process has this id
    child.wait()


def _judge(verdict: bytes | None, token: bytes, exit_code: int) -> ExecutionResult:
    if verdict is None:
        return ExecutionResult(False, "timed out")
    if verdict == token:
        return ExecutionResult(True, "passed")
    if verdict:
        return ExecutionResult(False, "failed: " + verdict.decode(errors="replace"))
    if exit_code < 0:
        return ExecutionResult(False, f"killed by signal {-exit_code} before its end")
    return ExecutionResult(False, f"exited with code {exit_code} before its end")


class _LineReader:
    """Lines from a pipe, each with a time limit."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""

    def read_line(self, timeout_s: float) -> bytes | None:
        """The next line without its end, or the rest at the end of file; None: out of time."""
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            while b"\n" not in self._buffer and len(self._buffer) < _MAX_LINE_BYTES:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                chunk = os.read(self._fd, _MAX_LINE_BYTES)
                if not chunk:
                    break
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


# ---------------------------------------------------------------------------------------------
# The child
# ---------------------------------------------------------------------------------------------


def _child_main(result_fd: int, timeout_s: float, memory_mb: int) -> None:
    active = _confine(timeout_s, memory_mb)
    with open(_PROGRAM_FILE, "rb") as file:
        source = file.read().decode("utf-8", "surrogatepass")
    os.dup2(1, 2)  # from here errors are discarded too: the start-up log is for this file's own
    os.write(result_fd, f"ready {','.join(sorted(active))}\n".encode())
    try:
        # Only a program that ran to its end may report the token. Python evaluates operands from
        # left to right, so the token is read from the pipe before the program runs. The token then
        # lies on this frame's value stack, where a search of frames and objects does not find it.
        # The token is too long to guess.
        os.write(result_fd, os.read(0, _TOKEN_BYTES) + _execute(source))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures as well
        text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        os.write(result_fd, text.encode(errors="replace") + b"\n")
    os._exit(0)  # without the exit handlers that the program may have registered


def _execute(source: str) -> bytes:
    exec(compile(source, _PROGRAM_FILE, "exec", dont_inherit=True), {})
    return b"\n"


def _confine(timeout_s: float, memory_mb: int) -> set[str]:
    """Restrict this process for good; returns the PROTECTIONS that are in force."""
    active = set()
    if _limit_resources(timeout_s, memory_mb):
        active.add("memory")
    if sys.platform == "linux":
        if _filter_system_calls():
            active.update(("files", "network", "processes"))
        elif _leave_network():
            active.add("network")
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a run that is killed leaves nothing behind
    return active


def _limit_resources(timeout_s: float, memory_mb: int) -> bool:
    """Limit resources; returns whether memory is limited, which some platforms cannot do."""
    cpu_s = math.ceil(timeout_s) + 1  # the parent's clock decides; this is for a parent that died
    _set_limit(resource.RLIMIT_CPU, cpu_s)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_FSIZE, 1 << 20)
    _set_limit(resource.RLIMIT_NOFILE, 64)
    _set_limit(resource.RLIMIT_NPROC, 0)  # root ignores this limit; the system call filter helps
    try:
        _set_limit(resource.RLIMIT_AS, memory_mb << 20)
    except (ValueError, OSError):
        return False
    return sys.platform == "linux"  # macOS accepts the limit but does not enforce it


def _set_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


# Linux: a filter on system calls (seccomp). It needs no privilege and works inside containers. It
# holds for everything that the process does later, also through ctypes. The process stays one
# process with one thread. A program can start nothing, so nothing can escape being killed.

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_FIRST_X32_CALL = 0x40000000
_RETURN_ALLOW = 0x7FFF0000
_RETURN_EPERM = 0x00050000 | 1

# machine -> (the kernel's number of the architecture, column in the table below)
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Always denied. name: (x86_64, aarch64); None if the architecture has no such call.
_DENIED_CALLS = {
    # processes and threads
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    # acting on other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpriority": (141, 140),
    "shmctl": (31, 195), "semctl": (66, 191), "msgctl": (71, 187),
    # network; io_uring could open sockets and files without this filter seeing it
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # changing files without opening them
    "creat": (85, None), "openat2": (437, 437), "truncate": (76, 45),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # the whole machine, in case the run belongs to root
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "reboot": (169, 142), "bpf": (321, 280),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "delete_module": (176, 106),
    "keyctl": (250, 219), "sethostname": (170, 161), "settimeofday": (164, 170),
    "clock_settime": (227, 112),
}  # fmt: skip

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ANY_BIT = 0xFFFFFFFF

# Denied if an argument has a bit of a mask: name: (x86_64, aarch64, argument, mask).
_CONDITIONALLY_DENIED_CALLS = {
    "open": (2, None, 1, _WRITING),
    "openat": (257, 56, 2, _WRITING),
    "fcntl": (72, 25, 1, 8),  # commands 8 to 15: they choose which process gets which signal
    "prlimit64": (302, 261, 0, _ANY_BIT),  # for any process but the caller, whose number is 0
    "sched_setaffinity": (203, 122, 0, _ANY_BIT),
    "sched_setscheduler": (144, 119, 0, _ANY_BIT),
    "sched_setparam": (142, 118, 0, _ANY_BIT),
}


class _Instruction(ctypes.Structure):
    """`struct sock_filter`"""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jump_true", ctypes.c_uint8),
        ("jump_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    """`struct sock_fprog`"""

    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def _load(offset: int) -> _Instruction:
    return _Instruction(0x20, 0, 0, offset)


def _skip(count: int) -> _Instruction:
    return _Instruction(0x05, 0, 0, count)


def _return(action: int) -> _Instruction:
    return _Instruction(0x06, 0, 0, action)


def _unless_equal(value: int, skip: int) -> _Instruction:
    return _Instruction(0x15, 0, skip, value)


def _unless_at_least(value: int, skip: int) -> _Instruction:
    return _Instruction(0x35, 0, skip, value)


def _unless_any_bit(mask: int, skip: int) -> _Instruction:
    return _Instruction(0x45, 0, skip, mask)


def _filter_instructions(architecture: int, column: int) -> list[_Instruction]:
    # `struct seccomp_data`: the call's number at 0, the architecture at 4, 64-bit arguments from 16
    deny = _return(_RETURN_EPERM)
    # Another architecture (32-bit, x32) has other numbers for its calls. The table would miss them.
    program = [_load(4), _unless_equal(architecture, 1), _skip(1), deny]
    program += [_load(0), _unless_at_least(_FIRST_X32_CALL, 1), deny]
    for numbers in _DENIED_CALLS.values():
        if numbers[column] is not None:
            program += [_unless_equal(numbers[column], 1), deny]
    for *numbers, argument, mask in _CONDITIONALLY_DENIED_CALLS.values():
        if numbers[column] is not None:
            program += [_unless_equal(numbers[column], 4), _load(16 + 8 * argument)]
            program += [_unless_any_bit(mask, 1), deny, _load(0)]
    return [*program, _return(_RETURN_ALLOW)]


def _filter_system_calls() -> bool:
    """Deny this process, for good, what the tables list. False if the platform cannot do it."""
    is_64_bit = sys.maxsize > 2**32
    if platform.machine() not in _ARCHITECTURES or not is_64_bit:
        return False
    instructions = _filter_instructions(*_ARCHITECTURES[platform.machine()])
    array = (_Instruction * len(instructions))(*instructions)
    program = _Program(len(instructions), array)
    # Without this promise the kernel accepts a filter only from root.
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1) != 0:
        return False
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program)) == 0


def _leave_network() -> bool:
    """Move to a network namespace that has no interface. False if the kernel forbids it."""
    new_user, new_network = 0x10000000, 0x40000000
    return _libc().unshare(ctypes.c_int(new_user | new_network)) == 0


def _prctl(option: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _libc().prctl(ctypes.c_int(option), *map(ctypes.c_ulong, padded))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
    _child_main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))

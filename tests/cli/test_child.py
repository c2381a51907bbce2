"""The server that chat starts for itself: found ready, ended in every case, and its failure passed on."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import typer

from brigade.cli.child import OwnServer, serve_command
from brigade.cli.fault import Fault

READY = "import sys, time, signal, os; print('noise'); print('Brigade is ready at http://127.0.0.1:1', flush=True); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and waits for its parent to notice does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_the_address_comes_from_the_ready_line_and_sigterm_ends_the_child(tmp_path: Path) -> None:
    note = tmp_path / "note"
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as in the background of a script
        f"def end(*_): open({str(note)!r}, 'w').write('clean'); raise SystemExit\n"
        f"signal.signal(signal.SIGTERM, end)\n{READY}\ntime.sleep(60)"
    )
    with OwnServer(python(code), None) as server:
        assert server.url == "http://127.0.0.1:1"
        pid = server._process.pid
        assert alive(pid)
    assert not alive(pid)
    assert note.read_text() == "clean"


def test_the_key_travels_through_the_environment() -> None:
    code = "import os; print('Brigade is ready at ' + os.environ['BRIGADE_API_KEY'], flush=True)"
    with OwnServer(python(code), "secret-key") as server:
        assert server.url == "secret-key"
    assert "secret-key" not in serve_command("model")


def test_a_child_that_ignores_sigterm_is_killed_with_all_it_started() -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import subprocess, sys, time\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(f'Brigade is ready at {grandchild.pid}', flush=True); time.sleep(60)"
    )
    with OwnServer(python(code), None, close_deadline=0.2) as server:
        grandchild = int(server.url)
    assert ended_within(grandchild, 5)


def test_a_child_that_has_said_why_it_cannot_start_gives_its_exit_code() -> None:
    with pytest.raises(typer.Exit) as e:
        OwnServer(python("raise SystemExit(2)"), None)
    assert e.value.exit_code == 2


def test_a_child_that_dies_silently_is_a_fault() -> None:
    with pytest.raises(Fault, match="exit code -9"):
        OwnServer(python("import os; os.kill(os.getpid(), 9)"), None)
    with pytest.raises(Fault, match="exit code 0"):
        OwnServer(python("pass"), None)


def test_a_child_that_is_never_ready_is_given_up() -> None:
    with pytest.raises(Fault, match=r"not ready within 0\.3 s"):
        OwnServer(python("import time; time.sleep(60)"), None, start_deadline=0.3, close_deadline=2)


def test_the_childs_input_closes_when_its_parent_is_killed() -> None:
    child = "import sys, os; print('Brigade is ready at', os.getpid(), flush=True); sys.stdin.read()"
    parent = (
        "import time; from brigade.cli.child import OwnServer; import sys\n"
        f"server = OwnServer([sys.executable, '-c', {child!r}], None); print(server.url, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(python(parent), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    assert ended_within(pid, 5)

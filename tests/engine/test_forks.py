"""Worker processes are forks of one that has imported everything: children like any other, and soon there."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bench.deployment import still_running
from brigade.engine import forks
from brigade.engine.forks import Forked, fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


@contextmanager
def forked(*files: int) -> Iterator[tuple[Forked, socket.socket]]:
    """A worker that waits for what to load, and the other end of its channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        worker = fork([theirs.fileno(), *files])
    with ours:
        try:
            yield worker, ours
        finally:
            worker.kill()
            worker.wait()


def open_files(pid: int) -> dict[int, str]:
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found[int(link.name)] = os.readlink(link)
    return found


def template() -> psutil.Process:
    assert forks._template is not None
    return psutil.Process(forks._template._process.pid)


def test_a_worker_is_a_child_with_a_name_and_without_the_terminal() -> None:
    with forked() as (worker, _):
        seen = psutil.Process(worker.pid)
        assert (seen.ppid(), seen.name()) == (os.getpid(), "brigade-rank")
        assert os.getsid(worker.pid) != os.getsid(0)


def test_how_it_ended_is_known() -> None:
    with forked() as (worker, channel):
        assert worker.poll() is None
        channel.close()
        assert worker.wait() == 0
        worker.kill()  # harmless by now
    with forked() as (worker, _):
        os.kill(worker.pid, signal.SIGTERM)
        assert (worker.wait(), worker.poll()) == (-signal.SIGTERM, -signal.SIGTERM)


def test_it_inherits_the_files_it_is_given_under_their_numbers_and_no_others(tmp_path: Path) -> None:
    given, kept = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("given", "kept"))
    high = os.dup2(given, 97)
    os.set_inheritable(kept, True)
    with forked(given, high) as (worker, _):
        while high not in (files := open_files(worker.pid)):
            assert worker.poll() is None
    for fd in (given, kept, high):
        os.close(fd)
    assert (files[given], files[high]) == (str(tmp_path / "given"), str(tmp_path / "given"))
    assert str(tmp_path / "kept") not in files.values()


def test_its_words_go_where_those_of_its_parent_go_now(capfd: pytest.CaptureFixture[str]) -> None:
    with forked() as (worker, channel):
        channel.sendall(b"\xff\xff\xff\xff")
        assert worker.wait() == 1
    assert "ChannelBroken" in capfd.readouterr().err


def test_all_come_from_one_process_while_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with forked():
        before = template().pid
    with forked():
        assert template().pid == before
    monkeypatch.setenv("BRIGADE_LOG_LEVEL", "DEBUG")
    with forked():
        assert template().pid != before
        assert template().environ()["BRIGADE_LOG_LEVEL"] == "DEBUG"
    assert not psutil.pid_exists(before)


def test_a_template_that_was_killed_is_started_anew() -> None:
    with forked() as (worker, _):
        template().kill()
        template().wait()
        with forked() as (another, _):
            assert worker.poll() is another.poll() is None


def test_a_template_that_stands_still_is_ended_and_the_next_call_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with forked():
        before = template()
    before.suspend()
    with monkeypatch.context() as m:
        m.setattr(forks, "ANSWER_DEADLINE", 0.1)
        with pytest.raises(TimeoutError, match="has not answered"), forked():
            pass
    assert not before.is_running()
    with forked() as (worker, _):
        assert worker.poll() is None


def test_a_template_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_template", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConnectionError, match="the process that workers are forked from has ended"), forked():
        pass
    assert forks._template is None


@pytest.mark.parametrize("killed", [False, True], ids=["at its end", "when it is killed"])
def test_a_template_ends_with_the_process_that_uses_it(killed: bool) -> None:
    code = (
        "import socket; from brigade.engine import forks; a, b = socket.socketpair(); "
        "w = forks.fork([b.fileno()]); print(forks._template._process.pid, w.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=forks.environment(), text=True
    ) as parent:
        assert parent.stdout is not None
        template, worker = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
        if killed:
            parent.kill()
        else:
            parent.communicate("")
    assert killed or not template.is_running()
    assert not still_running([template, worker], 5)

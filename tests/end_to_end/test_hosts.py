"""`brigade serve --hosts` and `brigade join` as processes, on addresses of the loopback."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from bench.deployment import still_running
from tests.end_to_end.running import command, serving
from tests.engine.hosting import free_port, ranks_of, secret_file

ASK = {"model": "brigade-demo", "prompt": "The old boat", "max_tokens": 24, "temperature": 0}


def answer(url: str) -> str:
    reply = httpx.post(f"{url}/v1/completions", json=ASK, timeout=30)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def head_arguments(port: int, secret: Path, hosts: str = "127.0.0.1=1,127.0.0.2=1") -> list[str]:
    return ["--hosts", hosts, "--secret-file", str(secret), "--join-port", str(port), "--threads", "1"]


@contextmanager
def joining(port: int, secret: Path, *more: str) -> Iterator["subprocess.Popen[str]"]:
    arguments = command("join", f"127.0.0.1:{port}", "--address", "127.0.0.2", "--secret-file", str(secret), *more)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        for p in psutil.Process(process.pid).children() if process.poll() is None else []:
            p.kill()
        process.kill()
        process.communicate()


def test_two_hosts_say_what_one_says_and_end_together(tmp_path: Path) -> None:
    with serving() as one:
        expected = answer(one.url)
    port, secret = free_port(), secret_file(tmp_path)
    with joining(port, secret) as join:
        with serving(*head_arguments(port, secret)) as server:
            assert answer(server.url) == expected
            assert len(ranks_of(join.pid)) == 1
            seen = [" ".join(p.cmdline()) for p in (*server.family(), psutil.Process(join.pid))]
            assert not any("0123456789abcdef" in line for line in seen), "the secret is on no command line"
        _, err = join.communicate(timeout=15)
        assert (join.returncode, "Traceback" in err) == (0, False), err


def test_a_head_that_is_killed_takes_no_rank_along_and_is_found_again(tmp_path: Path) -> None:
    port, secret = free_port(), secret_file(tmp_path)
    with joining(port, secret) as join:
        with serving(*head_arguments(port, secret)) as server:
            expected = answer(server.url)
            [rank] = ranks_of(join.pid)
            server.process.kill()
            server.process.wait()
            assert not still_running([rank], 5)
            assert join.poll() is None
            server.process.returncode = 0  # what the end of `serving` expects; this one was killed on purpose
        with serving(*head_arguments(port, secret)) as server:
            assert answer(server.url) == expected
        assert join.wait(15) == 0


def test_a_host_that_does_not_agree_ends_both_with_both_values_and_exit_code_2(tmp_path: Path) -> None:
    port, secret = free_port(), secret_file(tmp_path)
    with joining(port, secret, "--model", str(tmp_path)) as join:
        arguments = command("serve", "--port", "0", *head_arguments(port, secret))
        head = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
        _, err = join.communicate(timeout=15)
        assert (head.returncode, join.returncode) == (2, 2)
        for text in (head.stderr, err):
            assert "host 127.0.0.2 cannot be part of this unit: model: " in text
            assert f"on the head, not readable: {tmp_path}" in text
        assert err.splitlines()[-1].startswith("brigade: ")


def test_a_signal_ends_a_host_that_waits_for_its_head(tmp_path: Path) -> None:
    with joining(free_port(), secret_file(tmp_path)) as join:
        assert join.stderr is not None
        assert "calling the head at 127.0.0.1:" in join.stderr.readline()
        join.terminate()
        assert join.wait(10) == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode)
    for arguments in (
        ("join", "127.0.0.1", "--address", "127.0.0.2", "--secret-file", str(path)),
        ("serve", "--hosts", "127.0.0.1=1,127.0.0.2=1", "--secret-file", str(path)),
    ):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        assert done.stderr == (
            f"brigade: {path}: others than its owner may use it (mode {mode:o}); run: chmod 600 {path}\n"
        )

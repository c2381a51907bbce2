"""`brigade drain` and `brigade role`: what they order, how they wait, and one line for whatever goes wrong."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from brigade.cli import app, orders
from brigade.core.roles import UnitState
from brigade.serve.admin import AdminApp
from brigade.serve.config import AdminConfig
from tests.serve.fake_crew import fake_crew, give

KEY = "the-admins-own-key"


class Served:
    """Units behind a real admin address, in a thread with an event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.crew = self.run(self._crew())
        config = uvicorn.Config(AdminApp(self.crew, AdminConfig(key=KEY)), port=0, log_level="error", lifespan="off")  # type: ignore[arg-type]
        self.server = uvicorn.Server(config)
        self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.server.serve(),))

    async def _crew(self) -> Any:
        return fake_crew("prefill", "decode", "decode")

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def call(self, what: Any, *args: Any) -> None:
        self.loop.call_soon_threadsafe(what, *args)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(orders, "LOOK_EVERY", 0.02)
    served = Served()
    served.thread.start()
    while not served.server.started:
        pass
    yield served
    served.server.should_exit = True
    served.thread.join(5)
    served.loop.close()


def brigade(*args: str, key: str | None = KEY) -> tuple[int, str, str]:
    result = CliRunner(env={"BRIGADE_ADMIN_KEY": key, "COLUMNS": "120"}).invoke(app, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout, result.stderr


def test_without_a_name_units_are_listed(served: Served) -> None:
    code, out, _ = brigade("drain", "--url", served.url)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if "-" in line and "serving" in line]
    assert [row[:3] for row in rows] == [
        ["prefill-0", "prefill", "serving"],
        ["decode-0", "decode", "serving"],
        ["decode-1", "decode", "serving"],
    ]


def test_a_unit_is_waited_for_until_it_is_empty(served: Served) -> None:
    part = give(served.crew, "decode", 1)
    assert part is not None
    threading.Timer(0.3, served.call, (served.crew.left, part)).start()
    name = part.unit.name
    code, out, _ = brigade("drain", name, "--url", served.url)
    assert (code, out) == (
        0,
        f"{name}: draining, 1 request left\n{name}: empty; `brigade drain {name} --undo` gives it work again\n",
    )
    assert brigade("drain", name, "--undo", "--url", served.url)[1] == f"{name}: serving\n"


def test_one_that_is_not_empty_in_time_goes_on_by_itself(served: Served) -> None:
    part = give(served.crew, "decode", 1)
    assert part is not None
    name = part.unit.name
    code, _, err = brigade("drain", name, "--wait", "0.1", "--url", served.url)
    assert (code, err) == (1, f"brigade: {name}: draining, 1 request left, after 0.1 s; it goes on by itself\n")
    assert brigade("drain", name, "--wait", "0", "--url", served.url)[1] == f"{name}: draining\n"
    served.call(served.crew.left, part)


def test_a_unit_is_started_again(served: Served) -> None:
    engine = served.crew.find("decode-0").engine
    threading.Timer(0.2, served.call, (engine.restarted.set,)).start()
    code, out, _ = brigade("drain", "decode-0", "--restart", "--url", served.url)
    assert code == 0
    assert out.endswith("decode-0: was started again and takes work\n")
    assert engine.n_restarts == 1


def test_a_role_is_changed(served: Served) -> None:
    assert brigade("role", "decode-1", "mixed", "--url", served.url)[1] == "decode-1: mixed\n"
    part = give(served.crew, "decode", 1)
    assert part is not None
    code, out, _ = brigade("role", part.unit.name, "prefill", "--wait", "0", "--url", served.url)
    assert (code, out.partition(": ")[2]) == (0, f"{part.unit.role}, becomes prefill\n")
    served.call(served.crew.left, part)


@pytest.mark.parametrize(
    ("args", "key", "code", "said"),
    [
        (("drain", "decode-9"), KEY, 1, "there is no unit 'decode-9'; there are prefill-0, decode-0, decode-1"),
        (("drain", "prefill-0"), KEY, 1, "prefill-0 is the last unit that computes prompts; with force"),
        (("role", "prefill-0", "decode"), KEY, 1, "prefill-0 is the last unit that computes prompts; with force"),
        (("role", "decode-0", "cook"), KEY, 2, "the role must be prefill, decode or mixed, not cook"),
        (("drain", "decode-0", "--undo", "--restart"), KEY, 2, "--undo and --restart are opposites"),
        (("drain", "--restart"), KEY, 2, "which unit?"),
        (("drain",), "not-the-key", 1, "missing or wrong admin key"),
        (("drain",), None, 2, "set BRIGADE_ADMIN_KEY, or name the deployment with --file"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    served: Served, args: tuple[str, ...], key: str | None, code: int, said: str
) -> None:
    got, out, err = brigade(*args, "--url", served.url, key=key)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert said in err


def test_the_deployment_file_says_the_address_and_the_key(served: Served, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    file = tmp_path / "d.yaml"
    file.write_text(f"admin_key_file: key\nadmin_listen: {served.url.removeprefix('http://')}\n")
    assert brigade("drain", "--file", str(file), key=None)[0] == 0
    file.write_text("{}")
    code, _, err = brigade("drain", "--file", str(file), key=None)
    assert (code, "has no admin_key_file, so its deployment takes no orders" in err) == (2, True)


def test_nobody_there_is_one_line() -> None:
    code, _, err = brigade("drain", "--url", "http://127.0.0.1:9")
    assert (code, err.count("\n")) == (1, 1)
    assert "no answer from http://127.0.0.1:9" in err


def test_progress_says_what_is_left() -> None:
    unit = UnitState("a", "decode", "prefill", "changing", "", 1, 0, 2)
    assert orders.progress(unit) == "a: decode, becomes prefill, 2 requests left"

"""Hosts that do not agree are refused before anything is loaded, and both sides say both values."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from brigade.comm.handshake import Refused
from brigade.engine import supervisor as supervisor_module
from brigade.engine import terms
from brigade.engine.config import DEMO_MODEL, EngineConfig, HostsConfig
from brigade.engine.output import LoadError
from brigade.engine.supervisor import HeadMissing, HostRefused, JoinConfig, supervise
from brigade.engine.terms import clock_difference, differences, layout_terms, model_digest
from brigade.spec.config import BadConfig
from brigade.spec.layout import Host, Layout
from tests.engine.conftest import workers
from tests.engine.hosting import SECRET, free_port, joining, layout_of, started

LAYOUT, CONFIG = layout_of(1, 1), EngineConfig(ranks=2)


async def refused(join: JoinConfig, port: int) -> tuple[str, str]:
    """What head and host say when they do not agree."""
    hosts = HostsConfig(layouts=(LAYOUT,), secret=SECRET, port=port, wait=20)
    others, began = workers(), time.monotonic()
    head, host = await asyncio.gather(started(CONFIG, hosts), supervise(join), return_exceptions=True)
    assert isinstance(head, LoadError), head
    assert isinstance(host, HostRefused), host
    assert time.monotonic() - began < 10
    assert workers() <= others, "nothing was loaded"
    return str(head), str(host)


async def both_say(*values: str, **settings: object) -> None:
    port = free_port()
    for text in await refused(joining(port, 1, **settings), port):
        assert all(value in text for value in values), text


async def test_another_model(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    mine, theirs = model_digest(DEMO_MODEL), model_digest(demo)
    await both_say(f"model: {mine} on the head, {theirs} on 127.0.0.2", model=str(demo))


async def test_a_model_that_is_not_there() -> None:
    await both_say(f"model: {model_digest(DEMO_MODEL)} on the head, not readable: /gone: is no", model="/gone")


async def test_another_layout_and_other_settings() -> None:
    expected = layout_terms([Layout((Host("127.0.0.1", 2), Host("127.0.0.2", 2)))], [EngineConfig(ranks=4, page=32)])
    await both_say(
        "layout: 127.0.0.1 x1, 127.0.0.2 x1 on the head, 127.0.0.1 x2, 127.0.0.2 x2 on 127.0.0.2",
        "page: 16 on the head, 32 on 127.0.0.2",
        terms=expected,
    )


async def test_a_host_that_expects_the_same_is_not_refused() -> None:
    same = {**terms.versions(), **terms.model_terms(DEMO_MODEL), **layout_terms([LAYOUT], [CONFIG])}
    assert differences(same, same, "x") == ""
    must = {**terms.versions(), **terms.model_terms(DEMO_MODEL)}
    assert differences(same, must, "x") == "", "it may not know the layout"
    for term in must:
        assert "not stated on x" in differences(same, {k: v for k, v in must.items() if k != term}, "x")
    assert "threads" not in layout_terms([LAYOUT], [CONFIG]), "each host has cores of its own"


async def test_an_address_that_is_not_in_the_layout() -> None:
    port = free_port()
    for text in await refused(joining(port, 8), port):
        assert "address: 127.0.0.2 in the head's layout, 127.0.0.9 there" in text


@pytest.mark.parametrize("term", ["Brigade version", "message version"])
async def test_another_version(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = terms.versions()
    monkeypatch.setattr(supervisor_module, "versions", lambda: {**here, term: "other"})
    await both_say(f"{term}: {here[term]} on the head, other on 127.0.0.2")


async def test_clocks_that_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert clock_difference(now, now - 4.9, "x") == ""

    class Late:
        monotonic = staticmethod(time.monotonic)
        time = staticmethod(lambda: time.time() - 3600)

    monkeypatch.setattr(supervisor_module, "time", Late)
    await both_say("clock: 20", "on the head, 20", "on 127.0.0.2, 3600 s apart; 5 s are allowed")


async def test_another_secret_is_refused_at_the_door_and_the_head_goes_on_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    hosts = HostsConfig(layouts=(layout_of(1, 2),), secret=SECRET, port=port, wait=1.5)
    head = asyncio.ensure_future(started(EngineConfig(ranks=3), hosts))
    with pytest.raises(HostRefused, match=f"the head at 127.0.0.1:{port}: the other side has another secret") as e:
        await supervise(joining(port, 1, secret=b"another secret of hosts"))
    assert isinstance(e.value.__cause__, Refused)
    with pytest.raises(LoadError, match=r"did not join within 1.5 s: host 127.0.0.2 \(ranks 1 to 2\)"):
        await head
    assert "it left without a proof that it knows the secret; does it have the same one?" in caplog.text


async def test_a_head_that_does_not_answer_is_given_up() -> None:
    port = free_port()
    with pytest.raises(HeadMissing, match=f"the head at 127.0.0.1:{port} did not answer for 0.5 s: .*"):
        await supervise(joining(port, 1, wait=0.5))


async def test_a_rank_whose_host_has_no_such_address_says_so() -> None:
    """192.0.2.0/24 is for documents: no machine has it."""
    layout = Layout((Host("127.0.0.1", 1), Host("192.0.2.1", 1)))
    port = free_port()
    join = JoinConfig(head=("127.0.0.1", port), address="192.0.2.1", secret=SECRET, wait=10)
    hosts = HostsConfig(layouts=(layout,), secret=SECRET, port=port, wait=20)
    head, host = await asyncio.gather(started(CONFIG, hosts), supervise(join), return_exceptions=True)
    assert isinstance(head, LoadError)
    assert "rank 1: cannot listen on 192.0.2.1" in str(head)
    assert not isinstance(host, BaseException)
    assert host.failed
    assert host.text == str(head)


def test_the_digest_covers_names_shapes_types_and_sizes_and_not_spacing(demo: Path) -> None:
    before = model_digest(demo)
    config = demo / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
    assert model_digest(demo) == before
    tensors = demo / "model.safetensors"
    data = bytearray((DEMO_MODEL / "model.safetensors").read_bytes())
    tensors.unlink()
    at = data.index(b"model.norm.weight")
    data[at : at + 17] = b"model.norm.weighs"
    tensors.write_bytes(data)
    assert model_digest(demo) != before
    tensors.write_bytes(data[:4])
    with pytest.raises(BadConfig, match=r"model\.safetensors: "):
        model_digest(demo)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes, not 5"):
        HostsConfig(layouts=(LAYOUT,), secret=b"short")
    with pytest.raises(ValueError, match="at least 16 bytes, not 5"):
        JoinConfig(head=("x", 1), address="y", secret=b"short")
    with pytest.raises(ValueError, match="wait must be"):
        HostsConfig(layouts=(LAYOUT,), secret=SECRET, wait=0)
    assert "0123456789" not in repr(HostsConfig(layouts=(LAYOUT,), secret=SECRET))
    assert "0123456789" not in repr(JoinConfig(head=("x", 1), address="y", secret=SECRET))


async def test_ranks_and_layout_must_agree() -> None:
    with pytest.raises(LoadError, match="ranks is 3, but the layout has 2"):
        await started(EngineConfig(ranks=3), HostsConfig(layouts=(LAYOUT,), secret=SECRET, port=0))

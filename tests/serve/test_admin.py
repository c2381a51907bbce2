"""The admin address: orders need the admin key, say plainly what they do, and clients cannot reach it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from brigade.core.handover import State
from brigade.serve.admin import AdminApp
from brigade.serve.config import AdminConfig, ConfigError, ServeConfig
from tests.engine.asking import until
from tests.serve.conftest import client_of
from tests.serve.fake_crew import fake_crew, give
from tests.serve.fake_engine import FakeEngine

KEY = "the-admins-own-key"


@pytest.fixture
async def crew() -> Any:
    return fake_crew("prefill", "decode", "decode")


@pytest.fixture
async def admin(crew: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(AdminApp(crew, AdminConfig(key=KEY)))  # type: ignore[arg-type]
    bearer = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001", headers=bearer) as client:
        yield client


async def order(admin: httpx.AsyncClient, unit: str, what: str, status: int = 200, **body: Any) -> Any:
    answer = await admin.post(f"/admin/units/{unit}/{what}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()["units"][0] if status == 200 else answer.json()["error"]["message"]


async def test_units_are_told_with_what_they_do(admin: httpx.AsyncClient, crew: Any) -> None:
    give(crew, "decode", 1)
    crew.find("decode-1").engine.up = False
    prefill, busy, lost = (await admin.get("/admin/units")).json()["units"]
    assert prefill == {
        "name": "prefill-0",
        "role": "prefill",
        "next_role": "prefill",
        "state": "serving",
        "reason": "",
        "ranks": 1,
        "prefill": 0,
        "decode": 0,
    }
    assert (busy["name"], busy["decode"]) == ("decode-0", 1)
    assert (lost["state"], lost["reason"]) == ("not ready", "rank 0: its process ended")


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer {KEY}x"])
async def test_without_the_admin_key_nothing_is_told_or_done(
    admin: httpx.AsyncClient, crew: Any, header: str | None
) -> None:
    del admin.headers["Authorization"]
    given = {"Authorization": header} if header else {}
    for method, path in (("GET", "/admin/units"), ("POST", "/admin/units/decode-0/drain"), ("GET", "/")):
        answer = await admin.request(method, path, headers=given)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_key")
    assert not crew.find("decode-0").drained


async def test_the_clients_address_knows_nothing_of_it(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        for method in ("GET", "POST"):
            assert (await client.request(method, "/admin/units/decode-0/drain")).status_code == 404
        assert "admin" not in (await client.get("/openapi.json")).text


async def test_a_unit_is_drained_put_back_and_started_again(admin: httpx.AsyncClient, crew: Any) -> None:
    part = give(crew, "decode", 1)
    name, other = part.unit.name, ({"decode-0", "decode-1"} - {part.unit.name}).pop()
    assert (await order(admin, name, "drain"))["state"] == "draining"
    assert give(crew, "decode", 2).unit.name == other
    assert "is the last unit that decodes; with force" in await order(admin, other, "drain", 409)
    crew.left(part)
    assert (await order(admin, name, "drain"))["state"] == "drained", "twice is harmless"
    assert (await order(admin, name, "undrain"))["state"] == "serving"
    assert (await order(admin, name, "drain", restart=True))["state"] == "restarting"
    assert await until(lambda: part.unit.engine.n_restarts == 1, 1)
    assert "is being started again" in await order(admin, name, "undrain", 409)
    part.unit.engine.restarted.set()
    assert await until(lambda: part.unit.told.state == "serving", 1)
    await crew.close()


async def test_a_unit_changes_its_role(admin: httpx.AsyncClient, crew: Any) -> None:
    part = give(crew, "decode", 1)
    told = await order(admin, part.unit.name, "role", role="prefill")
    assert (told["state"], told["role"], told["next_role"]) == ("changing", "decode", "prefill")
    crew.left(part)
    assert part.unit.role == "prefill"
    assert give(crew, "decode", 2).unit is not part.unit
    assert "prefill-0" in {give(crew, "prefill", i).unit.name for i in range(3, 9)}
    assert (await order(admin, part.unit.name, "role", role="prefill"))["state"] == "serving"


async def test_a_unit_that_keeps_room_for_prompts_does_not_compute_them(crew: Any) -> None:
    """They could wait there for the room that is kept for them."""
    part = give(crew, "decode", 1, State.PREFILLING)
    crew.set_role(part.unit.name, "mixed")
    assert {give(crew, "prefill", i).unit.name for i in range(2, 9)} == {"prefill-0"}
    part.flight.state = State.DECODING
    assert part.unit.name in {give(crew, "prefill", i).unit.name for i in range(9, 19)}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("decode-7/drain", "{}", 404, "there is no unit 'decode-7'; there are prefill-0, decode-0, decode-1"),
        ("decode-0/stop", "{}", 404, "there is nothing at /admin/units/decode-0/stop"),
        ("prefill-0/drain", "", 409, "prefill-0 is the last unit that computes prompts"),
        ("decode-0/role", '{"role": "cook"}', 400, "Invalid enum value 'cook'"),
        ("decode-0/role", "{}", 400, "missing required field `role`"),
        ("decode-0/drain", '{"force": 1}', 400, "Expected `bool`"),
        ("decode-0/drain", '{"froce": true}', 400, "unknown field `froce`"),
        ("decode-0/drain", "{" * 40, 400, "an order to drain"),
        ("decode-0/drain", " " * 5000, 413, "larger than 4096 bytes"),
    ],
)
async def test_orders_that_cannot_be_followed_say_why(
    admin: httpx.AsyncClient, path: str, body: str, status: int, said: str
) -> None:
    answer = await admin.post(f"/admin/units/{path}", content=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


async def test_methods_are_those_of_the_routes(admin: httpx.AsyncClient) -> None:
    assert (await admin.post("/admin/units")).headers["Allow"] == "GET"
    assert (await admin.get("/admin/units/decode-0/drain")).headers["Allow"] == "POST"


async def test_it_is_open_while_the_server_is_and_loopback_unless_told(engine: FakeEngine, serving: Any) -> None:
    engine.crew = fake_crew("mixed")
    assert AdminConfig(key=KEY).host == "127.0.0.1"
    live = await serving(admin=AdminConfig(key=KEY, port=(port := await free_port())))
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
        units = (await client.get(f"http://127.0.0.1:{port}/admin/units")).json()["units"]
        assert [u["name"] for u in units] == ["mixed-0"]
        assert (await client.get(f"{live.url}/admin/units")).status_code == 404


async def free_port() -> int:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    return port


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"admin": AdminConfig(key="short")}, "the API key has 5 characters"),
        ({"admin": AdminConfig(key=KEY), "api_key": KEY}, "the admin key is the clients' key"),
        ({"admin": AdminConfig(key=KEY, port=8000)}, "port 8000 is for clients and for orders at once"),
        ({"admin": AdminConfig(key=KEY, port=70000)}, "the admin port must be between 0 and 65535"),
    ],
)
def test_settings_that_would_not_be_safe_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ServeConfig(served_name="fox", **settings).check()

"""Who is let in, and which settings the server refuses to start with."""

from typing import Any

import httpx
import pytest

from brigade.serve.config import ConfigError, ServeConfig
from tests.serve.conftest import CHAT, client_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_bad_requests import error_of

KEY = "correct-horse-battery"
ROUTES = (
    "/v1/models",
    "/v1/models/fox",
    "/ready",
    "/metrics",
    "/debug/experts",
    "/debug/units",
    "/openapi.json",
    "/nothing",
)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
        "Bearer \xe9\xff",
        "é",
    ],
)
async def test_every_route_but_health_asks_for_the_key(engine: FakeEngine, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    async with client_of(engine, api_key=KEY) as client:
        for path in ROUTES:
            response = await client.get(path, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        error_of(await client.post("/v1/chat/completions", json=CHAT, headers=headers), 401)
        assert (await client.get("/health", headers=headers)).status_code == 200


async def test_the_key_opens_every_route(engine: FakeEngine) -> None:
    async with client_of(engine, api_key=KEY) as client:
        for scheme in ("Bearer", "bearer"):
            client.headers["authorization"] = f"{scheme} {KEY}"
            for path in ROUTES[:-1]:
                assert (await client.get(path)).status_code == 200
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "localhost:x",
        "192.168.0.1",
        "[::2]:8000",
        "localhost:80:80",
        "user@localhost",
    ],
)
async def test_without_a_key_a_foreign_host_name_is_refused(client: httpx.AsyncClient, host: str) -> None:
    assert error_of(await client.get("/v1/models", headers={"host": host}), 403)["code"] == "host_not_allowed"
    assert (await client.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "127.1.2.3", "[::1]:9"])
async def test_names_of_this_machine_are_let_in(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


async def test_with_a_key_any_host_name_will_do(engine: FakeEngine) -> None:
    async with client_of(engine, api_key=KEY, host="0.0.0.0") as client:
        headers = {"host": "models.example", "authorization": f"Bearer {KEY}"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_web_pages_elsewhere_get_no_leave_to_ask(client: httpx.AsyncClient) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    response = await client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_an_open_address_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        ServeConfig(served_name="fox", host=host).check()
    ServeConfig(served_name="fox", host=host, api_key=KEY).check()


def test_a_name_that_leads_to_an_open_address_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(*_: object, **__: object) -> list[Any]:
        return [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("192.0.2.7", 0))]

    monkeypatch.setattr("socket.getaddrinfo", two)
    with pytest.raises(ConfigError, match=r"myhost \(192\.0\.2\.7\)"):
        ServeConfig(served_name="fox", host="myhost").check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_loopback_needs_no_key(host: str) -> None:
    ServeConfig(served_name="fox", host=host).check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key": ""}, "API key"),
        ({"api_key": "short77"}, "at least 8"),
        ({"api_key": "with space inside"}, "printable"),
        ({"api_key": "schlüssel-schlüssel"}, "ASCII"),
        ({"host": ""}, "host is empty"),
        ({"host": "no such host"}, "cannot be resolved"),
        ({"host": "x" * 300}, "cannot be resolved"),
        ({"port": -1}, "port"),
        ({"port": 65536}, "port"),
        ({"served_name": ""}, "name"),
        ({"drain_seconds": -1.0}, "drain_seconds"),
        ({"drain_seconds": float("nan")}, "drain_seconds"),
    ],
)
def test_bad_settings_are_refused_with_the_reason(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServeConfig(**{"served_name": "fox", **settings}).check()


def test_the_key_is_not_shown_when_settings_are_printed() -> None:
    assert KEY not in repr(ServeConfig(served_name="fox", api_key=KEY))

"""Who may ask: hosts, pages of other sites, keys, and what is never said."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from scripted_engine import Running, ScriptedEngine, running

from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.running import listening
from mlx_redrafter.server.security import host_of, known_host
from mlx_redrafter.server.settings import Settings

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(
        ScriptedEngine(["fine"]),
        allowed_hosts=("box.example",),
        allowed_origins=("https://app.example", "vscode-webview://*"),
    ) as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(ScriptedEngine(["fine"]), api_key="right") as found:
        yield found


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("127.0.0.1:8080", True), ("127.0.0.1", True), ("127.8.9.1", True), ("[::1]:8080", True),
        ("localhost", True), ("localhost:1", True), ("app.localhost", True), ("LOCALHOST", True),
        ("localhost.", True), ("192.168.1.5:8080", True), ("10.0.0.1", True), ("mac.local", True),
        ("host.docker.internal:8080", True), ("box.example:8080", True), ("169.254.1.1", True),
        ("evil.example", False), ("evil.example:8080", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False), ("8.8.8.8", False), ("[2001:4860::1]", False),
        ("", False), ("locallocalhost", False), ("evil.example:localhost", False),
        ("127.0.0.1@evil.example", False), ("1", False),
    ],
)  # fmt: skip
def test_hosts(host: str, fine: bool) -> None:
    assert known_host(host_of(host), ("box.example",)) is fine


def test_a_foreign_host_is_refused_on_every_path(server: Running) -> None:
    """A page that has its own name point here is of the same origin as the server."""
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/health")):
        found = httpx.request(method, server.url + path, headers={"host": "evil.example"}, json=HI)
        assert (found.status_code, found.json()["error"]["type"]) == (403, "permission_error")
    named = httpx.post(server.url + CHAT, headers={"host": "box.example"}, json=HI)
    assert named.status_code == 200


@pytest.mark.parametrize(
    ("origin", "fine"),
    [
        ("http://localhost:3000", True), ("http://127.0.0.1:9", True), ("https://localhost", True),
        ("http://[::1]:80", True), ("https://app.example", True), ("vscode-webview://x1", True),
        ("https://evil.example", False), ("null", False), ("http://app.example", False),
        ("https://app.example.evil.example", False), ("file://", False), ("", False),
        ("http://localhost.evil.example", False), ("chrome-extension://abc", False),
        ("http://127.0.0.1@evil.example", False), ("http://[", False),
    ],
)  # fmt: skip
def test_origins(origin: str, fine: bool, server: Running) -> None:
    asked = len(server.engine.asked)
    found = httpx.post(server.url + CHAT, headers={"origin": origin}, json=HI)
    assert found.status_code == (200 if fine else 403)
    assert found.headers.get("access-control-allow-origin") == (origin if fine else None)
    assert len(server.engine.asked) - asked == fine  # before any work
    preflight = httpx.options(
        server.url + CHAT,
        headers={
            "origin": origin, "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,x-stainless-os",
        },
    )  # fmt: skip
    assert preflight.status_code == (204 if fine else 403)
    if fine:
        allowed = preflight.headers["access-control-allow-headers"]
        assert {"authorization", "content-type", "x-stainless-os"} <= set(allowed.split(", "))
    shown = httpx.get(server.url + "/v1/models", headers={"origin": origin})
    assert ("access-control-allow-origin" in shown.headers) is fine


def test_every_origin() -> None:
    with running(ScriptedEngine(["fine"]), allowed_origins=("*",)) as server:
        found = httpx.post(server.url + CHAT, headers={"origin": "https://a.example"}, json=HI)
        assert found.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in found.headers


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({"authorization": "Bearer right"}, True), ({"x-api-key": "right"}, True),
        ({"authorization": "bearer right"}, True), ({}, False), ({"x-api-key": ""}, False),
        ({"authorization": "Bearer wrong"}, False), ({"authorization": "right"}, False),
        ({"authorization": "Basic right"}, False), ({"authorization": "Bearer"}, False),
        ({"authorization": "Bearer  right"}, True), ({"x-api-key": "rightx"}, False),
    ],
)  # fmt: skip
def test_keys(headers: dict[str, str], fine: bool, locked: Running) -> None:
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/ready")):
        found = httpx.request(method, locked.url + path, headers=headers, json=HI)
        assert found.status_code == (200 if fine else 401)
        if not fine:
            assert found.json()["error"]["code"] == "invalid_api_key"
    other = httpx.post(locked.url + "/v1/messages", headers=headers, json={**HI, "max_tokens": 5})
    if not fine:
        assert other.json()["error"]["type"] == "authentication_error"
    assert httpx.get(locked.url + "/health", headers=headers).status_code == 200


def test_any_key_will_do_where_none_is_wanted(server: Running) -> None:
    found = httpx.post(server.url + CHAT, headers={"authorization": "Bearer sk-any"}, json=HI)
    assert found.status_code == 200


def test_an_open_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(OptionError, match="--api-key"):
            listening(Settings(host=host, port=0))
    listening(Settings(host="0.0.0.0", port=0, api_key="right")).close()


def test_an_address_that_cannot_be_had() -> None:
    with listening(Settings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"127.0.0.1:{port} cannot be listened on"):
            listening(Settings(port=port))
    with pytest.raises(OptionError, match="cannot be listened on"):
        listening(Settings(host="203.0.113.9", port=0, api_key="x"))


def test_nothing_of_a_prompt_is_in_the_log() -> None:
    secret = "THE-SECRET"
    with running(ScriptedEngine([secret, secret]), log_requests=True) as server:
        body = {"messages": [{"role": "user", "content": secret}], "stop": [secret + "x"]}
        for path in (CHAT, "/v1/messages", "/v1/completions", f"/{secret}"):
            httpx.post(server.url + path, json={**body, "prompt": secret, "max_tokens": 5})

        def fail(step: int) -> None:
            raise ValueError(secret)

        server.engine.before_step = fail
        httpx.post(server.url + CHAT, json=body)
        server.idle()
        assert len(server.log) == 5
        assert "prompt 27 tokens, answer 5 tokens" in server.log[0]
        assert server.log[-1].endswith("failed with 500")
        assert not any(secret in line for line in server.log)

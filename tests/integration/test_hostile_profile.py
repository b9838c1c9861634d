"""Whatever an event's values are, the request is the template's with encoded values.

The bytes of each request are read from a raw socket, and taken apart by what the RFCs
say about a path, a query, a header and a JSON body, not by our own code.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import BinaryIO, Final
from urllib.parse import parse_qsl, unquote

import pytest
import requests

from function.api_auth import make_authenticator
from function.api_profile import ApiProfile, load_profile
from function.config import Settings
from function.errors import InvalidEvent
from function.migrate import migrate
from function.model import TopUp
from function.recharge_api import RechargeApi
from tests.conftest import Database
from tests.orders import data, headers, order
from tests.processes import ROOT, FunctionProcess, function_env

GENERIC: Final = (
    Path(__file__).parents[2] / "function" / "profiles" / "generic.toml"
).read_text("utf-8")
DONE: Final = b'{"status": "succeeded", "reference": "R-1", "idempotencyKey": "%s"}'

#: One of each class of character that an event's text can have.
VALUES: Final = (
    "plain-1",
    "x/../../admin/refund?amount=9&y=",
    "..",
    ".",
    "a#fragment",
    "a b",
    "a%2fb",
    "%",
    "a&b=c;d+e",
    "quo\"te's",
    "back\\slash",
    "{key}",
    "two\r\nX-Admin: yes",
    "tab\tnull\0end",
    "é",
    "日本",
    "\U0001f4f1",
    " leading and trailing ",
    "a" * 64,
)
PLACES: Final = ("path", "query", "header", "body")


#: A list that is not filtered by the key that was asked for.
OTHERS: Final = (
    b'{"recharges": [{"idempotencyKey": "app:other", "status": "succeeded",'
    b' "reference": "R-0"}]}'
)


class RawServer:
    """Keeps the bytes of each request; answers it as done, or a GET with others' rows.

    With `loses_answers` a POST is read, and its connection closed.
    """

    loses_answers = False

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.requests: list[bytes] = []
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while head := _head(stream):
                lines = head.split(b"\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in lines
                        if line.lower().startswith(b"content-length:")
                    ),
                    0,
                )
                self.requests.append(head + b"\r\n" + stream.read(length))
                is_get = head.startswith(b"GET ")
                if self.loses_answers and not is_get:
                    return
                (key,) = [
                    line.partition(b": ")[2]
                    for line in lines
                    if line.lower().startswith(b"idempotency-key:")
                ] or [b""]
                done = DONE % key
                line, body = (b"200 OK", OTHERS) if is_get else (b"201 Created", done)
                connection.sendall(
                    b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (line, len(body), body)
                )

    def close(self) -> None:
        self._listener.close()


def _head(stream: BinaryIO) -> bytes:
    """A request's head without its last line; empty when the client has gone."""
    lines = []
    while (line := stream.readline()) not in {b"", b"\r\n"}:
        lines.append(line)
    return b"".join(lines)


@pytest.fixture
def server() -> Iterator[RawServer]:
    made = RawServer()
    yield made
    made.close()


def profile_text(place: str) -> str:
    """The generic profile with `{recharge_id}` in that place of its request."""
    text = GENERIC
    if place == "path":
        return text.replace('path = "/recharges"', 'path = "/r/{recharge_id}/x"', 1)
    if place == "query":
        return text.replace(
            "[request.headers]",
            '[request.query]\nid = "{recharge_id}"\n[request.headers]',
        )
    if place == "header":
        return text.replace(
            "[request.headers]", '[request.headers]\nX-Id = "{recharge_id}"'
        )
    return text


def made(directory: Path, place: str, url: str) -> tuple[Settings, ApiProfile]:
    path = directory / "own.toml"
    path.write_text(profile_text(place), "utf-8")
    settings = Settings.from_env(
        {
            "LEDGER_DATABASE_URL": "sqlite://",
            "RECHARGE_API_URL": url,
            "RECHARGE_API_PROFILE": str(path),
        }
    )
    return settings, load_profile(settings)


def with_id(value: str) -> TopUp:
    return replace(order(), recharge_id=value)


@pytest.mark.parametrize("value", VALUES, ids=ascii)
@pytest.mark.parametrize("place", PLACES)
def test_request_differs_from_its_template_in_the_encoded_value_alone(
    tmp_path: Path, server: RawServer, place: str, value: str
) -> None:
    settings, profile = made(tmp_path, place, server.url)
    topup = with_id(value)
    try:
        profile.require_sendable(topup)
    except InvalidEvent:
        # Only where no encoding makes it the same value.
        is_dots = place == "path" and value in {".", ".."}
        is_no_header = place == "header" and (
            value != value.strip() or not value.isascii() or not value.isprintable()
        )
        assert is_dots or is_no_header
        return

    api = RechargeApi(settings, profile, make_authenticator(settings))
    answer = api.recharge(topup, "app:r1", time.monotonic() + 5)
    api.close()

    assert answer.reference == "R-1"
    (request,) = server.requests
    head, _, body = request.partition(b"\r\n\r\n")
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = request_line.split(" ")
    path, _, query = target.partition("?")
    assert (method, version) == ("POST", "HTTP/1.1")
    if place == "path":
        start, encoded, end = path.rsplit("/", 2)
        assert (start, end) == ("/api/r", "x")
        assert unquote(encoded, errors="strict") == value
    else:
        assert path == "/api/recharges"
    expected = [("id", value)] if place == "query" else []
    assert (
        parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)) == expected
    )
    fields = [line.split(":", 1) for line in lines]
    assert all(len(each) == 2 for each in fields)
    names = [name.lower() for name, _ in fields]
    assert len(names) == len(set(names))
    assert "x-admin" not in names
    if place == "header":
        (found,) = [text for name, text in fields if name == "X-Id"]
        assert found == f" {value}"
    assert json.loads(body)["rechargeId"] == value
    assert set(json.loads(body)) == {
        "msisdn",
        "amountMinor",
        "currency",
        "channel",
        "rechargeId",
        "requestedAt",
    }


@pytest.mark.parametrize("value", ["..", "."])
def test_path_that_means_another_is_never_sent(
    tmp_path: Path, server: RawServer, value: str
) -> None:
    """Nor by the resolver, of a row that a revision before has recorded."""
    settings, profile = made(tmp_path, "path", server.url)
    api = RechargeApi(settings, profile, make_authenticator(settings))

    answer = api.recharge(with_id(value), "app:r1", time.monotonic() + 5)
    api.close()

    assert not answer.is_sent
    assert server.requests == []


def test_deployed_function_sends_no_path_of_the_events_making(
    sqlite_database: Database, tmp_path: Path, server: RawServer
) -> None:
    """And what can't be sent is in quarantine, and answered, at its first delivery."""
    path = tmp_path / "own.toml"
    path.write_text(profile_text("path"), "utf-8")
    migrate(sqlite_database.engine)
    url = sqlite_database.env["LEDGER_DATABASE_URL"]
    env = function_env(url, server.url, recharge_api_profile=str(path))
    env |= sqlite_database.env | {"PATH": os.environ["PATH"]}
    with FunctionProcess(tmp_path, env=env) as function:
        attack = "x/../../admin/refund?amount=9&y="
        statuses = [
            requests.post(
                function.url,
                json=data(name, msisdn=f"+3933300000{number}"),
                headers=headers(offset=number),
                timeout=30,
            ).status_code
            for number, name in enumerate((attack, ".."))
        ]

    assert statuses == [200, 400]
    (request,) = server.requests
    line = request.split(b"\r\n")[0]
    assert line.startswith(
        b"POST /api/r/x%2F..%2F..%2Fadmin%2Frefund%3Famount%3D9%26y%3D/x "
    )
    (refused,) = sqlite_database.rows("quarantine")
    assert refused["outcome"] == "invalid"


def test_deployed_look_up_that_shows_only_others_sends_nothing_again(
    sqlite_database: Database, tmp_path: Path, server: RawServer
) -> None:
    """Neither at once nor by the resolver, however long the order has settled."""
    server.loses_answers = True
    migrate(sqlite_database.engine)
    url = sqlite_database.env["LEDGER_DATABASE_URL"]
    env = function_env(url, server.url, recharge_api_kind="lookup")
    env |= sqlite_database.env | {"PATH": os.environ["PATH"]}
    with FunctionProcess(tmp_path, env=env) as function:
        answer = requests.post(
            function.url, json=data(), headers=headers(offset=1), timeout=30
        )
        log = function.log()
    sqlite_database.change(
        "app:r1", sent_at="2001-01-01 00:00:00", first_sent_at="2001-01-01 00:00:00"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "function.cli", "resolver", "run-once"],
        env={"PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    assert answer.status_code == 424
    sent = [each for each in server.requests if each.startswith(b"POST ")]
    assert len(sent) == 1
    row = sqlite_database.row("app:r1")
    assert (row["status"], row["reason"]) == ("parked", "rows_of_other_keys")
    assert log.count('"reason": "rows_of_other_keys"') >= 1

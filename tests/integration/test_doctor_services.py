"""`topup doctor` asks a real database and a real recharge API."""

import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme
from click.testing import CliRunner, Result
from sqlalchemy import text

from certs.make_certs import make_certs
from demo.mariadb import MariaDbServer
from demo.recharge_api import Kind, SandboxRechargeApi
from function.api_profile import load_profile
from function.cli import main
from function.database import make_engine
from function.doctor.ledger import LedgerFacts, judge, rights_of
from function.grants import ROLES, grants_of
from function.migrate import SCHEMA_REVISION, migrate
from tests.conftest import Database, settings_of
from tests.orders import order
from tests.servers import require

#: The cluster is another test's: here there is one that is whole.
HEALTHY: Final = Path(__file__).parents[1] / "healthy_cluster.yaml"


def doctor(env: Mapping[str, str]) -> Result:
    command = ["doctor", "--offline", str(HEALTHY), "--json"]
    return CliRunner(env=dict(env)).invoke(main, command)


def told(env: Mapping[str, str], subject: str = "ledger") -> list[dict[str, str]]:
    result = doctor(env)
    assert result.exit_code in {0, 1, 3}, result.output
    found = json.loads(result.stdout)["diagnoses"]
    return [each for each in found if each["subject"] == subject]


def bad(found: list[dict[str, str]]) -> list[str]:
    return [
        f"{each['severity']}: {each['message']}"
        for each in found
        if each["severity"] not in {"ok", "skipped"}
    ]


# -- The database -------------------------------------------------------------------


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDbServer]:
    """A MariaDB as production must be, with a migrated ledger."""
    directory = tmp_path_factory.mktemp("durable")
    certificates = make_certs(directory / "certs", force=True)
    server = MariaDbServer(directory / "mariadb", certificates)
    require(server.start)
    try:
        env = {
            "LEDGER_DATABASE_URL": server.create_database("ledger"),
            "LEDGER_TLS_CA_FILE": str(server.ca),
        }
        engine = make_engine(settings_of(env))
        migrate(engine)
        engine.dispose()
        yield server
    finally:
        server.stop()


Account = Callable[..., dict[str, str]]


@pytest.fixture
def account(durable: MariaDbServer) -> Account:
    """Makes an account with some grants; returns what a command needs to be it."""

    def make(*grants: str) -> dict[str, str]:
        name, password = f"u{secrets.token_hex(4)}", secrets.token_urlsafe(16)
        durable.create_user(name, password, grants)
        return {
            "LEDGER_DATABASE_URL": durable.url("ledger", name, password),
            "LEDGER_TLS_CA_FILE": str(durable.ca),
        }

    return make


@pytest.fixture
def variable(durable: MariaDbServer) -> Iterator[Callable[[str, object], None]]:
    """Sets a global variable of the server until the test ends."""
    before: dict[str, object] = {}
    with durable.root_connect() as connection, connection.cursor() as cursor:

        def put(name: str, value: object) -> None:
            cursor.execute(f"SELECT @@GLOBAL.{name}")
            row = cursor.fetchone()
            assert row is not None
            before.setdefault(name, row[0])
            cursor.execute(f"SET GLOBAL {name} = %s", (value,))

        yield put
        for name, value in before.items():
            cursor.execute(f"SET GLOBAL {name} = %s", (value,))


#: Nothing can show it on a server that stands alone.
NO_REPLICA: Final = (
    "warning: nothing shows that a failover target holds each acknowledged commit"
)


def test_durable_database_with_the_right_account_is_fine(account: Account) -> None:
    found = told(account(*grants_of("function", "ledger")))

    assert bad(found) == [NO_REPLICA]
    fine = " ".join(each["message"] for each in found)
    assert f"schema is {SCHEMA_REVISION}" in fine
    assert "on disk and its binary log" in fine
    assert "encrypted (TLS" in fine
    assert "rights that it needs, and no more" in fine


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("innodb_flush_log_at_trx_commit", 2, "innodb_flush_log_at_trx_commit is 2"),
        ("sync_binlog", 0, "sync_binlog is 0"),
        ("read_only", 1, "read-only"),
        ("max_connections", 40, "all pods together may open 48"),
    ],
)
def test_server_that_may_forget_is_an_error(
    account: Account,
    variable: Callable[[str, object], None],
    name: str,
    value: int,
    message: str,
) -> None:
    env = account(*grants_of("function", "ledger"))
    variable(name, value)

    _, found = sorted(bad(told(env)), key=lambda each: "error" in each)

    assert found.startswith("error: ")
    assert message in found
    assert doctor(env).exit_code == 1


@pytest.mark.parametrize(
    ("grants", "named"),
    [
        (["DELETE ON `ledger`.`topup`"], "DELETE on ledger.topup"),
        (["UPDATE ON `ledger`.`attempt`"], "UPDATE on ledger.attempt"),
        (["UPDATE ON `ledger`.`topup`"], "UPDATE on ledger.topup"),
        (["UPDATE (`amount_minor`) ON `ledger`.`topup`"], "UPDATE on ledger.topup"),
        (["SELECT ON `ledger`.*"], "SELECT on ledger.*"),
        (["DROP ON `ledger`.*"], "DROP on ledger.*"),
        (["ALL ON `ledger`.*"], "ALL PRIVILEGES on ledger.*"),
        (["SUPER, RELOAD ON *.*"], "SUPER on *.*"),
    ],
)
def test_account_that_may_do_more_is_an_error(
    account: Account, grants: list[str], named: str
) -> None:
    env = account(*grants_of("function", "ledger"), *grants)

    (found,) = [each for each in told(env) if "may do more" in each["message"]]

    assert found["severity"] == "error"
    assert named in found["message"]
    assert "topup grants" in found["todo"]


@pytest.mark.parametrize("role", sorted({*ROLES} - {"function", "resolver"}))
def test_account_of_another_role_is_an_error(account: Account, role: str) -> None:
    assert [
        each
        for each in bad(told(account(*grants_of(role, "ledger"))))
        if each.startswith("error: our account")
    ]


def test_account_that_lacks_a_right_is_an_error(account: Account) -> None:
    grants = [e for e in grants_of("function", "ledger") if "`quarantine`" not in e]

    (found,) = [each for each in told(account(*grants)) if "lacks" in each["message"]]

    assert found["severity"] == "error"
    assert "INSERT on ledger.quarantine" in found["message"]


def test_empty_database_is_not_migrated(durable: MariaDbServer) -> None:
    env = {
        "LEDGER_DATABASE_URL": durable.create_database(f"e{secrets.token_hex(4)}"),
        "LEDGER_TLS_CA_FILE": str(durable.ca),
    }

    assert [each for each in bad(told(env)) if "there is no schema" in each]


def test_older_schema_is_an_error(sqlite_database: Database) -> None:
    with sqlite_database.engine.connect() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))

    (found,) = bad(told(sqlite_database.env))
    assert "this version needs" in found


def test_sqlite_is_migrated_and_nothing_else_is_asked(
    sqlite_database: Database,
) -> None:
    assert [each["severity"] for each in told(sqlite_database.env)] == ["skipped", "ok"]


def test_database_that_is_away_is_a_finding(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"mysql+pymysql://topup:hunter2@127.0.0.1:{port}/ledger"

    result = doctor({"LEDGER_DATABASE_URL": url})

    assert result.exit_code == 3
    assert "can't be asked (OperationalError 2003)" in result.stdout
    assert "hunter2" not in result.output
    assert tmp_path.exists()


def test_server_with_another_certificate_is_a_finding(
    account: Account, tmp_path: Path
) -> None:
    other = make_certs(tmp_path / "other", force=True)
    env = account(*grants_of("function", "ledger"))

    (found,) = bad(told(env | {"LEDGER_TLS_CA_FILE": str(other.ca)}))

    assert found.startswith("unknown: the database can't be asked")


def test_wrong_settings_are_a_finding(tmp_path: Path) -> None:
    env = {"LEDGER_DATABASE_URL": "sqlite://", "RECHARGE_API_URL": "ftp://x"}

    assert "names no file" in bad(told({"LEDGER_DATABASE_URL": "sqlite://"}))[0]
    assert "RECHARGE_API_URL must be" in bad(told(env, "recharge API"))[0]
    assert tmp_path.exists()


# -- What other servers answer ------------------------------------------------------

FACTS: Final = LedgerFacts(
    database="ledger",
    variables={
        "innodb_flush_log_at_trx_commit": "1",
        "log_bin": "ON",
        "sync_binlog": "1",
        "rpl_semi_sync_master_enabled": "ON",
        "rpl_semi_sync_master_wait_point": "AFTER_SYNC",
        "rpl_semi_sync_master_timeout": "86400000",
    },
    cipher="TLS_AES_256_GCM_SHA384",
    revision=SCHEMA_REVISION,
    grants=[f"GRANT {each} TO `t`@`%`" for each in grants_of("function", "ledger")],
)


def judged(**changes: Any) -> list[str]:
    variables = {**FACTS.variables, **changes.pop("variables", {})}
    facts = replace(FACTS, variables=variables, **changes)
    return [
        f"{each.severity}: {each.message}"
        for each in judge(facts)
        if each.severity != "ok"
    ]


def test_semi_synchronous_primary_is_fine() -> None:
    assert judged() == []


@pytest.mark.parametrize(
    ("variables", "is_fine"),
    [
        ({"rpl_semi_sync_master_timeout": "10000"}, False),
        ({"rpl_semi_sync_master_wait_point": "AFTER_COMMIT"}, False),
        ({"rpl_semi_sync_master_enabled": "OFF"}, False),
        (
            {
                "rpl_semi_sync_master_enabled": "OFF",
                "group_replication_group_name": "3f2a",
            },
            True,
        ),
        (
            {
                "rpl_semi_sync_master_enabled": "OFF",
                "group_replication_group_name": "3f2a",
                "group_replication_consistency": "EVENTUAL",
            },
            False,
        ),
    ],
)
def test_failover_target_must_hold_every_commit(
    variables: dict[str, str], *, is_fine: bool
) -> None:
    assert bool(judged(variables=variables)) is not is_fine


@pytest.mark.parametrize("semi_sync", ["ON", "OFF"])
def test_galera_is_an_error(semi_sync: str) -> None:
    """It loses commits that it has acknowledged."""
    variables = {"rpl_semi_sync_master_enabled": semi_sync, "wsrep_on": "ON"}

    (found,) = judged(variables=variables)

    assert found.startswith("error: the server is a node of a Galera cluster")


@pytest.mark.parametrize(
    "wide",
    [
        "ALL PRIVILEGES ON *.*",
        "ALL PRIVILEGES ON `ledger`.*",
        "SELECT, INSERT, UPDATE ON `ledger`.*",
    ],
)
def test_account_with_a_wider_right_lacks_nothing(wide: str) -> None:
    (found,) = judged(grants=[f"GRANT {wide} TO `t`@`%`"])

    assert found.startswith("error: our account may do more")


def test_connection_without_tls_is_an_error() -> None:
    assert judged(cipher="") == ["error: our connection is not encrypted"]


def test_role_whose_rights_are_not_seen_is_told() -> None:
    (found,) = judged(grants=[*FACTS.grants, "GRANT `dba`@`%` TO `t`@`%`"])

    assert found.startswith("warning: our account has a role")


def test_grant_is_read_as_servers_write_it() -> None:
    line = (
        "GRANT SELECT, INSERT (`a`, b), REPLICATION CLIENT ON `l`.`t` TO `u`@`%` "
        "REQUIRE SSL WITH GRANT OPTION"
    )

    assert rights_of(line) == {
        ("SELECT", None, "`l`.`t`"),
        ("INSERT", "a", "`l`.`t`"),
        ("INSERT", "b", "`l`.`t`"),
        ("REPLICATION CLIENT", None, "`l`.`t`"),
        ("GRANT OPTION", None, "`l`.`t`"),
    }


# -- The recharge API ---------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("sesame", "ascii")
    return path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


Api = tuple[SandboxRechargeApi, dict[str, str]]


@pytest.fixture
def api(tmp_path: Path, token: Path, authority: trustme.CA) -> Iterator[Api]:
    """The sandbox over TLS with a token, and the settings that fit."""
    issued = authority.issue_cert("127.0.0.1")
    certificate, key, ca = (tmp_path / name for name in ("cert", "key", "ca"))
    certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(ca)
    with SandboxRechargeApi(
        kind=Kind.REFUSE,
        book=tmp_path / "book.jsonl",
        bearer_token_file=token,
        tls_cert=certificate,
        tls_key=key,
    ) as running:
        yield (
            running,
            {
                "RECHARGE_API_URL": running.url,
                "RECHARGE_API_KIND": "refuse",
                "RECHARGE_API_TLS_CA_FILE": str(ca),
                "RECHARGE_API_TOKEN_FILE": str(token),
            },
        )


def about(env: dict[str, str]) -> list[dict[str, str]]:
    return told(env, "recharge API")


def test_api_that_knows_us_is_asked_and_nothing_is_executed(api: Api) -> None:
    sandbox, env = api

    (found,) = about(env)

    assert found["severity"] == "ok"
    assert "is not proven" in found["message"]
    entries = list(sandbox.book.entries())
    assert [each.entry for each in entries] == ["looked_up"]


def test_api_that_refuses_us_is_an_error(api: Api, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    stale.write_text("stale", "ascii")

    (found,) = about(api[1] | {"RECHARGE_API_TOKEN_FILE": str(stale)})

    assert found["severity"] == "error"
    assert "refuses our credentials (http_401)" in found["message"]


def test_api_with_another_certificate_is_not_known(api: Api, tmp_path: Path) -> None:
    other = tmp_path / "other"
    trustme.CA().cert_pem.write_to_path(other)
    env = api[1] | {"RECHARGE_API_TLS_CA_FILE": str(other)}

    (found,) = about(env)
    assert (found["severity"], "tls_error" in found["message"]) == ("unknown", True)

    (found,) = about(env | {"RECHARGE_API_KIND": "none"})
    assert found["severity"] == "unknown"
    assert "SSLCertVerificationError" in found["message"]


def test_api_that_is_away_is_not_known(api: Api) -> None:
    sandbox, env = api
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env |= {"RECHARGE_API_URL": f"https://127.0.0.1:{port}"}

    for kind in ("refuse", "none"):
        (found,) = about(env | {"RECHARGE_API_KIND": kind})
        assert found["severity"] == "unknown"
    assert list(sandbox.book.entries()) == []


class _KnowsEverything(BaseHTTPRequestHandler):
    """Says of every key that it was executed."""

    def do_GET(self) -> None:
        (key,) = parse_qs(urlsplit(self.path).query)["idempotencyKey"]
        row = {"idempotencyKey": key, "status": "succeeded", "reference": "r"}
        body = json.dumps({"recharges": [row]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_api_that_knows_what_never_was_is_an_error() -> None:
    """Its word would settle orders that were never executed."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _KnowsEverything) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = about({"RECHARGE_API_URL": url, "RECHARGE_API_KIND": "refuse"})
        server.shutdown()
        thread.join()

    (told_,) = [each for each in found if each["severity"] == "error"]
    assert "executed about a key that nobody has" in told_["message"]


def test_api_of_kind_none_is_only_knocked_at(api: Api) -> None:
    sandbox, env = api

    (found,) = about(env | {"RECHARGE_API_KIND": "none"})

    assert found["severity"] == "ok"
    assert "only a connection and its certificate was proven" in found["message"]
    assert list(sandbox.book.entries()) == []


def test_look_up_that_could_be_taken_for_an_order_is_not_tried(
    api: Api, tmp_path: Path
) -> None:
    """One slip in such a profile would be a recharge."""
    sandbox, env = api
    generic = Path(__file__).parents[2] / "function/profiles/generic.toml"
    before, head, after = generic.read_text("utf-8").partition("[look_up]\n")
    profile = tmp_path / "rpc.toml"
    after = after.replace('method = "GET"', 'method = "POST"', 1)
    profile.write_text(before + head + after, "utf-8")

    (found,) = about(env | {"RECHARGE_API_PROFILE": str(profile)})

    assert "no look-up that is safe to try" in found["message"]
    assert list(sandbox.book.entries()) == []


def test_api_without_tls_and_credentials_is_warned_of(tmp_path: Path) -> None:
    with SandboxRechargeApi(kind="refuse", book=tmp_path / "book.jsonl") as sandbox:
        env = {"RECHARGE_API_URL": sandbox.url, "RECHARGE_API_KIND": "refuse"}
        found = about(env)

    assert [each["severity"] for each in found] == ["warning", "warning", "ok"]
    assert "plain text" in found[0]["message"]
    assert "no credentials" in found[1]["message"]


def test_missing_token_is_an_error_also_where_nothing_is_asked(
    api: Api, token: Path
) -> None:
    token.write_text("", "ascii")

    (found,) = about(api[1] | {"RECHARGE_API_KIND": "none"})

    assert found["severity"] == "error"
    assert "token_file_empty" in found["message"]


def test_profile_that_is_not_there_is_an_error(api: Api) -> None:
    (found,) = about(api[1] | {"RECHARGE_API_PROFILE": "none-such"})

    assert found["severity"] == "error"
    assert "RECHARGE_API_PROFILE" in found["message"]


def test_orders_of_another_api_are_a_finding(
    sqlite_database: Database,
) -> None:
    env = {**sqlite_database.env, "RECHARGE_API_URL": "http://127.0.0.1:9"}
    old = replace(load_profile(settings_of(env)), identity="generic@old")
    ledger = sqlite_database.make_ledger(old, lease_s=30)
    assert not any("sent to another" in each for each in bad(told(env)))
    assert ledger.claim(order())

    (found,) = bad(told(env))

    assert found.startswith("warning: 1 orders in flight")
    assert "another recharge API than generic@127.0.0.1:9" in found
    named = env | {"RECHARGE_API_IDENTITY": "generic@old"}
    assert bad(told(named)) == []

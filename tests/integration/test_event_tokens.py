"""Who may post events: tokens of a real issuer over TLS, and the function as a process.

What is refused is answered with an empty 503 and leaves nothing in the ledger.
"""

import base64
import hmac
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.warnings import InsecureKeyLengthWarning

from function.config import Settings
from function.errors import SettingsError
from function.event_tokens import LEEWAY_S, EventTokens, NotAdmitted
from function.issuer_keys import (
    DOCUMENT_BYTES_MAX,
    REFETCH_PAUSE_S,
    REFRESH_AFTER_S,
    IssuerKeys,
    KeysUnavailable,
)
from tests.integration.test_front_door import (
    BYTES_MAX,
    System,
    Wire,
    new_order,
    running,
    whole,
)
from tests.issuer import (
    AUDIENCE,
    DISCOVERY,
    KEYS,
    SUBJECT,
    Answer,
    Issuer,
    answer_json,
    answer_with,
    drip,
    hold,
    never_shakes_hands,
    unsigned,
)
from tests.processes import DEADLINE_S, StartFailed

#: Enough for a fetch that succeeds on a busy machine, and awaited by one that doesn't.
FETCH_S: Final = 2.0


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer")) as made:
        made.add_key("curve", curve=ec.SECP256R1())
        yield made


def oidc(issuer: Issuer, **more: object) -> dict[str, object]:
    """The settings that demand its tokens."""
    return {
        "events_oidc_audience": AUDIENCE,
        "events_oidc_issuer": issuer.url,
        "events_oidc_subjects": f"system:serviceaccount:shop:other, {SUBJECT}",
        "events_oidc_ca_file": issuer.ca_file,
    } | more


@pytest.fixture(scope="module")
def system(
    issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("tokens")
    with running(directory, "gunicorn", **oidc(issuer)) as made:
        yield made
        for line in made.function.log().splitlines():
            assert "eyJ" not in line, "a part of a token is logged"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def refusals(system: System) -> list[dict[str, Any]]:
    lines = re.findall(r"^\{.*\}$", system.function.log(), re.MULTILINE)
    found = [json.loads(line) for line in lines]
    return [line for line in found if line["action"] == "not_admitted"]


def written(system: System) -> list[int]:
    tables = ("topup", "attempt", "quarantine")
    return [len(system.rows(table)) for table in tables]


# ---- the function as a process ------------------------------------------------------


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"aud": AUDIENCE},
        {"aud": ["other", AUDIENCE]},
        {"sub": "system:serviceaccount:shop:other"},
        {"key_id": "curve", "algorithm": "ES256"},
        {"exp_in": -LEEWAY_S / 2},
        {"nbf_in": LEEWAY_S / 2},
    ],
    ids=str,
)
def test_delivery_with_a_valid_token_is_recharged(
    system: System, issuer: Issuer, claims: dict[str, Any]
) -> None:
    order = new_order()

    reply = system.post(order, **bearer(issuer.token(**moved(claims))))

    assert reply.status == 200
    assert system.executions(order) == 1


def moved(claims: dict[str, Any]) -> dict[str, Any]:
    """`x_in`: the claim x, so many seconds from now."""
    now = time.time()
    return {
        name.removesuffix("_in"): int(now + value) if name.endswith("_in") else value
        for name, value in claims.items()
    }


Forge = Callable[[Issuer], str]


def token_with(**claims: Any) -> Forge:
    return lambda issuer: "Bearer " + issuer.token(**moved(claims))


def signed_with_the_public_key(issuer: Issuer) -> str:
    """HS256 with the PEM as the secret; PyJWT would refuse to make one."""
    header = unsigned(issuer.token(), alg="HS256", typ="JWT", kid="first")[:-1]
    digest = hmac.digest(issuer.public_key_in_pem(), header.encode(), "sha256")
    signature = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return f"Bearer {header}.{signature}"


def with_other_claims(issuer: Issuer) -> str:
    """A good token's header and signature around another's claims."""
    head, _, signature = issuer.token().split(".")
    claims = issuer.token(exp=int(time.time()) + 99_999).split(".")[1]
    return f"Bearer {head}.{claims}.{signature}"


REFUSED: Final[dict[str, tuple[str, Forge]]] = {
    "none at all": ("no_token", lambda _: ""),
    "expired": ("expired", token_with(exp_in=-LEEWAY_S - 5)),
    "not yet valid": ("not_yet_valid", token_with(nbf_in=LEEWAY_S + 30)),
    "issued in the future": ("not_yet_valid", token_with(iat_in=LEEWAY_S + 30)),
    "wrong audience": ("audience", token_with(aud=["other"])),
    "wrong issuer": ("issuer", token_with(iss="https://issuer.example")),
    "wrong subject": ("subject", token_with(sub=SUBJECT + "x")),
    "subject is a list": ("subject", token_with(sub=[SUBJECT])),
    "no expiry": ("claim_missing", token_with(without="exp")),
    "no audience": ("claim_missing", token_with(without="aud")),
    "no issuer": ("claim_missing", token_with(without="iss")),
    "no subject": ("claim_missing", token_with(without="sub")),
    "unknown key": ("unknown_key", token_with(key_id="unknown", signed_by="first")),
    "no key id": ("unknown_key", token_with(key_id=None)),
    "other key's signature": (
        "algorithm",
        token_with(key_id="first", signed_by="curve", algorithm="ES256"),
    ),
    "other claims": ("signature", with_other_claims),
    "no signature": (
        "algorithm",
        lambda issuer: "Bearer " + unsigned(issuer.token(), alg="none", kid="first"),
    ),
    "empty signature": (
        "signature",
        lambda issuer: "Bearer " + unsigned(issuer.token(), alg="RS256", kid="first"),
    ),
    "HS256 with the public key": ("algorithm", signed_with_the_public_key),
    "algorithm is a list": (
        "algorithm",
        lambda issuer: "Bearer " + unsigned(issuer.token(), alg=["RS256"], kid="first"),
    ),
    "key id is a number": (
        "malformed",
        lambda issuer: "Bearer " + unsigned(issuer.token(), alg="RS256", kid=1),
    ),
    "garbage": ("malformed", lambda _: "Bearer eyJx.eyJy.z"),
    "one word": ("malformed", lambda _: "Bearer x"),
    "no scheme": ("malformed", lambda issuer: issuer.token()),
    "other scheme": ("malformed", lambda issuer: f"Basic {issuer.token()}"),
    "two in one header": (
        "malformed",
        lambda issuer: f"Bearer {issuer.token()},Bearer {issuer.token()}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_delivery_without_a_valid_token_leaves_nothing(
    system: System, issuer: Issuer, case: str
) -> None:
    reason, forge = REFUSED[case]
    authorization = forge(issuer)
    headers = {"authorization": authorization} if authorization else {}
    before = written(system)

    reply = system.post(new_order(), **headers)

    assert (reply.status, reply.body) == (503, b"")
    assert written(system) == before
    system.wait_for(lambda: reason in {line["reason"] for line in refusals(system)})


@pytest.mark.parametrize("body", [b"", b"{", b"x" * (BYTES_MAX + 1)], ids=len)
def test_poison_without_a_token_is_not_recorded(system: System, body: bytes) -> None:
    before = written(system)

    reply = system.post(body)

    assert (reply.status, reply.body) == (503, b"")
    assert written(system) == before


def test_poison_with_a_token_is_recorded(system: System, issuer: Issuer) -> None:
    """The twin: it was the token."""
    assert system.post(b"{", **bearer(issuer.token())).status == 400


@pytest.mark.parametrize("first", ["good", "bad"])
def test_two_headers_are_no_token(system: System, issuer: Issuer, first: str) -> None:
    lines = [f"Authorization: Bearer {issuer.token()}", "Authorization: Bearer x"]
    order = new_order()

    with Wire(system) as wire:
        wire.send(whole(order, *(lines if first == "good" else lines[::-1])))
        reply = wire.reply()

    assert reply is not None
    assert (reply.status, reply.body) == (503, b"")
    assert system.calls(order) == 0


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probe_needs_no_token(system: System, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", system.function.port)
    with closing(connection):
        connection.request("GET", path)
        assert connection.getresponse().status == 200


def test_refusals_are_counted_by_reason_and_told_once_in_a_while(
    system: System,
) -> None:
    for _ in range(30):
        system.post(new_order())

    lines = [line for line in refusals(system) if line["reason"] == "no_token"]
    assert lines[0]["alert"] is True
    assert lines[0]["count"] == 1
    # Others of this module were refused for it, too.
    assert len(lines) < 10


def test_new_key_of_the_issuer_is_found(system: System, issuer: Issuer) -> None:
    issuer.add_key("rotated")
    token = issuer.token(key_id="rotated")

    # Not sooner than the pause after the fetch before allows.
    system.wait_for(lambda: system.post(new_order(), **bearer(token)).status == 200)


def test_issuer_that_is_down_at_first_and_again_later(
    tmp_path: Path,
) -> None:
    (tmp_path / "issuer").mkdir()
    with Issuer(tmp_path / "issuer") as own:
        own.stop()
        settings = oidc(own)
        with running(tmp_path, "gunicorn", **settings) as system:
            reply = system.post(new_order(), **bearer(own.token()))
            assert (reply.status, reply.body) == (503, b"")
            assert [line["reason"] for line in refusals(system)] == ["keys_unavailable"]
            assert '"token_keys_unavailable"' in system.function.log()
            assert sum(written(system)) == 0

            own.start()
            token = own.token()
            order = new_order()
            system.wait_for(lambda: system.post(order, **bearer(token)).status == 200)

            own.stop()
            assert system.post(new_order(), **bearer(token)).status == 200


@pytest.mark.parametrize("server", ["gunicorn", "functions-framework"])
def test_function_refuses_to_start_with_a_ca_that_is_none(
    tmp_path: Path, issuer: Issuer, server: Any
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("none")

    settings = oidc(issuer, events_oidc_ca_file=ca)
    with pytest.raises(StartFailed) as failed, running(tmp_path, server, **settings):
        pass

    assert "topup: EVENTS_OIDC_CA_FILE: " in failed.value.log
    assert "Traceback" not in failed.value.log


# ---- the keys -----------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def own_issuer(tmp_path: Path) -> Iterator[Issuer]:
    with Issuer(tmp_path) as made:
        yield made
    # Nothing of a fetch is left behind, and none goes on for ever.
    wait_until(lambda: not fetching())


def fetching() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "issuer-keys"]


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def settings_of(issuer: Issuer, **more: object) -> Settings:
    env = {
        "ledger_database_url": "sqlite://",
        "recharge_api_url": "http://api",
        **oidc(issuer, **more),
    }
    return Settings.from_env(
        {name.upper(): str(value) for name, value in env.items() if value}
    )


def keys_of(issuer: Issuer, clock: Callable[[], float], **more: object) -> IssuerKeys:
    return IssuerKeys(settings_of(issuer, **more), clock, deadline_s=FETCH_S)


def failure_of(keys: IssuerKeys, key_id: str = "first") -> str:
    with pytest.raises(KeysUnavailable) as failed:
        keys.find(key_id)
    return str(failed.value)


def test_keys_are_found_by_discovery_and_kept(own_issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(own_issuer, clock)

    found = [keys.find("first") for _ in range(5)]

    assert all(key and key.key_id == "first" for key in found)
    assert [path for path, _ in own_issuer.requests] == [DISCOVERY, KEYS]


def test_address_of_the_keys_spares_discovery(own_issuer: Issuer, clock: Clock) -> None:
    """An issuer may be a mere name."""
    keys = keys_of(
        own_issuer,
        clock,
        events_oidc_issuer="kubernetes/serviceaccount",
        events_oidc_keys_url=own_issuer.url + KEYS,
    )

    assert keys.find("first")
    assert [path for path, _ in own_issuer.requests] == [KEYS]


def test_unknown_key_is_fetched_once_however_many_ask(
    own_issuer: Issuer, clock: Clock
) -> None:
    keys = keys_of(own_issuer, clock)
    keys.find("first")
    clock.now += REFETCH_PAUSE_S

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(keys.find, [f"random-{n}" for n in range(200)]))

    assert found == [None] * 200
    assert own_issuer.asked(KEYS) == 2


def test_first_deliveries_share_one_fetch(own_issuer: Issuer, clock: Clock) -> None:
    keys = keys_of(own_issuer, clock)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(keys.find, ["first"] * 16))

    assert all(found)
    assert own_issuer.asked(KEYS) == 1


def test_rotated_key_is_fetched_when_the_pause_is_over(
    own_issuer: Issuer, clock: Clock
) -> None:
    keys = keys_of(own_issuer, clock)
    keys.find("first")
    own_issuer.add_key("second")

    assert keys.find("second") is None
    clock.now += REFETCH_PAUSE_S
    assert keys.find("second")


def test_issuer_that_is_down_is_not_asked_at_every_delivery(
    own_issuer: Issuer, clock: Clock
) -> None:
    own_issuer.answers[DISCOVERY] = answer_with(b"", 500)
    keys = keys_of(own_issuer, clock)

    reasons = {failure_of(keys) for _ in range(20)}

    assert reasons == {"status_500"}
    assert own_issuer.asked(DISCOVERY) == 1


def test_withdrawn_key_goes_at_the_next_refresh(
    own_issuer: Issuer, clock: Clock
) -> None:
    own_issuer.add_key("second")
    keys = keys_of(own_issuer, clock)
    assert keys.find("first")
    own_issuer.withdraw("first")

    clock.now += REFRESH_AFTER_S
    # The delivery that sets the refresh going does not wait for it.
    assert keys.find("first")
    wait_until(lambda: keys.find("first") is None)
    assert keys.find("second")


@pytest.mark.parametrize(
    "broken", [answer_with(b"", 500), answer_json({"keys": []})], ids=["500", "empty"]
)
def test_known_keys_outlive_a_refresh_that_fails(
    own_issuer: Issuer, clock: Clock, broken: Answer
) -> None:
    keys = keys_of(own_issuer, clock)
    keys.find("first")
    own_issuer.answers[KEYS] = broken

    clock.now += REFRESH_AFTER_S
    assert keys.find("first")
    wait_until(lambda: own_issuer.asked(KEYS) == 2 and not fetching())
    assert keys.find("first")


def test_known_key_is_not_held_up_by_an_issuer_that_hangs(
    own_issuer: Issuer, clock: Clock
) -> None:
    keys = keys_of(own_issuer, clock)
    keys.find("first")
    own_issuer.answers[DISCOVERY] = hold

    clock.now += REFRESH_AFTER_S
    # It is answered while the fetch still runs.
    assert keys.find("first")
    assert fetching()
    # An issuer that goes while TLS begins is another story.
    wait_until(lambda: own_issuer.asked(DISCOVERY) == 2)


def test_never_two_fetches_at_once(own_issuer: Issuer, clock: Clock) -> None:
    keys = IssuerKeys(settings_of(own_issuer), clock, deadline_s=DEADLINE_S)
    keys.find("first")
    may_answer = threading.Event()

    def wait(issuer: Issuer, handler: Any) -> None:
        may_answer.wait(DEADLINE_S)
        answer_json(issuer.document(DISCOVERY))(issuer, handler)

    own_issuer.answers[DISCOVERY] = wait
    clock.now += REFRESH_AFTER_S
    keys.find("first")
    wait_until(lambda: own_issuer.asked(DISCOVERY) == 2)
    clock.now += REFRESH_AFTER_S
    keys.find("first")
    may_answer.set()

    wait_until(lambda: not fetching())
    assert own_issuer.asked(DISCOVERY) == 2


ENDLESS: Final[dict[str, Answer]] = {
    "says nothing": hold,
    "drips a status line": drip(b"HTTP/1.1 2", b"0"),
    "drips headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "drips one header": drip(b"HTTP/1.1 200 OK\r\nA: ", b"b"),
    "drips a body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" "),
    "drips a body without length": drip(b"HTTP/1.1 200 OK\r\n\r\n{}", b" "),
    "drips chunks": drip(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"
    ),
    "continues": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize(
    ("path", "case"),
    [*((DISCOVERY, case) for case in ENDLESS), (KEYS, "drips a body without length")],
)
def test_issuer_without_end_is_cut_and_asked_again(
    own_issuer: Issuer, clock: Clock, case: str, path: str
) -> None:
    own_issuer.answers[path] = ENDLESS[case]
    keys = keys_of(own_issuer, clock)

    failure_of(keys)
    wait_until(lambda: not fetching())
    if "without length" in case:
        # What was cut looks whole, and must not be taken for it.
        assert failure_of(keys) == "TimeoutError"

    own_issuer.answers.clear()
    clock.now += REFETCH_PAUSE_S
    assert keys.find("first")


def test_handshake_without_end_is_cut(own_issuer: Issuer, clock: Clock) -> None:
    with never_shakes_hands() as listener:
        url = f"https://localhost:{listener.getsockname()[1]}/keys"
        keys = keys_of(own_issuer, clock, events_oidc_keys_url=url)

        failure_of(keys)
        wait_until(lambda: not fetching())


def padded(bytes_: int) -> Answer:
    """The truth, with so many bytes."""

    def answer(issuer: Issuer, handler: Any) -> None:
        body = json.dumps(issuer.document(KEYS)).encode()
        answer_with(body + b" " * (bytes_ - len(body)))(issuer, handler)

    return answer


def test_answer_is_read_up_to_its_limit(own_issuer: Issuer, clock: Clock) -> None:
    own_issuer.answers[KEYS] = padded(DOCUMENT_BYTES_MAX + 1)
    keys = keys_of(own_issuer, clock)
    assert failure_of(keys) == "answer_too_large"

    own_issuer.answers[KEYS] = padded(DOCUMENT_BYTES_MAX)
    clock.now += REFETCH_PAUSE_S
    assert keys.find("first")


def test_flood_is_not_read_on(own_issuer: Issuer, clock: Clock) -> None:
    """Nor is the deadline waited for."""
    own_issuer.answers[KEYS] = drip(
        b"HTTP/1.1 200 OK\r\n\r\n", b" " * DOCUMENT_BYTES_MAX, pause_s=0
    )

    assert failure_of(keys_of(own_issuer, clock)) == "answer_too_large"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answer_with(b"", 401), "status_401"),
        (answer_with(b"{}", 204), "status_204"),
        (answer_with(b"{"), "JSONDecodeError"),
        (answer_with(b"\xff"), "UnicodeDecodeError"),
        (answer_with(b"[" * 60_000), "answer_too_large"),
        (answer_with(b"[" * 9_000), "RecursionError"),
        (answer_json([]), "answer_no_object"),
        (answer_json({}), "PyJWKSetError"),
        (answer_json({"keys": []}), "PyJWKSetError"),
        (answer_json({"keys": "first"}), "PyJWKSetError"),
        (answer_json({"keys": [{"kid": "first", "kty": "RSA"}]}), "PyJWKSetError"),
    ],
    ids=range(11),
)
def test_answer_that_is_no_set_of_keys_is_told_by_a_constant(
    own_issuer: Issuer, clock: Clock, answer: Answer, reason: str
) -> None:
    own_issuer.answers[KEYS] = answer

    assert failure_of(keys_of(own_issuer, clock)) == reason


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"issuer": "https://other"}, "discovered_another_issuer"),
        ({"jwks_uri": None}, "discovered_no_usable_address"),
        ({"jwks_uri": "file:///etc/passwd"}, "discovered_no_usable_address"),
        ({"jwks_uri": "http://localhost:1/keys"}, "discovered_no_usable_address"),
    ],
    ids=str,
)
def test_discovery_that_names_no_usable_address_is_not_followed(
    own_issuer: Issuer, clock: Clock, document: dict[str, Any], reason: str
) -> None:
    truth = own_issuer.document(DISCOVERY)
    assert isinstance(truth, dict)
    own_issuer.answers[DISCOVERY] = answer_json(truth | document)

    assert failure_of(keys_of(own_issuer, clock)) == reason


@pytest.mark.parametrize("path", [DISCOVERY, KEYS])
def test_redirect_is_not_followed(own_issuer: Issuer, clock: Clock, path: str) -> None:
    to = {"Location": own_issuer.url + "/elsewhere"}
    own_issuer.answers[path] = answer_with(b"", 302, to)

    assert failure_of(keys_of(own_issuer, clock)) == "status_302"
    assert own_issuer.asked("/elsewhere") == 0


def test_server_of_another_ca_or_name_is_not_believed(
    own_issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    for name, host in [("ca", "localhost"), ("name", "other.example")]:
        (tmp_path / name).mkdir()
        with Issuer(tmp_path / name, host=host) as other:
            ca = other.ca_file if name == "name" else own_issuer.ca_file
            keys = keys_of(other, clock, events_oidc_ca_file=ca)

            assert failure_of(keys) == "SSLCertVerificationError"
            assert other.requests == []


def test_plain_http_is_spoken_where_it_is_set(tmp_path: Path, clock: Clock) -> None:
    with Issuer(tmp_path, is_tls=False) as plain:
        keys = keys_of(plain, clock, events_oidc_ca_file=None)

        assert keys.find("first")


def test_token_for_the_keys_is_read_at_each_fetch(
    own_issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    keys = keys_of(own_issuer, clock, events_oidc_keys_token_file=file)
    keys.find("first")
    file.write_text("two")
    clock.now += REFETCH_PAUSE_S
    keys.find("unknown")

    assert [given for _, given in own_issuer.requests] == [
        *("Bearer one",) * 2,
        *("Bearer two",) * 2,
    ]


def test_token_for_the_keys_goes_to_no_other_server(
    own_issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    (tmp_path / "other").mkdir()
    with Issuer(tmp_path / "other") as other:
        both = tmp_path / "both.pem"
        both.write_text(own_issuer.ca_file.read_text() + other.ca_file.read_text())
        document = {"issuer": own_issuer.url, "jwks_uri": other.url + KEYS}
        own_issuer.answers[DISCOVERY] = answer_json(document)
        keys = keys_of(
            own_issuer,
            clock,
            events_oidc_ca_file=both,
            events_oidc_keys_token_file=file,
        )

        assert keys.find("first")
        assert own_issuer.requests == [(DISCOVERY, "Bearer secret")]
        assert other.requests == [(KEYS, None)]


def test_token_file_that_is_gone_is_told(
    own_issuer: Issuer, clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("x")
    keys = keys_of(own_issuer, clock, events_oidc_keys_token_file=file)
    file.unlink()

    assert failure_of(keys) == "FileNotFoundError"


def test_only_public_keys_for_signatures_are_taken(
    own_issuer: Issuer, clock: Clock
) -> None:
    """A shared secret that is published is nobody's; nor is a key to encrypt with."""
    secret = base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")
    own_issuer.publish({"kid": "shared", "kty": "oct", "k": secret})
    own_issuer.publish({"kid": "shared-rs", "kty": "oct", "k": secret, "alg": "RS256"})
    own_issuer.add_key("encrypts")
    truth = own_issuer.document(KEYS)
    assert isinstance(truth, dict)
    (published,) = (key for key in truth["keys"] if key["kid"] == "encrypts")
    own_issuer.publish(published | {"use": "enc"})
    keys = keys_of(own_issuer, clock)

    assert keys.find("first")
    assert [keys.find(each) for each in ("shared", "shared-rs", "encrypts")] == [
        None,
        None,
        None,
    ]


# ---- the check, in this process -----------------------------------------------------


def test_what_can_never_be_verified_asks_the_issuer_nothing(
    own_issuer: Issuer,
) -> None:
    tokens = EventTokens(settings_of(own_issuer))
    cases = ["no signature", "HS256 with the public key", "no key id", "garbage"]

    for case in [*cases, "none at all"]:
        reason, forge = REFUSED[case]
        with pytest.raises(NotAdmitted, match=f"^{reason}$"):
            tokens.admit(forge(own_issuer))

    assert own_issuer.requests == []


def test_every_refusal_is_counted_by_its_reason(own_issuer: Issuer) -> None:
    tokens = EventTokens(settings_of(own_issuer))
    tokens.admit(f"bearer {own_issuer.token()}")

    for reason, forge in REFUSED.values():
        # "other key's signature" names a key that this issuer has not.
        if forge is not REFUSED["other key's signature"][1]:
            with pytest.raises(NotAdmitted, match=f"^{reason}$"):
                tokens.admit(forge(own_issuer))

    assert tokens.refused["malformed"] == 6
    assert tokens.refused["no_token"] == 1


def test_without_an_audience_everybody_is_admitted() -> None:
    env = {"LEDGER_DATABASE_URL": "sqlite://", "RECHARGE_API_URL": "http://api"}
    tokens = EventTokens(Settings.from_env(env))

    tokens.admit(None)
    tokens.admit("Bearer x")
    assert not tokens.refused


def test_short_key_of_the_issuer_is_not_good_enough(own_issuer: Issuer) -> None:
    own_issuer.add_key("short", bits=1024)
    tokens = EventTokens(settings_of(own_issuer))

    with pytest.warns(InsecureKeyLengthWarning):
        token = own_issuer.token(key_id="short")

    with pytest.raises(NotAdmitted, match=r"^key$"):
        tokens.admit(f"Bearer {token}")


def test_ca_file_that_is_none_is_refused_by_name(
    own_issuer: Issuer, tmp_path: Path
) -> None:
    ca = tmp_path / "none.pem"
    ca.write_text("none")

    with pytest.raises(SettingsError, match=r"^EVENTS_OIDC_CA_FILE: "):
        EventTokens(settings_of(own_issuer, events_oidc_ca_file=ca))

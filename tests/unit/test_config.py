"""Settings refuse to be wrong: at start, all at once, by name, and without secrets."""

from pathlib import Path
from typing import Final

import pytest

from function.config import Settings, settings_table
from function.errors import SettingsError

REQUIRED: Final = {
    "LEDGER_DATABASE_URL": "mysql+pymysql://topup:hunter2@db/ledger",
    "RECHARGE_API_URL": "https://api.example",
}

#: Left must be less than right (README, Settings).
ORDER: Final = [
    ("RECHARGE_API_TIMEOUT_S", "RECHARGE_API_DEADLINE_S"),
    ("EVENT_DELIVERY_TIMEOUT_S", "SERVER_REQUEST_TIMEOUT_S"),
    ("RECHARGE_API_DEADLINE_S", "SERVER_GRACEFUL_TIMEOUT_S"),
    ("SERVER_GRACEFUL_TIMEOUT_S", "SERVER_TERMINATION_GRACE_S"),
]


def settings(**env: str) -> Settings:
    return Settings.from_env(REQUIRED | env)


def refusal(env: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env(env)
    return str(refused.value)


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text("s")
    return str(path)


def test_defaults_are_enough_beside_what_is_required() -> None:
    found = settings()

    assert found.recharge_api_url == "https://api.example"
    assert found.event_bytes_max == 256 * 1024
    assert found.recharge_api_token_file is None


def test_every_missing_setting_is_named_in_one_error() -> None:
    message = refusal({})

    required = {name for name, default, _ in settings_table() if default == "required"}
    assert required == set(REQUIRED)
    assert all(f"{name} is missing" in message for name in required)


@pytest.mark.parametrize("name", sorted(REQUIRED))
@pytest.mark.parametrize("nothing", ["", "  "])
def test_empty_setting_is_missing(name: str, nothing: str) -> None:
    assert f"{name} is missing" in refusal(REQUIRED | {name: nothing})


def test_everything_wrong_is_named_in_one_error() -> None:
    message = refusal({"SERVER_THREADS": "x", "LEDGER_LEASE_MARGIN_S": "y"})

    assert "SERVER_THREADS" in message
    assert "LEDGER_LEASE_MARGIN_S" in message
    assert "RECHARGE_API_URL" in message


@pytest.mark.parametrize(
    "value", ["x", "1 2", "1,5", "0x10", "1e", "nan", "inf", "ten"]
)
@pytest.mark.parametrize(
    "name",
    [
        "LEDGER_LEASE_MARGIN_S",
        "RECHARGE_API_SETTLE_S",
        "RECHARGE_API_REPLAY_WINDOW_S",
        "SERVER_THREADS",
        "EVENT_BYTES_MAX",
    ],
)
def test_number_that_is_none_is_named_and_not_quoted(name: str, value: str) -> None:
    message = refusal(REQUIRED | {name: value})

    assert message.startswith(f"{name}: must be a")
    assert value not in message.replace("number", "")


@pytest.mark.parametrize("value", ["1.5", "1e3", "9" * 5000])
def test_whole_number_that_is_none_is_named(value: str) -> None:
    message = refusal(REQUIRED | {"SERVER_THREADS": value})

    assert message == "SERVER_THREADS: must be a whole number"


def test_optional_number_is_read_as_a_number() -> None:
    found = settings(RECHARGE_API_SETTLE_S="90", RECHARGE_API_REPLAY_WINDOW_S="3600.5")

    assert found.recharge_api_settle_s == 90
    assert found.recharge_api_replay_window_s == 3600.5
    assert settings().recharge_api_settle_s is None


@pytest.mark.parametrize(
    "name",
    [
        "LEDGER_TIMEOUT_S",
        "LEDGER_LEASE_MARGIN_S",
        "RECHARGE_API_TIMEOUT_S",
        "RECHARGE_API_IDLE_S",
        "RECHARGE_API_REPLAY_WINDOW_S",
        "RECHARGE_API_SETTLE_S",
        "EVENT_BYTES_MAX",
        "EVENT_READ_TIMEOUT_S",
        "SERVER_THREADS",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_setting_that_must_be_positive_is_named(name: str, value: str) -> None:
    assert f"{name} must be greater than 0" in refusal(REQUIRED | {name: value})


@pytest.mark.parametrize("above", ["0", "1"])
@pytest.mark.parametrize(("low", "high"), ORDER)
def test_deadlines_in_the_wrong_order_are_named_both(
    low: str, high: str, above: str
) -> None:
    """Equal is wrong, too: the margin would be gone."""
    limit = float(getattr(settings(), high.lower()))
    value = limit + float(above)

    message = refusal(REQUIRED | {low: f"{value}"})

    assert f"{low} ({value:g}) must be less than {high} ({limit:g}): " in message


def test_deadlines_in_the_right_order_are_accepted() -> None:
    """The twin: each just above the one before."""
    names = ["RECHARGE_API_TIMEOUT_S", "RECHARGE_API_DEADLINE_S"]
    names += ["EVENT_DELIVERY_TIMEOUT_S", "SERVER_REQUEST_TIMEOUT_S"]
    env = {name: str(1 + index / 10) for index, name in enumerate(names)}
    found = settings(**env, LEDGER_LEASE_MARGIN_S="0.05")

    assert found.server_request_timeout_s == 1.3
    assert found.ledger_lease_s == pytest.approx(1.15)


@pytest.mark.parametrize("margin_s", ["45", "46"])
def test_lease_that_outlasts_the_delivery_is_refused(margin_s: str) -> None:
    """The lease follows from the deadline: no process can send when it ends."""
    assert settings(LEDGER_LEASE_MARGIN_S="44").ledger_lease_s == 59

    message = refusal(REQUIRED | {"LEDGER_LEASE_MARGIN_S": margin_s})

    lease = f"RECHARGE_API_DEADLINE_S + LEDGER_LEASE_MARGIN_S ({15 + int(margin_s)})"
    assert f"{lease} must be less than EVENT_DELIVERY_TIMEOUT_S (60)" in message


def test_lease_of_the_version_before_is_no_setting_any_more() -> None:
    message = refusal(REQUIRED | {"LEDGER_LEASE_S": "30"})

    assert "LEDGER_LEASE_S is no setting any more" in message
    assert "LEDGER_LEASE_MARGIN_S" in message


def test_every_wrong_order_is_named_in_one_error() -> None:
    message = refusal(REQUIRED | {"RECHARGE_API_DEADLINE_S": "1000"})

    assert "LEDGER_LEASE_MARGIN_S" in message
    assert "SERVER_GRACEFUL_TIMEOUT_S" in message


@pytest.mark.parametrize(
    "name",
    [
        "LEDGER_PASSWORD_FILE",
        "LEDGER_TLS_CA_FILE",
        "RECHARGE_API_TLS_CA_FILE",
        "RECHARGE_API_TOKEN_FILE",
        "RECHARGE_API_OAUTH_CLIENT_SECRET_FILE",
    ],
)
def test_missing_file_is_named_with_its_setting(name: str, tmp_path: Path) -> None:
    path = tmp_path / "nobody"

    assert f"{name}: no such file: {path}" in refusal(REQUIRED | {name: str(path)})


def test_database_address_with_its_password_is_never_shown() -> None:
    found = settings()

    assert "hunter2" not in repr(found)
    assert "hunter2" not in str(found)
    assert "https://api.example" in repr(found)
    # Nor when something else is wrong.
    env = {"LEDGER_DATABASE_URL": REQUIRED["LEDGER_DATABASE_URL"], "LOG_LEVEL": "x"}
    assert "hunter2" not in refusal(env)


@pytest.mark.parametrize(
    "names",
    [
        ["TOKEN_URL"],
        ["CLIENT_ID"],
        ["CLIENT_SECRET_FILE"],
        ["TOKEN_URL", "CLIENT_ID"],
        ["TOKEN_URL", "CLIENT_SECRET_FILE"],
        ["CLIENT_ID", "CLIENT_SECRET_FILE"],
    ],
)
def test_oauth_in_part_is_refused(names: list[str], secret_file: str) -> None:
    env = {f"RECHARGE_API_OAUTH_{name}": secret_file for name in names}

    assert "set all or none" in refusal(REQUIRED | env)


def test_oauth_whole_is_accepted_but_not_beside_a_token(secret_file: str) -> None:
    env = {
        "RECHARGE_API_OAUTH_TOKEN_URL": "https://login.example/token",
        "RECHARGE_API_OAUTH_CLIENT_ID": "topup",
        "RECHARGE_API_OAUTH_CLIENT_SECRET_FILE": secret_file,
    }

    assert settings(**env).recharge_api_oauth_client_id == "topup"
    both = env | {"RECHARGE_API_TOKEN_FILE": secret_file}
    assert "RECHARGE_API_TOKEN_FILE" in refusal(REQUIRED | both)


def test_log_level_is_one_of_four() -> None:
    assert settings(LOG_LEVEL="warning").log_level == "warning"
    assert "LOG_LEVEL" in refusal(REQUIRED | {"LOG_LEVEL": "loud"})


def test_environment_of_the_process_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in REQUIRED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SERVER_THREADS", "3")

    assert Settings.from_env().server_threads == 3


def test_every_setting_is_in_the_table_with_its_help() -> None:
    table = settings_table()

    assert {name.lower() for name, _, _ in table} == set(Settings.__dataclass_fields__)
    assert all(help_.endswith(".") for _, _, help_ in table)


OIDC: Final = {
    "EVENTS_OIDC_AUDIENCE": "topup",
    "EVENTS_OIDC_ISSUER": "https://kubernetes.default.svc.cluster.local",
    "EVENTS_OIDC_SUBJECTS": "system:serviceaccount:shop:one",
}


def test_subjects_are_a_list() -> None:
    found = settings(**OIDC | {"EVENTS_OIDC_SUBJECTS": " a:b:c:d ,, e:f:g:h,"})

    assert found.events_oidc_subjects == ("a:b:c:d", "e:f:g:h")
    assert settings().events_oidc_audience is None


@pytest.mark.parametrize("name", sorted(OIDC))
@pytest.mark.parametrize("nothing", ["", " , ,"])
def test_half_of_who_may_post_is_refused_and_named(name: str, nothing: str) -> None:
    """Silence would admit everybody."""
    if nothing and name != "EVENTS_OIDC_SUBJECTS":
        nothing = "  "

    message = refusal(REQUIRED | OIDC | {name: nothing})

    assert all(each in message for each in OIDC)


@pytest.mark.parametrize(
    "name",
    ["EVENTS_OIDC_KEYS_URL", "EVENTS_OIDC_CA_FILE", "EVENTS_OIDC_KEYS_TOKEN_FILE"],
)
def test_way_to_the_keys_without_an_audience_is_refused(
    name: str, secret_file: str
) -> None:
    value = secret_file if name.endswith("FILE") else "https://keys"

    assert "EVENTS_OIDC_AUDIENCE" in refusal(REQUIRED | {name: value})


@pytest.mark.parametrize(
    "wrong", ["kubernetes/serviceaccount", "file:///keys", "https://", "https://h:x"]
)
def test_address_of_the_issuer_or_its_keys_that_is_none_is_named(wrong: str) -> None:
    message = refusal(REQUIRED | OIDC | {"EVENTS_OIDC_ISSUER": wrong})
    assert message.startswith("EVENTS_OIDC_ISSUER must be an http")
    assert "EVENTS_OIDC_KEYS_URL" in message

    keys = {"EVENTS_OIDC_ISSUER": wrong, "EVENTS_OIDC_KEYS_URL": "https://keys"}
    assert settings(**OIDC | keys).events_oidc_issuer == wrong
    message = refusal(REQUIRED | OIDC | {"EVENTS_OIDC_KEYS_URL": wrong})
    assert message == "EVENTS_OIDC_KEYS_URL must be an http:// or https:// address"


def test_token_for_the_keys_is_not_sent_in_the_clear(secret_file: str) -> None:
    token = {"EVENTS_OIDC_KEYS_TOKEN_FILE": secret_file}

    assert settings(**OIDC, **token).events_oidc_keys_token_file == Path(secret_file)
    plain = {"EVENTS_OIDC_KEYS_URL": "http://keys"}
    message = refusal(REQUIRED | OIDC | token | plain)
    assert message.startswith("EVENTS_OIDC_KEYS_URL must begin with https://")
    assert "EVENTS_OIDC_KEYS_TOKEN_FILE" in message


def test_pattern_of_subjects_is_refused() -> None:
    """An EventPolicy has patterns; here one would admit nobody."""
    pattern = {"EVENTS_OIDC_SUBJECTS": "system:serviceaccount:shop:*"}

    assert "EVENTS_OIDC_SUBJECTS" in refusal(REQUIRED | OIDC | pattern)


@pytest.mark.parametrize("identity", ["a b", "x" * 201, "caf\u00e9"])
def test_identity_that_no_ledger_takes_refuses_to_start(identity: str) -> None:
    with pytest.raises(SettingsError, match="RECHARGE_API_IDENTITY"):
        Settings.from_env({**REQUIRED, "RECHARGE_API_IDENTITY": identity})

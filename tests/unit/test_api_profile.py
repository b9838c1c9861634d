"""What an answer of the recharge API means, and what of it counts as proof.

A wrong "done" loses a recharge, a wrong "no" too, a wrong "retry" or "absent" doubles
one: whatever isn't named is unknown.
"""

import uuid
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.api_profile import ApiProfile, Kind, load_profile, render, template_values
from function.config import Settings
from function.errors import SettingsError
from function.model import AnswerClass, Finding, TopUp

GENERIC: Final = (
    Path(__file__).parents[2] / "function" / "profiles" / "generic.toml"
).read_text("utf-8")
KEY: Final = "app:r-1"
DONE: Final = {"status": "succeeded", "reference": "ref-1", "idempotencyKey": KEY}
ACCEPTED: Final = {"status": "accepted", "idempotencyKey": KEY}
PAGE: Final = None  # What a body that is no JSON is parsed to.
TOPUP: Final = TopUp(
    idempotency_key=KEY,
    fingerprint="f",
    channel="app",
    recharge_id="r-1",
    msisdn="+41791234567",
    amount_minor=500,
    currency="CHF",
    requested_at="2026-01-02T03:04:05Z",
    donor_msisdn=None,
    payload=b"",
    position=None,
    event_id="e",
    event_source="/s",
)


def settings(**env: str) -> Settings:
    required = {"LEDGER_DATABASE_URL": "sqlite://", "RECHARGE_API_URL": "http://api"}
    return Settings.from_env(required | env)


def profile(**env: str) -> ApiProfile:
    return load_profile(settings(**env))


def from_text(directory: Path, text: str, **env: str) -> ApiProfile:
    path = directory / "own.toml"
    path.write_text(text, "utf-8")
    return profile(RECHARGE_API_PROFILE=str(path), **env)


def refusal(directory: Path, text: str, **env: str) -> str:
    with pytest.raises(SettingsError) as refused:
        from_text(directory, text, **env)
    return str(refused.value)


def error(code: str, message: str = "m") -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def classified(status: int, document: object) -> AnswerClass:
    return profile().classify(status, document, KEY).classified


# ---- classification -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "document", "expected"),
    [
        # done: a success in the body and a reference, on a status of success.
        (200, DONE, "done"),
        (201, DONE, "done"),
        (200, DONE | {"reference": 7}, "done"),
        (200, {"status": "succeeded"}, "unknown"),
        (200, DONE | {"reference": None}, "unknown"),
        (200, DONE | {"reference": ""}, "unknown"),
        (200, DONE | {"reference": {}}, "unknown"),
        (200, DONE | {"reference": True}, "unknown"),
        (202, DONE, "unknown"),
        (204, DONE, "unknown"),
        (500, DONE, "unknown"),
        # It contradicts itself: unknown, however sure the status sounds.
        (404, DONE, "unknown"),
        (401, DONE, "unknown"),
        (429, DONE, "unknown"),
        (301, DONE, "unknown"),
        (429, {"status": "pending"}, "unknown"),
        (400, {"status": "pending"} | error("x"), "unknown"),
        # A 200 that refuses, or that is no answer of the API.
        (200, {"status": "failed", "reference": "ref-1"}, "unknown"),
        (200, {"status": "SUCCEEDED", "reference": "ref-1"}, "unknown"),
        (200, {"status": ["succeeded"], "reference": "ref-1"}, "unknown"),
        (200, error("insufficient_balance"), "unknown"),
        (200, [DONE], "unknown"),
        (200, "succeeded", "unknown"),
        (200, {}, "unknown"),
        (200, PAGE, "unknown"),
        # accepted
        (202, ACCEPTED, "accepted"),
        # The contract repeats our key: another's answer is no answer to this order.
        (201, DONE | {"idempotencyKey": "app:r-2"}, "unknown"),
        (201, DONE | {"idempotencyKey": None}, "unknown"),
        (201, {"status": "succeeded", "reference": "ref-1"}, "unknown"),
        (202, ACCEPTED | {"idempotencyKey": "app:r-10"}, "unknown"),
        (202, {"status": "accepted"}, "unknown"),
        (200, ACCEPTED | {"status": "pending", "reference": "r"}, "accepted"),
        (201, ACCEPTED | {"status": "processing"}, "accepted"),
        (202, {}, "unknown"),
        (202, PAGE, "unknown"),
        (500, {"status": "accepted"}, "unknown"),
        # same reference: never a no
        (409, error("reference_used"), "same_reference"),
        (422, error("reference_used"), "same_reference"),
        (400, error("key_reused"), "same_reference"),
        (500, error("reference_used"), "unknown"),
        # same content
        (409, error("similar_recently"), "same_content"),
        (422, error("similar_recently"), "no"),
        # retry
        (429, PAGE, "retry"),
        (429, error("anything"), "retry"),
        # no: only with the API's own error document
        (400, error("invalid_number"), "no"),
        (402, error("insufficient_balance"), "ours"),
        (404, error("no_such_subscriber"), "no"),
        (422, error("blocked"), "no"),
        (400, PAGE, "unknown"),
        (402, PAGE, "ours"),
        (422, PAGE, "unknown"),
        (400, {"error": {}}, "unknown"),
        (400, {"error": {"code": ""}}, "unknown"),
        (400, {"error": "blocked"}, "unknown"),
        (402, {"error": {"code": None}}, "ours"),
        # A gateway's own page, with its status as a number.
        (400, {"error": {"code": 400}}, "unknown"),
        (422, {"error": {"code": 422}}, "unknown"),
        (404, {"error": {"code": 404}}, "ours"),
        # ours
        (401, PAGE, "ours"),
        (401, error("unauthorized"), "ours"),
        (403, error("forbidden"), "ours"),
        (404, PAGE, "ours"),
        (404, {}, "ours"),
        (404, {"error": {"code": ""}}, "ours"),
        (301, PAGE, "ours"),
        (302, PAGE, "unknown"),
        (303, PAGE, "unknown"),
        (307, PAGE, "ours"),
        (308, PAGE, "ours"),
        # unknown: everything else
        (405, error("method"), "unknown"),
        (408, error("timeout"), "unknown"),
        (409, PAGE, "unknown"),
        (409, error("in_progress"), "unknown"),
        (410, error("gone"), "unknown"),
        (413, error("too_large"), "unknown"),
        (425, PAGE, "unknown"),
        (500, error("insufficient_balance"), "unknown"),
        (502, PAGE, "unknown"),
        (503, PAGE, "unknown"),
        (503, error("unavailable"), "unknown"),
        (504, PAGE, "unknown"),
        (100, PAGE, "unknown"),
        (304, PAGE, "unknown"),
    ],
)
def test_status_and_body_together_are_classified(
    status: int, document: object, expected: str
) -> None:
    assert classified(status, document) is AnswerClass(expected)


@given(
    status=st.integers(100, 599),
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["status", "reference", "error", "code", "x"]), inner
            )
        ),
    ),
)
def test_no_answer_is_done_but_a_success_with_a_reference(
    status: int, document: object
) -> None:
    answer = profile().classify(status, document, KEY)

    assert answer.http_status == status
    if answer.classified is AnswerClass.DONE:
        assert isinstance(document, dict)
        assert status in {200, 201}
        assert document["status"] == "succeeded"
        assert answer.reference
    if answer.classified is AnswerClass.NO:
        assert status in {400, 404, 422}


def test_reference_reason_and_words_are_taken_from_their_places() -> None:
    done = profile().classify(201, DONE, KEY)
    no = profile().classify(
        422, error("blocked", "Number +41791234567 is blocked"), KEY
    )

    assert (done.reference, done.words) == ("ref-1", "")
    assert (no.reason, no.reference) == ("blocked", None)
    assert no.words == "Number +41791234567 is blocked"


@pytest.mark.parametrize(
    "code",
    ["+41791234567", "see +41791234567", "", 5, None, "a" * 65, "a b", "é", "a\n"],
)
def test_reason_is_never_foreign_text(code: object) -> None:
    """Reasons are logged and answered; an API may write a number into its code."""
    answer = profile().classify(422, {"error": {"code": code}}, KEY)

    assert answer.reason == "http_422"


def test_foreign_text_is_bounded() -> None:
    answer = profile().classify(200, DONE | {"reference": "r" * 900}, KEY)
    words = profile().classify(422, error("blocked", "w" * 900), KEY).words

    assert answer.reference == "r" * 200
    assert len(words) == 500


def test_first_rule_that_matches_decides(tmp_path: Path) -> None:
    head, rules = GENERIC.split("# The first rule that matches", 1)
    first = '[[answer.rules]]\nclass = "unknown"\nstatus = [200]\n\n#'
    own = from_text(tmp_path, head + first + rules)

    assert own.classify(200, DONE, KEY).classified is AnswerClass.UNKNOWN
    assert own.classify(201, DONE, KEY).classified is AnswerClass.DONE


# ---- look-ups -----------------------------------------------------------------------


def row(status: object = "succeeded", key: object = KEY, **more: object) -> Any:
    return {"idempotencyKey": key, "status": status, "reference": "ref-1"} | more


def found(*rows: object, status: int = 200) -> tuple[Finding, str | None]:
    look_up = profile().read_look_up(status, {"recharges": list(rows)}, KEY)
    return look_up.finding, look_up.reference


def test_look_up_finds_what_became_of_our_key() -> None:
    assert found(row()) == (Finding.EXECUTED, "ref-1")
    assert found(row("failed"))[0] is Finding.FAILED
    assert found(row("pending")) == (Finding.PENDING, "ref-1")
    assert found() == (Finding.ABSENT, None)


def test_rows_of_other_keys_do_not_count() -> None:
    """Also not of one that differs in case, or that ours begins."""
    others = [row(key="app:r-2"), row(key="APP:R-1"), row(key="app:r-11")]

    # Alone they are no absence: the list may be another's, or of one page.
    assert found(*others) == (Finding.UNKNOWN, None)
    assert found() == (Finding.ABSENT, None)
    assert found(*others, row("failed"))[0] is Finding.FAILED
    assert found(*others, row(reference="x")) == (Finding.EXECUTED, "x")


@pytest.mark.parametrize("key", [None, "", {}, [], True])
def test_row_without_a_key_is_no_proof_of_absence(key: object) -> None:
    assert found(row(key=key))[0] is Finding.UNKNOWN
    assert found("text")[0] is Finding.UNKNOWN
    assert found({"status": "succeeded"})[0] is Finding.UNKNOWN


def test_several_executions_are_an_alarm() -> None:
    assert found(row(), row())[0] is Finding.SEVERAL
    assert found(row(), row("failed"), row("pending"))[0] is Finding.EXECUTED


def test_what_may_still_be_executed_is_not_failed() -> None:
    assert found(row("failed"), row("pending"))[0] is Finding.PENDING
    assert found(row("failed"), row("odd"))[0] is Finding.UNKNOWN
    assert found(row("pending"), row("odd"))[0] is Finding.UNKNOWN


@pytest.mark.parametrize("status", ["odd", "", None, 5, "SUCCEEDED", [], {}])
def test_unknown_status_of_a_row_teaches_nothing(status: object) -> None:
    assert found(row(status))[0] is Finding.UNKNOWN


@pytest.mark.parametrize("status", [201, 204, 206, 302, 400, 401, 404, 429, 500, 503])
def test_look_up_that_is_not_200_teaches_nothing(status: int) -> None:
    assert found(status=status)[0] is Finding.UNKNOWN
    assert found(row(), status=status)[0] is Finding.UNKNOWN


@pytest.mark.parametrize(
    "document", [None, {}, [], "x", {"recharges": None}, {"recharges": {}}, [row()]]
)
def test_look_up_that_is_no_list_teaches_nothing(document: object) -> None:
    look_up = profile().read_look_up(200, document, KEY)

    assert (look_up.finding, look_up.reason) == (Finding.UNKNOWN, "http_200")


def test_api_without_look_up_teaches_nothing(tmp_path: Path) -> None:
    own = from_text(tmp_path, GENERIC.split("[look_up]")[0])

    empty = own.read_look_up(200, {"recharges": []}, KEY)

    assert empty.finding is Finding.UNKNOWN


# ---- keys and templates -------------------------------------------------------------


def test_key_is_rendered_as_it_is() -> None:
    assert profile().render_key(KEY) == KEY
    assert profile().render_key("k" * 200) == "k" * 200


def test_key_too_long_for_the_api_is_hashed_to_fit(tmp_path: Path) -> None:
    own = from_text(tmp_path, GENERIC.replace("length_max = 200", "length_max = 20"))

    assert own.render_key("k" * 20) == "k" * 20
    assert own.render_key("k" * 21) == sha256(b"k" * 21).hexdigest()[:20]
    assert own.render_key("k" * 22) != own.render_key("k" * 21)


@given(key=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_key_as_uuid_is_the_same_for_the_same_order(key: str) -> None:
    own = replace(profile(), key_render="uuid4")

    rendered = uuid.UUID(own.render_key(key))

    assert rendered.version == 4
    assert str(rendered) == own.render_key(key)
    assert own.render_key(f"{key}x") != str(rendered)


def test_key_as_uuid_is_chosen_in_the_file(tmp_path: Path) -> None:
    own = from_text(tmp_path, GENERIC.replace('"as_is"', '"uuid4"'))

    assert uuid.UUID(own.render_key(KEY)).version == 4


def test_template_of_one_field_keeps_its_type() -> None:
    values = template_values(TOPUP, "rendered")

    assert render("{amount_minor}", values) == 500
    assert render("{donor_msisdn}", values) is None
    assert render("{amount_minor} {currency}", values) == "500 CHF"
    assert render("plain", values) == "plain"
    assert render("{key}", template_values(None, "rendered")) == "rendered"


# ---- loading ------------------------------------------------------------------------


def test_generic_profile_is_the_default_and_assumes_nothing() -> None:
    assert (profile().name, profile().kind) == ("generic", Kind.NONE)


def test_settings_stand_above_the_profile() -> None:
    own = profile(
        RECHARGE_API_KIND="replay",
        RECHARGE_API_REPLAY_WINDOW_S="60",
        RECHARGE_API_SETTLE_S="31",
    )

    assert (own.kind, own.window_s, own.settle_s) == (Kind.REPLAY, 60, 31)


def test_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="RECHARGE_API_KIND"):
        profile(RECHARGE_API_KIND="maybe")
    message = refusal(tmp_path, GENERIC.replace('kind = "none"', 'kind = "maybe"', 1))
    assert "RECHARGE_API_PROFILE" in message


def test_unknown_profile_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(SettingsError, match=r"RECHARGE_API_PROFILE.*generic"):
        profile(RECHARGE_API_PROFILE="nobody")


@pytest.mark.parametrize("kind", ["refuse", "lookup"])
def test_kind_that_asks_needs_a_look_up(tmp_path: Path, kind: str) -> None:
    without = GENERIC.split("[look_up]")[0]

    message = refusal(tmp_path, without, RECHARGE_API_KIND=kind)

    assert "RECHARGE_API_KIND" in message
    assert "[look_up]" in message
    assert from_text(tmp_path, GENERIC, RECHARGE_API_KIND=kind).kind == kind
    assert from_text(tmp_path, without, RECHARGE_API_KIND="replay").look_up is None


@pytest.mark.parametrize("kind", ["refuse", "lookup"])
@pytest.mark.parametrize("settle_s", ["19", "20"])
def test_settling_time_within_the_lease_is_refused(kind: str, settle_s: str) -> None:
    """A look-up may not count as proof while the attempt can still send."""
    with pytest.raises(SettingsError) as refused:
        profile(RECHARGE_API_KIND=kind, RECHARGE_API_SETTLE_S=settle_s)

    assert "RECHARGE_API_SETTLE_S" in str(refused.value)
    assert "LEDGER_LEASE_MARGIN_S" in str(refused.value)
    assert profile(RECHARGE_API_KIND=kind, RECHARGE_API_SETTLE_S="21").settle_s == 21


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('class = "done"', 'class = "fine"'),
        ('render = "as_is"', 'render = "upper"'),
        ('path = "/recharges"', ""),
        ("settle_s = 120", 'settle_s = "soon"'),
        ("[answer]", "[answers]"),
        ("[key]", "[key"),
        ('msisdn = "{msisdn}"', 'msisdn = "{number}"'),
        ("{ idempotencyKey", '{ msisdn = "{msisdn}", idempotencyKey'),
    ],
)
def test_broken_profile_is_refused_at_start(tmp_path: Path, old: str, new: str) -> None:
    assert old in GENERIC

    message = refusal(tmp_path, GENERIC.replace(old, new))

    assert message.startswith("RECHARGE_API_PROFILE")
    assert "own.toml" in message


def test_every_field_that_a_template_may_name_is_there(tmp_path: Path) -> None:
    for name in template_values(TOPUP, "rendered"):
        own = from_text(tmp_path, GENERIC.replace("{requested_at}", f"{{{name}}}"))
        assert own.request.body["requestedAt"] == f"{{{name}}}"


@pytest.mark.parametrize(
    ("old", "new", "table", "said"),
    [
        ("where = {", "whre = {", "[answer.rules number 1]", "'whre' (did you mean"),
        ("settle_s = 120", "settle = 120", "the file", "must have 'settle_s'"),
        ("[key]", "extra = 1\n[key]", "the file", "'extra'"),
        ('render = "as_is"', 'rendr = "as_is"', "[key]", "must have 'render'"),
        ("length_max = 200", "length_max = 0", "[key]", "from 16 to 200"),
        ("length_max = 200", "length_max = true", "[key]", "from 16 to 200"),
        ("window_s = 86400", "window_s = -1", "the file", "'window_s'"),
        ("window_s = 86400", "window_s = inf", "the file", "'window_s'"),
        ('method = "POST"', 'method = "PO ST"', "[request]", "'method'"),
        ('method = "POST"', 'method = "POST"\nbdy = {}', "[request]", "'bdy'"),
        ('path = "/recharges"', 'path = "recharges"', "[request]", "'path'"),
        ('path = "/recharges"', 'path = "/a/../b"', "[request]", "'path'"),
        ('path = "/recharges"', 'path = "/a?b=c"', "[request]", "'path'"),
        ('Key = "{key}"', "Key = 7", "[request.headers]", "must be a text"),
        ("status = [429]", "status = []", "[answer.rules number 5]", "'status'"),
        ("status = [429]", "status = [42]", "[answer.rules number 5]", "'status'"),
        ("status = [429]", 'status = ["429"]', "[answer.rules number 5]", "'status'"),
        (
            'has = ["reference"]',
            'has = "reference"',
            "[answer.rules number 1]",
            "'has'",
        ),
        ('["succeeded"]\nfailed', '["succeeded"]\nfaild', "[look_up]", "'failed'"),
        ('rows = "recharges"', "rows = 7", "[look_up]", "'rows'"),
        ('reversed = "reversed"', 'revrsed = "reversed"', "[look_up]", "'revrsed'"),
    ],
)
def test_profile_with_what_nobody_knows_is_refused_by_its_place(
    tmp_path: Path, old: str, new: str, table: str, said: str
) -> None:
    """A name that is left out in silence makes the rest mean something else."""
    assert old in GENERIC

    message = refusal(tmp_path, GENERIC.replace(old, new, 1))

    assert message.startswith("RECHARGE_API_PROFILE")
    for part in ("own.toml", table, said):
        assert part in message


@pytest.mark.parametrize("after", ["refuse", "lookup"])
def test_settling_time_within_the_lease_is_refused_where_it_counts_after_the_window(
    tmp_path: Path, after: str
) -> None:
    text = GENERIC.replace(
        'kind_after_window = "none"', f'kind_after_window = "{after}"'
    ).replace("settle_s = 120", "settle_s = 20")

    message = refusal(tmp_path, text, RECHARGE_API_KIND="replay")

    assert "RECHARGE_API_SETTLE_S" in message
    assert "LEDGER_LEASE_MARGIN_S" in message


def test_contradiction_says_so() -> None:
    answer = profile().classify(429, DONE, KEY)

    assert answer.classified is AnswerClass.UNKNOWN
    assert answer.reason == "answer_contradicts_itself"


def test_answer_of_another_key_says_so_and_gives_no_reference() -> None:
    answer = profile().classify(201, DONE | {"idempotencyKey": "app:r-2"}, KEY)

    assert (answer.reason, answer.reference) == ("answer_of_another_key", None)


def test_key_is_compared_only_where_the_api_repeats_it(tmp_path: Path) -> None:
    own = from_text(tmp_path, GENERIC.replace('key = "idempotencyKey"\n', ""))

    answer = own.classify(201, DONE | {"idempotencyKey": "app:r-2"}, KEY)
    assert answer.classified is AnswerClass.DONE


@pytest.mark.parametrize(
    ("env", "identity"),
    [
        ({"RECHARGE_API_URL": "https://api.example"}, "generic@api.example"),
        ({"RECHARGE_API_URL": "http://API.example/"}, "generic@api.example"),
        ({"RECHARGE_API_URL": "http://a:8080/v1/"}, "generic@a:8080/v1"),
        # What stands before the host is a secret.
        ({"RECHARGE_API_URL": "https://me:hunter2@a/v1"}, "generic@a/v1"),
        ({"RECHARGE_API_IDENTITY": "acme-live"}, "acme-live"),
    ],
)
def test_api_has_a_name_in_the_ledger(env: dict[str, str], identity: str) -> None:
    assert profile(**env).identity == identity


def test_api_without_an_address_is_named_by_its_profile() -> None:
    ledger_only = Settings.ledger_only({"LEDGER_DATABASE_URL": "sqlite://"})

    assert load_profile(ledger_only).identity == "generic"


@pytest.mark.parametrize("url", [f"http://a/{'x' * 200}", "http://a/caf\u00e9"])
def test_address_that_makes_no_name_asks_for_one(url: str) -> None:
    with pytest.raises(SettingsError, match="RECHARGE_API_IDENTITY is missing"):
        profile(RECHARGE_API_URL=url)
    named = profile(RECHARGE_API_URL=url, RECHARGE_API_IDENTITY="a")
    assert named.identity == "a"

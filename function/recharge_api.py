"""REST client of the recharge API: one call, one hard deadline, one Answer.

Translates whatever the libraries raise; what an answer means, the profile says, and how
it is fetched, http_exchange.py.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from http import client as http_client
from typing import Any, Final

import requests
from urllib3.exceptions import HTTPError

from function.api_auth import AuthenticationSlow, Authenticator, NotAuthenticated
from function.api_profile import (
    ApiProfile,
    RequestTemplate,
    render,
    render_path,
    template_values,
)
from function.config import Settings
from function.http_answer import UncertainAnswer
from function.http_exchange import Call, Reply, Transport
from function.json_bound import has_too_many_values
from function.model import Answer, AnswerClass, Finding, LookUp, TopUp
from function.retry_after import wait_s

#: Every error of requests and what it is called in the ledger and the logs. Whether
#: anything was sent, and so what the answer means, the connection's flag says.
#: The first class that fits counts; a test fails when a class is missing.
REASON_OF_ERROR: Final[tuple[tuple[type[Exception], str], ...]] = (
    (requests.exceptions.ConnectTimeout, "connect_timeout"),
    (requests.exceptions.ReadTimeout, "read_timeout"),
    (requests.exceptions.Timeout, "timeout"),
    (requests.exceptions.SSLError, "tls_error"),
    (requests.exceptions.ProxyError, "proxy_error"),
    (requests.exceptions.ChunkedEncodingError, "answer_cut"),
    (requests.exceptions.ContentDecodingError, "answer_undecodable"),
    (requests.exceptions.StreamConsumedError, "answer_cut"),
    (requests.exceptions.ConnectionError, "connection_error"),
    (requests.exceptions.TooManyRedirects, "redirect"),
    (requests.exceptions.RetryError, "retries"),
    (requests.exceptions.JSONDecodeError, "answer_not_json"),
    (requests.exceptions.InvalidHeader, "invalid_header"),
    (requests.exceptions.InvalidProxyURL, "invalid_url"),
    (requests.exceptions.InvalidURL, "invalid_url"),
    (requests.exceptions.InvalidSchema, "invalid_url"),
    (requests.exceptions.MissingSchema, "invalid_url"),
    (requests.exceptions.InvalidJSONError, "invalid_body"),
    (requests.exceptions.UnrewindableBodyError, "invalid_body"),
    (requests.exceptions.URLRequired, "invalid_url"),
    (requests.exceptions.HTTPError, "http_error"),
    (requests.exceptions.RequestException, "request_error"),
    (HTTPError, "connection_error"),
    (UncertainAnswer, "answer_uncertain"),
    (http_client.HTTPException, "connection_error"),
    (OSError, "connection_error"),
    # Keys and tokens are ASCII; anything else can't become a header.
    (UnicodeError, "invalid_header"),
)


class RechargeApi:
    """The recharge API behind one base address; safe to share between threads.

    Args:
        settings: address, time limits and certificates.
        profile: builds requests and classifies answers.
        authenticate: adds the credentials to a request's headers.
        monotonic: the pod's clock, in seconds; leases are never measured by it.

    """

    def __init__(
        self,
        settings: Settings,
        profile: ApiProfile,
        authenticate: Authenticator,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = settings.recharge_api_url.rstrip("/")
        self._profile = profile
        self._authenticate = authenticate
        self._monotonic = monotonic
        self._timeout_s = settings.recharge_api_timeout_s
        ca_file = settings.recharge_api_tls_ca_file
        self._transport = Transport(
            connections_max=settings.server_threads,
            idle_s=settings.recharge_api_idle_s,
            timeout_s=settings.recharge_api_timeout_s,
            verify=str(ca_file) if ca_file else True,
        )

    def recharge(self, order: TopUp, rendered_key: str, deadline: float) -> Answer:
        """Send the order once and say how it ended; raises nothing.

        Args:
            order: what to recharge.
            rendered_key: the key as it was stored before this send.
            deadline: moment on the monotonic clock at which the call is cut, and
                after which nothing is sent.

        Returns unknown for whatever the profile doesn't name, and a retry class
        with `is_sent=False` only when no byte of the request left.

        """
        call = Call(deadline, self._monotonic)
        values = template_values(order, rendered_key)
        try:
            reply = self._exchange(self._profile.request, values, call)
            answer = self._profile.classify(
                reply.status, _json(reply.body), rendered_key
            )
        except NotAuthenticated as error:
            is_slow = isinstance(error, AuthenticationSlow)
            classified = AnswerClass.RETRY if is_slow else AnswerClass.OURS
            return Answer(classified, is_sent=False, reason=error.reason)
        # What an answer may make a library raise has no end; whether anything was
        # sent, and so whether it may be sent again, the connection's flag says.
        except Exception as error:  # noqa: BLE001
            return _answer_of_error(error, call)
        wait = wait_s(reply.headers.get("Retry-After"), datetime.now(UTC))
        return replace(answer, retry_after_s=wait)

    def look_up(self, rendered_key: str) -> LookUp:
        """Ask what became of our key; whatever fails is an unknown finding."""
        rules = self._profile.look_up
        if rules is None:
            return LookUp(Finding.UNKNOWN, reason="no_look_up")
        call = Call(self._monotonic() + self._timeout_s, self._monotonic)
        values = template_values(None, rendered_key)
        try:
            reply = self._exchange(rules.request, values, call)
            document = _json(reply.body)
            return self._profile.read_look_up(reply.status, document, rendered_key)
        except NotAuthenticated as error:
            return LookUp(Finding.UNKNOWN, reason=error.reason)
        except Exception as error:  # noqa: BLE001 # As in `recharge`.
            return LookUp(Finding.UNKNOWN, reason=_answer_of_error(error, call).reason)

    def check_credentials(self) -> None:
        """Get credentials, and send nothing to the API.

        Raises:
            NotAuthenticated: there are none.

        """
        call = Call(self._monotonic() + self._timeout_s, self._monotonic)
        self._authenticate({}, self._transport, call)

    def close(self) -> None:
        """Close every connection, and end the thread that watches them."""
        self._transport.close()

    def _exchange(
        self, template: RequestTemplate, values: dict[str, Any], call: Call
    ) -> Reply:
        body = {name: render(text, values) for name, text in template.body.items()}
        body = {name: value for name, value in body.items() if value is not None}
        headers = {
            name: render(text, values) for name, text in template.headers.items()
        }
        self._authenticate(headers, self._transport, call)
        reply = self._transport.exchange(
            call,
            requests.Request(
                template.method,
                self._base + render_path(template.path, values),
                params={n: render(text, values) for n, text in template.query.items()},
                json=body or None,
                headers=headers,
            ),
        )
        if reply.status == http_client.UNAUTHORIZED:
            self._authenticate.forget()
        return reply


def _json(body: bytes | None) -> object:
    """The body as JSON, or None if it is none, too long, or has too many values."""
    if body is None or has_too_many_values(body):
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _answer_of_error(error: Exception, call: Call) -> Answer:
    """Translate a failure: the connection's flag says whether anything was sent."""
    unforeseen = "answer_unreadable" if call.is_sent else "request_failed"
    named = (name for kind, name in REASON_OF_ERROR if isinstance(error, kind))
    reason = next(named, unforeseen)
    if call.is_over():
        reason = "deadline"
    classified = AnswerClass.UNKNOWN if call.is_sent else AnswerClass.RETRY
    return Answer(classified, is_sent=call.is_sent, reason=reason)

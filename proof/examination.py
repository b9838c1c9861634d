"""One function at its front door: what is sent, what comes back, what is then true.

Owns the conversation and the evidence (ledger, book, log, process); what is allowed,
proof/door_judge.py says. Must never write to the ledger, the book or the log.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, select

from demo.book import BookEntry
from function.schema import quarantine, topup
from proof.bent_requests import (
    Exchange,
    Request,
    delivery_of,
    heaviest_orders,
    new_order,
    too_heavy_events,
)
from proof.door_judge import (
    FILES_MORE_MAX,
    Footprint,
    Found,
    judge_answer,
    judge_growth,
    judge_log,
    judge_order,
    judge_peak,
    judge_silence,
)
from proof.raw_client import (
    PATIENCE_S,
    Answer,
    Connection,
    Silent,
    UnreadableAnswer,
)

_OK: Final = 200
_POLL_S: Final = 0.1
#: More than the function has threads.
_HEAVY_CONNECTIONS: Final = 16
#: Of each heavy order.
_HEAVY_ROUNDS: Final = 8


class Evidence:
    """What the ledger, the book and the log show, read on from where it was left.

    Args:
        engine: of the ledger.
        book: the file of the recharge API's book.
        log: the function's log.

    """

    def __init__(self, engine: Engine, book: Path, log: Path) -> None:
        self._engine = engine
        self._book, self._log = _Tail(book), _Tail(log)
        self._executions: Counter[str] = Counter()
        self._quarantined: set[tuple[str, bytes]] = set()
        self._last_row = 0
        # The first orders come from several threads.
        self._lock = threading.Lock()

    def read(self) -> None:
        """Take in what the book and quarantine have more than before."""
        with self._lock:
            self._read()

    def _read(self) -> None:
        for line in self._book.lines():
            entry = BookEntry.from_json(line)
            if entry.entry == "executed":
                self._executions[entry.key] += 1
        rows = select(quarantine.c.id, quarantine.c.outcome, quarantine.c.raw)
        with self._engine.connect() as connection:
            newer = rows.where(quarantine.c.id > self._last_row)
            for number, outcome, raw in connection.execute(newer):
                self._last_row = max(self._last_row, number)
                self._quarantined.add((outcome, sha256(raw).digest()))

    def log_lines(self) -> Iterator[str]:
        """The lines that the log has more than before."""
        for line in self._log.lines():
            yield line.decode("utf-8", "replace")

    def is_quarantined(self, raw: bytes, outcome: str) -> bool:
        """Whether quarantine holds these bytes under this outcome."""
        return (outcome, sha256(raw).digest()) in self._quarantined

    def status_of(self, key: str) -> str | None:
        """The status of an order in the ledger."""
        row = select(topup.c.status).where(topup.c.idempotency_key == key)
        with self._engine.connect() as connection:
            status: str | None = connection.execute(row).scalar()
        return status

    def executions(self, key: str) -> int:
        """How often the book says that an order was executed."""
        return self._executions[key]

    @property
    def doubles(self) -> list[str]:
        """The keys that the book shows more than once."""
        return [key for key, times in self._executions.items() if times > 1]

    @property
    def executed(self) -> int:
        """How many orders the book shows."""
        return len(self._executions)

    @property
    def quarantined(self) -> int:
        """How many different bodies and outcomes quarantine shows."""
        return len(self._quarantined)


class _Tail:
    """The whole lines that a file has more than before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0

    def lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._place)
            *lines, _ = file.read().split(b"\n")
        self._place += sum(len(line) + 1 for line in lines)
        return lines


class Examination:
    """Talks to one server, and holds what it does against the contract.

    Args:
        port: of the server, on this machine.
        evidence: what its ledger, its API's book and its log show.

    """

    def __init__(self, port: int, evidence: Evidence) -> None:
        self._port = port
        self._evidence = evidence
        #: How many requests of each kind were sent.
        self.sent: Counter[str] = Counter()
        #: How often each status came; 0: closed without an answer.
        self.answered: Counter[int] = Counter()
        #: The keys of the good orders that were judged.
        self.orders: set[str] = set()
        self._planted = 0

    def examine(self, exchange: Exchange) -> None:
        """Play one exchange, then deliver a good order; judge all of it.

        Raises:
            Found: a rule is broken.

        """
        with Connection(self._port) as connection:
            answers = self._play(connection, exchange)
            pairs = list(zip(exchange.requests, answers, strict=False))
            self._evidence.read()
            for request, answer in pairs:
                self._judge(request, answer)
            is_open = (
                exchange.ending == "keep"
                and len(answers) == len(exchange.requests)
                and not any(answer is None or answer.closes for answer in answers)
            )
            # The same connection, where the server wants to keep it.
            after = delivery_of(new_order(), "good order afterwards")
            answer = self._deliver(connection, after) if is_open else None
        if answer is None:
            self.deliver(after)
        self._bring_again(exchange, answers)
        self._read_log()

    def deliver(self, request: Request) -> None:
        """Deliver a good order on a connection of its own, and judge it.

        Raises:
            Found: it is not executed exactly once, or not at once.

        """
        with Connection(self._port) as connection:
            if self._deliver(connection, request) is None:
                raise Found("a good order is not answered on a new connection")

    def finish(self, process: int, before: Footprint) -> Footprint:
        """Stall every thread, give each the heaviest order, and judge what is true.

        Returns what the process then holds.

        Raises:
            Found: a rule is broken.

        """
        self._stall_every_thread(before.threads)
        self.deliver(delivery_of(new_order(), "last good order"))
        self._evidence.read()
        if self._evidence.doubles:
            raise Found(f"{len(self._evidence.doubles)} orders were executed again")
        end_s = time.monotonic() + PATIENCE_S
        after = footprint_of(process)
        # It may be about to close what we have closed.
        while after.files > before.files + FILES_MORE_MAX and time.monotonic() < end_s:
            time.sleep(_POLL_S)
            after = footprint_of(process)
        judge_growth(before, after)
        self._press()
        self._read_log()
        ever = footprint_of(process)
        judge_peak(ever)
        return replace(after, peak_kib=ever.peak_kib)

    def _stall_every_thread(self, threads: int) -> None:
        """A good order behind as many heads without an end as could be read at once.

        Raises:
            Found: it is not served, or they are answered.

        """
        with ExitStack() as stack:
            stalled = [
                stack.enter_context(Connection(self._port)) for _ in range(threads)
            ]
            for connection in stalled:
                connection.send((b"POST / HTTP/1.1\r\nHo",))
            self.sent["stalled head"] += threads
            self.deliver(delivery_of(new_order(), "good order behind stalled heads"))
            for connection in stalled:
                try:
                    is_closed = connection.is_closed()
                except Silent:
                    raise Found(
                        "a head that stalls is waited for without end"
                    ) from None
                if not is_closed:
                    raise Found("a head that has no end is answered")
                self.answered[0] += 1

    def _press(self) -> None:
        """Have every thread read what takes the most memory, at the same time.

        Raises:
            Found: an order is not executed exactly once.

        """
        rounds = range(_HEAVY_ROUNDS)
        orders = [each for _ in rounds for each in heaviest_orders()]
        events = [each for _ in rounds for each in too_heavy_events()]
        with ThreadPoolExecutor(_HEAVY_CONNECTIONS) as pool:
            list(pool.map(self.deliver, orders))
            list(pool.map(self._have_refused, events))

    def _have_refused(self, request: Request) -> None:
        with Connection(self._port) as connection:
            self.sent[request.kind] += 1
            connection.send(request.pieces)
            answer = _answer(connection, request)
        self.answered[answer.status if answer else 0] += 1
        self._evidence.read()
        self._judge(request, answer)

    def _play(self, connection: Connection, exchange: Exchange) -> list[Answer | None]:
        """The answers, in order; shorter than the requests where it was closed."""
        answers: list[Answer | None] = []
        requests = exchange.requests
        self.sent.update(request.kind for request in requests)
        self._planted += sum(request.is_planted for request in requests)
        if exchange.is_pipelined or exchange.ending == "vanish":
            for request in requests:
                connection.send(request.pieces, request.pause_s)
            if exchange.ending == "vanish":
                connection.vanish()
                return []
        for index, request in enumerate(requests):
            if not exchange.is_pipelined:
                connection.send(request.pieces, request.pause_s)
            if exchange.ending == "end" and index == len(requests) - 1:
                connection.end()
            answer = _answer(connection, request)
            answers.append(answer)
            self.answered[answer.status if answer else 0] += 1
            if answer is None:
                break
            if answer.closes or request.body is None:
                _require_closed(connection, request)
                break
        return answers

    def _judge(self, request: Request, answer: Answer | None) -> None:
        try:
            if answer is None:
                judge_silence(request)
            else:
                judge_answer(request, answer, self._evidence)
        except Found as found:
            shown = answer.raw[:400] if answer else b"the end of the connection"
            raise Found(f"{found}\nsent: {request!r}\ncame: {shown!r}") from None

    def _judge_order(self, request: Request) -> None:
        self.orders.add(request.key)
        judge_order(request, self._evidence)

    def _deliver(self, connection: Connection, request: Request) -> Answer | None:
        self.sent[request.kind] += 1
        connection.send(request.pieces)
        answer = _answer(connection, request)
        self.answered[answer.status if answer else 0] += 1
        if answer is not None:
            self._evidence.read()
            self._judge(request, answer)
            self._judge_order(request)
        return answer

    def _bring_again(self, exchange: Exchange, answers: list[Answer | None]) -> None:
        """Deliver what was not answered again, as the source would, to its end.

        Raises:
            Found: an order was not executed exactly once, or does not come to an end.

        """
        for index, request in enumerate(exchange.requests):
            if request.order is None:
                continue
            if index < len(answers) and answers[index] is not None:
                self._judge_order(request)
                continue
            end_s = time.monotonic() + PATIENCE_S
            again = delivery_of(request.order)
            # It may be under way.
            while not self._is_done(again):
                if time.monotonic() > end_s:
                    raise Found(f"a good order is never done: {request!r}")
                time.sleep(_POLL_S)
            self.deliver(again)

    def _is_done(self, request: Request) -> bool:
        with Connection(self._port) as connection:
            self.sent["redelivery"] += 1
            connection.send(request.pieces)
            answer = _answer(connection, request)
        return answer is not None and answer.status == _OK

    def _read_log(self) -> None:
        for line in self._evidence.log_lines():
            self._planted -= judge_log(line, planted=self._planted)


def footprint_of(process: int) -> Footprint:
    """What a process holds now."""
    place = Path(f"/proc/{process}")
    lines = (place / "status").read_text("utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return Footprint(
        rss_kib=int(status["VmRSS"].split()[0]),
        files=len(list((place / "fd").iterdir())),
        threads=int(status["Threads"]),
        peak_kib=int(status["VmHWM"].split()[0]),
    )


def _answer(connection: Connection, request: Request) -> Answer | None:
    try:
        return connection.answer(has_body=request.method != b"HEAD")
    except (UnreadableAnswer, Silent) as error:
        raise Found(f"{error}\nsent: {request!r}") from None


def _require_closed(connection: Connection, request: Request) -> None:
    """Nothing may follow an answer that ends the connection."""
    try:
        is_closed = connection.is_closed()
    except Silent:
        is_closed = False
    if not is_closed:
        raise Found(
            f"a connection goes on that may not be used again\nsent: {request!r}"
        )

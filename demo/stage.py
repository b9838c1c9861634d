"""The stage: every part of the story, started, broken, restarted and stopped.

Owns the parts' life and the folder in which they leave their traces; must never know
what a scene is about. Whatever way the story ends, nothing of it lives on.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import requests

from demo.book import Book, BookEntry
from demo.dead_letter_sink import DeadLetterSink
from demo.delivery import Delivery
from demo.grounds import Grounds
from demo.judge import Delivered, LedgerView, Sent, place_in_topic, place_of_bytes
from demo.kafka_source import KafkaSource
from demo.processes import (
    FunctionPart,
    Part,
    PartFailed,
    RechargeApiPart,
    ResolverPart,
    SourcePart,
)
from demo.producers import App, Records, Shape, write_dead_letters
from demo.server_process import PROJECT, free_port
from demo.subject import DEADLINES, GROUP, Subject

#: A retry budget of 11 s: longer than every outage of the story, short enough that
#: the source is seen to give up. In a cluster it outlasts the topic's retention.
RETRY: Final = 10
BACKOFF_DELAY_S: Final = 0.2
DELIVERY_TIMEOUT_S: Final = float(DEADLINES["EVENT_DELIVERY_TIMEOUT_S"])
#: Whatever is waited for comes within seconds; only a naive handler needs them all.
TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02
_HTTP_MULTIPLE_CHOICES: Final = 300


class Stage:
    """All parts of one run; a context manager.

    Args:
        directory: gets every log, the book, the ledger and the journals.
        grounds: the broker and the database.
        subject: who is on trial.

    """

    def __init__(self, directory: Path, grounds: Grounds, subject: Subject) -> None:
        self.directory = directory
        self.grounds = grounds
        self.subject = subject
        self.records = Records()
        self._book = Book(directory / "book.jsonl")
        self._crash_file = directory / "crash-point"
        self.api = RechargeApiPart(directory / "recharge-api.log", book=self._book.path)
        self.function = FunctionPart(
            directory / "function.log",
            source=subject.source_with_crash_points,
            signature=subject.signature,
        )
        self.resolver = ResolverPart(directory / "resolver.log")
        self._dead_letters = DeadLetterSink(
            directory / "dead-letters.jsonl", port=free_port()
        )
        self._source: KafkaSource | None = None
        #: What kind of API is played.
        self._kind = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # In the end the processes go first: what the source waits for then fails
            # at once.
            stack.callback(self._kill_source)
            stack.enter_context(self._dead_letters)
            stack.enter_context(self.api)
            stack.enter_context(self.function)
            stack.enter_context(self.resolver)
            self.subject.prepare()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- The parts -----------------------------------------------------------------

    def play(self, kind: str) -> None:
        """Restart the recharge API as one of this kind, and the function for it.

        Nothing happens if that is what is played already.

        Raises:
            PartFailed: one of them does not answer.

        """
        if kind == self._kind:
            return
        self._kind = kind
        self.function.kill()
        self.resolver.kill()
        self.api.start(kind)
        env = self.subject.env(self.api.url, kind)
        self.function.start({**env, "CRASH_FILE": str(self._crash_file)})
        if not self.subject.is_naive:
            self.resolver.start(env)

    def start_source(self) -> None:
        """Begin to deliver the topic to the function."""
        self._source = KafkaSource(
            kafka_config=self.grounds.source,
            topic=self.grounds.topic,
            group=GROUP,
            sink_url=self.function.url,
            delivery=self.delivery(),
            attach=self.grounds.attach,
            ce_overrides={"topic": self.grounds.topic},
            journal=self.journal("source"),
        ).start()

    def stop_source(self) -> None:
        """Deliver what is in flight, commit, and leave the group.

        Raises:
            PartFailed: it does not end.

        """
        source, self._source = self._source, None
        if source is not None and not source.stop():
            raise PartFailed("the source does not end")

    def delivery(self) -> Delivery:
        """What a KafkaSource's `spec.delivery` would say."""
        return Delivery(
            retry=RETRY,
            backoff_policy="linear",
            backoff_delay_s=BACKOFF_DELAY_S,
            timeout_s=DELIVERY_TIMEOUT_S,
            dead_letter_url=self._dead_letters.url,
        )

    def journal(self, name: str) -> Path:
        """Where a source notes each of its requests."""
        return self.directory / f"{name}.journal.jsonl"

    def app(self, channel: str, shape: Shape) -> App:
        """A new app with a connection of its own."""
        producer = self.grounds.producer
        return App(channel, shape, producer, self.grounds.topic, self.records)

    def crash_before_answer(self) -> None:
        """Kill the function's group once, after its ledger is settled."""
        self._crash_file.write_text("response_unwritten")

    def forward_dead_letters(self) -> int:
        """Write the dead letters into their topic; returns how many, 0 without one."""
        config = self.grounds.dead_letter
        if config is None:
            return 0
        letters = self._dead_letters.letters()
        write_dead_letters(config, self.grounds.dead_letter_topic, letters)
        return len(letters)

    def source_process(self, name: str) -> Part:
        """A source in a process of its own, in the same consumer group, started."""
        part = SourcePart(
            name,
            self.directory / f"{name}.log",
            kafka=self.grounds.source,
            options={
                "--topic": self.grounds.topic,
                "--group": GROUP,
                "--sink": self.function.url,
                "--dead-letter-sink": self._dead_letters.url,
                "--retry": str(RETRY),
                "--backoff-policy": "linear",
                "--backoff-delay": f"PT{BACKOFF_DELAY_S}S",
                "--timeout": f"PT{DELIVERY_TIMEOUT_S}S",
                "--extension": f"topic={self.grounds.topic}",
                "--journal": self.journal(name),
            },
        )
        self._stack.enter_context(part).start()
        return part

    def post_directly(self, body: bytes, msisdn: str) -> int:
        """POST a body that no broker would let through; returns the HTTP status."""
        headers = {
            "ce-specversion": "1.0",
            "ce-id": "direct-1",
            "ce-source": "/somebody",
            "ce-type": "com.example.topup.requested.v1",
            "Content-Type": "application/json",
        }
        answer = requests.post(self.function.url, body, headers=headers, timeout=30)
        content = place_of_bytes(body, len(body))
        self.records.add(
            Sent("", -1, 0, None, msisdn, "direct", "refused", content=content)
        )
        return answer.status_code

    def operate(self, arguments: Sequence[str]) -> str:
        """Run `topup` as a person would, until it is done; returns what it says.

        A decision is refused for as long as something of the order could still land.

        Raises:
            PartFailed: it is refused for too long.

        """
        env = self.subject.env(self.api.url, self._kind)
        inherited = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
        said = ""

        def is_done() -> bool:
            nonlocal said
            command = [sys.executable, "-m", "function.cli", *arguments]
            run = subprocess.run(
                command,
                env=inherited | env,
                cwd=PROJECT,
                capture_output=True,
                text=True,
                check=False,
            )
            said = (run.stdout or run.stderr).strip()
            return run.returncode == 0

        self.wait_until(is_done, f"let `topup {arguments[0]}` be done")
        return said

    # -- What there is to see --------------------------------------------------------

    def book(self) -> list[BookEntry]:
        """The recharge API's book."""
        return self._book.entries()

    def ledger(self) -> LedgerView:
        """What the ledger shows."""
        return self.subject.view()

    def counts(self, sent: Sent) -> tuple[int, int, int]:
        """Calls, executions and look-ups of one record's order, by the book."""
        names = self.subject.names([sent])
        mine = [e.entry for e in self.book() if names.get(e.key, e.key) == sent.key]
        return mine.count("called"), mine.count("executed"), mine.count("looked_up")

    def waiting(self) -> int:
        """Records of the topic that are not consumed yet."""
        return self._running_source().lag()

    def attempts(self) -> int:
        """Requests to the function that have ended."""
        return self._running_source().counters.attempts

    def answers(self, sent: Sent) -> list[int | None]:
        """The function's answers to one record; None where none came."""
        return [
            status
            for place, target, status in self._requests()
            if place == sent.place and target == "sink"
        ]

    def delivered(self) -> Delivered:
        """What all sources did, by their journals."""
        return delivered_by(self._journals())

    # -- Waiting ---------------------------------------------------------------------

    def wait_until_consumed(self) -> None:
        """Wait until every record of the topic is done, whichever way.

        Raises:
            PartFailed: it is not.

        """
        source = self._running_source()
        if not source.wait_until_idle(TIMEOUT_S):
            raise PartFailed(
                f"the source has not delivered everything within {TIMEOUT_S:g} s "
                f"({source.failure or 'it goes on'}); read {self.journal('source')} "
                f"and {self.function.log}"
            )

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for what the resolver or a person has set going.

        Raises:
            PartFailed: it does not happen.

        """
        end_s = time.monotonic() + TIMEOUT_S
        while not is_so():
            if time.monotonic() > end_s:
                raise self.resolver.failed(f"has not {what} within {TIMEOUT_S:g} s")
            time.sleep(_POLL_S)

    def _requests(self) -> Iterator[tuple[str, str, int | None]]:
        return requests_in(self._journals())

    def _journals(self) -> list[Path]:
        return sorted(self.directory.glob("*.journal.jsonl"))

    def _running_source(self) -> KafkaSource:
        if self._source is None:
            raise PartFailed("the source does not run")
        return self._source

    def _kill_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.kill()
            source.join(DELIVERY_TIMEOUT_S)


def requests_in(journals: Iterable[Path]) -> Iterator[tuple[str, str, int | None]]:
    """Place, target and status of every request in the journals of sources."""
    for journal in journals:
        with journal.open() as lines:
            for line in lines:
                entry = json.loads(line)
                where = entry["topic"], entry["partition"], entry["offset"]
                yield place_in_topic(*where), entry["target"], entry["status"]


def delivered_by(journals: Iterable[Path]) -> Delivered:
    """What the sources of these journals did, all together."""
    requests_, places, dead = 0, set(), set()
    for place, target, status in requests_in(journals):
        if target == "sink":
            requests_ += 1
            places.add(place)
        elif status is not None and status < _HTTP_MULTIPLE_CHOICES:
            dead.add(place)
    return Delivered(requests_ - len(places), len(dead))

"""A small real HTTP server that keeps dead letters, one JSON line each.

Owns the file it appends to. It must never refuse a dead letter for its shape, for
the source would then drop the record, and never answer 202 before the line is on
disk. It stands in for the parking service behind a KafkaSource's deadLetterSink.
"""

import argparse
import base64
import json
import os
import random
import signal
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

# Longer than any backoff of the demo, so that a waiting source keeps its connection.
_IDLE_TIMEOUT_S = 75


class DeadLetterSink:
    """Keep dead letters in a file; start with `start` or as a context manager."""

    def __init__(
        self,
        file: Path,
        *,
        port: int = 0,
        fail_rate: float = 0.0,
        statuses: Iterable[int] = (),
        seed: int | None = None,
    ) -> None:
        """Bind the port at once.

        Args:
            file: Lines are appended here.
            port: On 127.0.0.1; 0 takes a free one.
            fail_rate: The share of requests answered 503 and not kept, 0 to 1.
            statuses: Answered to the first requests, in order; what is answered 300
                or more is not kept.
            seed: Makes fail_rate repeatable.

        Raises:
            OSError: The port is taken, or the file can't be opened.

        """
        self._file = file
        self._statuses = list(statuses)
        self._fail_rate = fail_rate
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._server = _Server(("127.0.0.1", port), _Handler)
        except OSError:
            os.close(self._descriptor)
            raise
        self._server.sink = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def url(self) -> str:
        """Where to POST."""
        return f"http://127.0.0.1:{self._server.server_port}/"

    def start(self) -> Self:
        """Serve in a thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Serve no further request, and close the port and the file."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def letters(self) -> list[dict[str, object]]:
        """Read back what was kept, oldest first."""
        return [json.loads(line) for line in self._file.read_text().splitlines()]

    def keep(self, attributes: dict[str, str], body: bytes) -> int:
        """Append one dead letter, unless it is this one's turn to fail.

        Returns:
            The HTTP status to answer.

        Raises:
            OSError: The line is not, or not wholly, on disk.

        """
        letter = {
            "attributes": attributes,
            "data_base64": base64.b64encode(body).decode(),
        }
        line = json.dumps(letter).encode() + b"\n"
        with self._lock:
            status = self._next_status()
            # One write, so that a kill leaves whole lines, and lines never mix.
            if status < 300 and os.write(self._descriptor, line) != len(line):  # noqa: PLR2004
                raise OSError("the dead letter was written in part")
            if status < 300:  # noqa: PLR2004 -- success, to a Knative sender.
                os.fsync(self._descriptor)
        return status

    def _next_status(self) -> int:
        if self._statuses:
            return self._statuses.pop(0)
        return 503 if self._random.random() < self._fail_rate else 202


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A stopped sink's port can be taken again at once, as by a restarted pod.
    allow_reuse_address = True
    sink: DeadLetterSink


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_TIMEOUT_S
    server: _Server

    def do_POST(self) -> None:
        if "Content-Length" not in self.headers:
            self.close_connection = True
            self._answer(411)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        attributes = {
            name.lower().removeprefix("ce-"): value
            for name, value in self.headers.items()
            if name.lower().startswith("ce-")
        }
        if "Content-Type" in self.headers:
            attributes["datacontenttype"] = self.headers["Content-Type"]
        try:
            self._answer(self.server.sink.keep(attributes, body))
        except OSError:
            self._answer(503)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent: the lines in the file are the record."""


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m demo.dead_letter_sink")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path("dead-letters.jsonl"))
    parser.add_argument("--port-file", type=Path, help="the port is written here")
    parser.add_argument("--fail-rate", type=float, default=0.0)
    options = parser.parse_args(arguments)
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    with DeadLetterSink(
        options.file, port=options.port, fail_rate=options.fail_rate
    ) as sink:
        if options.port_file:
            # Renamed into place: a reader never sees half a number.
            draft = options.port_file.with_suffix(".part")
            draft.write_text(sink.url.rsplit(":", 1)[1].rstrip("/"))
            draft.rename(options.port_file)
        print(f"dead letter sink: {sink.url}", flush=True)
        is_over.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

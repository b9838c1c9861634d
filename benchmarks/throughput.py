"""Deliveries a second: the server alone, the article's design, and the function.

`python -m benchmarks.throughput`: eight lanes deliver one order after the other to one
process under functions-framework, on a durable private MariaDB with TLS and a sandbox
recharge API in a process of its own. All in one run, so that the ratios mean something
on whatever machine it is. Owns only numbers; must never assert any.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import requests

from benchmarks.stuck_subscriber import deliver
from certs.make_certs import make_certs
from demo.mariadb import MariaDbServer
from demo.processes import FunctionPart, RechargeApiPart
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate

LANES: Final = 8
SECONDS: Final = 6.0


def main() -> None:
    """Measure each and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        certificates = make_certs(directory / "certs")
        database = MariaDbServer(directory / "mariadb", certificates)
        api = RechargeApiPart(directory / "api.log", book=directory / "book.jsonl")
        with database, api:
            api.start("replay")
            env = {
                "LEDGER_DATABASE_URL": database.create_database("ledger"),
                "LEDGER_TLS_CA_FILE": str(database.ca),
                "RECHARGE_API_URL": api.url,
                "RECHARGE_API_KIND": "replay",
                "LOG_LEVEL": "ERROR",
                "THREADS": str(LANES),
            }
            engine = make_engine(Settings.from_env(env))
            migrate(engine)
            engine.dispose()
            api_only = rate(lambda lane: call_api(api.url, lane))
            print(f"{'':28} {'a second':>9}   of the API's")
            show("the recharge API itself", api_only, api_only)
            for name, source, signature in (
                ("the server, no work", "benchmarks/floor.py", "http"),
                ("the naive handler", "demo/naive.py", "cloudevent"),
                ("the function", "function/main.py", "http"),
                ("the function, repetitions", "function/main.py", "http"),
            ):
                part = FunctionPart(
                    directory / "f.log", source=source, signature=signature
                )
                with part:
                    part.start(env)
                    show(name, rate(lane_of(part.url, name)), api_only)


def lane_of(url: str, name: str) -> Callable[[int], Callable[[int], None]]:
    """A lane that delivers orders of its own, or the same one again and again."""

    def lane(number: int) -> Callable[[int], None]:
        session = requests.Session()

        def one(count: int) -> None:
            if "repetitions" in name:
                count = 0
            msisdn = f"+39{len(name):02}{number}{count % 500:06}"
            deliver(session, url, msisdn, count)

        return one

    return lane


def call_api(url: str, lane: int) -> Callable[[int], None]:
    """A lane that calls the recharge API without anything between."""
    session = requests.Session()

    def one(count: int) -> None:
        body: Mapping[str, object] = {
            "rechargeId": f"{lane}-{count}",
            "channel": "floor",
            "msisdn": "+393330000000",
            "amountMinor": 1000,
            "currency": "EUR",
            "requestedAt": "2026-11-23T10:00:00Z",
        }
        headers = {"Idempotency-Key": f"floor:{lane}-{count}"}
        session.post(f"{url}/recharges", json=body, headers=headers, timeout=30)

    return one


def rate(lane: Callable[[int], Callable[[int], None]]) -> float:
    """Deliveries a second of all lanes together."""

    def run(number: int) -> int:
        one = lane(number)
        end, count = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            one(count)
            count += 1
        return count

    with ThreadPoolExecutor(LANES) as pool:
        return sum(pool.map(run, range(LANES))) / SECONDS


def show(name: str, per_second: float, floor: float) -> None:
    """One row."""
    print(f"{name:28} {per_second:9.0f}   {per_second / floor:.2f}")


if __name__ == "__main__":
    main()

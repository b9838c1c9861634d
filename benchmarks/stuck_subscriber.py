"""How long one stuck subscriber keeps the others of its partition waiting.

`python -m benchmarks.stuck_subscriber`: a lane of orders is delivered one after the
other, as a partition is; in the middle one subscriber's calls fail. Printed is what its
deliveries take, beside the median delivery of the others before it in the same run.
Owns only numbers; must never assert any.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

import requests

from demo.faults import Fault, Script
from demo.processes import FunctionPart
from demo.recharge_api import Kind, SandboxRechargeApi
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate

OTHERS: Final = 200
ANSWER_S: Final = 0.02
STUCK: Final = "+393339999999"
TIMEOUT_S: Final = 1.0
FAULTS: Final = {
    "500 at once": Fault.ERROR_BEFORE,
    "executed, answer lost": Fault.EXECUTE_THEN_DROP,
    "hangs": Fault.HANG,
}


def main() -> None:
    """Measure each fault with each kind and print a table."""
    print(
        f"recharge API answers in {ANSWER_S * 1000:g} ms, gives up after {TIMEOUT_S} s"
    )
    print(f"{'kind':8} {'fault':22} {'others':>8} {'first':>9} {'later':>8}  ledger")
    for kind in Kind:
        for name, fault in FAULTS.items():
            measure(kind, name, fault)


def measure(kind: Kind, name: str, fault: Fault) -> None:
    """One row: medians in milliseconds, and how the first order stands."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SandboxRechargeApi(kind=kind, book=Path(folder) / "book.jsonl") as api,
        FunctionPart(
            Path(folder) / "function.log", source="function/main.py", signature="http"
        ) as function,
        requests.Session() as session,
    ):
        env = {
            "LEDGER_DATABASE_URL": f"sqlite:///{folder}/ledger.db",
            "RECHARGE_API_URL": api.url,
            "RECHARGE_API_KIND": kind.value,
            "RECHARGE_API_TIMEOUT_S": str(TIMEOUT_S),
            "RECHARGE_API_DEADLINE_S": "1.5",
            "LOG_LEVEL": "ERROR",
        }
        engine = make_engine(Settings.from_env(env))
        migrate(engine)
        engine.dispose()
        function.start(env)
        slow = Script(Fault.EXECUTE_THEN_LATE, times=None, delay_s=ANSWER_S)
        api.add_faults(Script(fault, msisdn=STUCK, times=None, delay_s=60), slow)
        numbers = [f"+3933300{number:05}" for number in range(OTHERS)]
        others = [deliver(session, function.url, each, 0)[0] for each in numbers]
        first, status = deliver(session, function.url, STUCK, 0)
        later = [deliver(session, function.url, STUCK, n)[0] for n in (1, 2, 3)]
        print(
            f"{kind.value:8} {name:22} {statistics.median(others):6.1f}ms"
            f" {first:7.1f}ms {statistics.median(later):6.1f}ms  {status}"
        )


def deliver(
    session: requests.Session, url: str, msisdn: str, number: int
) -> tuple[float, int]:
    """Milliseconds and status of one delivery."""
    data = {
        "rechargeId": f"{msisdn}-{number}",
        "channel": "bench",
        "msisdn": msisdn,
        "amountMinor": 1000,
        "currency": "EUR",
        "requestedAt": "2026-11-23T10:00:00Z",
    }
    headers = {
        "ce-specversion": "1.0",
        "ce-id": f"{msisdn}-{number}",
        "ce-source": "/bench",
        "ce-type": "com.example.topup.requested.v1",
        "content-type": "application/json",
    }
    began = time.perf_counter()
    answer = session.post(url, json.dumps(data), headers=headers, timeout=60)
    return (time.perf_counter() - began) * 1000, answer.status_code


if __name__ == "__main__":
    main()

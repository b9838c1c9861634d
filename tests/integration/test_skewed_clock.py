"""The pod with the wrong wall clock has one, and its monotonic clock is right."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKEW_S = -86_400.0
ASK = """
import json, time, datetime
from datetime import UTC, datetime as named
now = [time.time(), time.time_ns() / 1e9, named.now(UTC).timestamp(),
       datetime.datetime.now().timestamp(), datetime.datetime.utcnow().timestamp()]
print(json.dumps([now, time.monotonic()]))
"""


def test_wall_clock_is_wrong_and_the_monotonic_one_is_not() -> None:
    path = f"{ROOT / 'proof' / 'skewed_clock'}:{ROOT}"
    env = {"PYTHONPATH": path, "CLOCK_SKEW_S": str(SKEW_S), "TZ": "UTC"}

    asked = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        check=True,
    )

    clocks, monotonic_s = json.loads(asked.stdout)
    for clock_s in clocks:
        assert abs(clock_s - (time.time() + SKEW_S)) < 60
    assert abs(monotonic_s - time.monotonic()) < 60

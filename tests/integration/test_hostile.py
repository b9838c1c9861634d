"""The hostile API before the deployed function, in small; and that it can be red."""

from pathlib import Path

import pytest

from proof.hostile import find

#: function/main.py with the guard of http_answer.py taken away.
BLIND = """
from pathlib import Path
from function import http_exchange

http_exchange.FinalAnswer = None
http_exchange._Watched.response_class = __import__("http.client").client.HTTPResponse
http_exchange._WatchedTls.response_class = http_exchange._Watched.response_class
http_exchange.has_unexpected = lambda _: False
http_exchange._Watched.is_connected = True
MAIN = Path({main!r})
exec(compile(MAIN.read_text("utf-8"), str(MAIN), "exec"))
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["none", "lookup"])
def test_function_as_it_is_settles_nothing_by_a_foreign_answer(
    tmp_path: Path, kind: str
) -> None:
    faults, figures = find(
        tmp_path / kind,
        kind,  # type: ignore[arg-type]
        seed=5,
        seconds=8,
    )

    assert faults == []
    assert figures["ledger"]["succeeded"] > 20
    assert len(figures["dressings"]) > 10


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_client_that_loses_count_of_answers_is_found(tmp_path: Path) -> None:
    source = tmp_path / "blind_main.py"
    main = str(Path.cwd() / "function" / "main.py")
    source.write_text(BLIND.format(main=main), "utf-8")

    faults, _ = find(tmp_path / "none", "none", seed=5, seconds=15, source=str(source))

    assert any("not its own" in fault or "rejected" in fault for fault in faults)

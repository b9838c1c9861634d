"""function/main.py with one error planted: it fails at orders that ask for it.

Owns nothing else; must never be deployed. Nobody foresees an error that is known, so
the instrument plants one, to see that whatever else is raised leaks nothing and loses
nothing. Loaded by path, as function/main.py is.
"""

from pathlib import Path
from typing import Final

from function.model import Receipt, TopUp
from function.processing import Processing
from proof.bent_requests import PLANTED_PREFIX

_MAIN: Final = Path(__file__).resolve().parents[1] / "function" / "main.py"
_process: Final = Processing.process


class PlantedError(Exception):
    """What nobody foresaw; its text quotes what may not be told."""


def _fail_or_process(self: Processing, order: TopUp) -> Receipt:
    if order.recharge_id.startswith(PLANTED_PREFIX):
        raise PlantedError(f"{order.msisdn} {order.payload!r}")
    return _process(self, order)


Processing.process = _fail_or_process  # type: ignore[method-assign]
exec(compile(_MAIN.read_text("utf-8"), str(_MAIN), "exec"))  # noqa: S102 # as its loader

"""One thread that plays many: greenlets, a virtual clock, and who goes on next.

Owns the switching and the time; must never know what the tasks do.

A task runs until it pauses: before each statement, each request, each look at a clock.
So whatever can happen between two of them can be made to happen there.
"""

from collections.abc import Callable
from typing import Final

from greenlet import GreenletExit, getcurrent, greenlet

MICROS: Final = 1_000_000


class Violation(BaseException):
    """A guarantee is broken; the text says which, and by what.

    No `except Exception` of the code under test may catch it.
    """


class Task:
    """One thread of one simulated process.

    Attributes:
        process: whose it is; dies with it.
        name: for the trace.
        doing: what it will do when it goes on.
        wakes_at: moment before which it can't go on, in microseconds.

    """

    __slots__ = ("doing", "greenlet", "name", "process", "wakes_at")

    def __init__(self, process: str, name: str, body: Callable[[], None]) -> None:
        self.process = process
        self.name = name
        self.doing = "starts"
        self.wakes_at = 0
        self.greenlet = greenlet(body)


class Scheduler:
    """Runs tasks one at a time; switches only where a task pauses."""

    def __init__(self, *, is_traced: bool = False) -> None:
        #: The virtual clock, in microseconds.
        self.now = 1_000 * MICROS
        self.tasks: list[Task] = []
        self.trace: list[str] | None = [] if is_traced else None
        self._current: Task | None = None
        self._hub = getcurrent()

    def spawn(self, process: str, name: str, body: Callable[[], None]) -> Task:
        """Add a task; it starts when it is chosen."""
        task = Task(process, name, body)
        self.tasks.append(task)
        return task

    def pause(self, doing: str, wakes_at: int = 0) -> None:
        """Let others go on before the current task does what it says."""
        task = self.running()
        task.doing = doing
        task.wakes_at = wakes_at
        self._hub.switch()

    def running(self) -> Task:
        """The task that has paused last, or runs."""
        assert self._current is not None  # noqa: S101 # Tasks alone ask.
        return self._current

    def next(self) -> Task | None:
        """The task that goes on by default: the last one, while it can."""
        if self._current is not None and self._current.wakes_at <= self.now:
            return self._current
        for task in self.tasks:
            if task.wakes_at <= self.now:
                return task
        return None

    def go_on(self, task: Task) -> None:
        """Run a task up to its next pause.

        Raises:
            Violation: whatever the task found broken.

        """
        if self.trace is not None:
            self.say(f"{task.process} {task.name}: {task.doing}")
        self._current = task
        task.greenlet.switch()
        if task.greenlet.dead:
            self._forget(task)

    def kill(self, process: str) -> None:
        """End every task of a process where it stands, as SIGKILL does."""
        for task in [each for each in self.tasks if each.process == process]:
            task.greenlet.throw(GreenletExit)
            self._forget(task)

    def say(self, line: str) -> None:
        """Add a line to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.now / MICROS:10.3f}  {line}")

    def _forget(self, task: Task) -> None:
        self.tasks.remove(task)
        if self._current is task:
            self._current = None

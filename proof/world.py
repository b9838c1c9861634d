"""One simulated run: pods, resolvers, a source, an API, a person, and their troubles.

Owns the wiring and the three phases of a run; must never touch the code under test: the
`Processing` and the `Resolver` that run here are the production ones.

    trouble   anything goes, as the chooser says
    recovery  no more faults; pods, source and resolver go on until all is at rest
    decision  a person who knows what the API did settles what is left
"""

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, cast

from function.api_profile import ApiProfile, Kind, load_profile
from function.circuit_breaker import PAUSE_S_MAX
from function.config import Settings
from function.errors import ClaimUncertain, LedgerUnavailable, OperationRefused
from function.model import (
    Answer,
    AnswerClass,
    LookUp,
    Outcome,
    Position,
    Receipt,
    Status,
    TopUp,
)
from function.operations import ACCEPTED_CASES, Verdict
from function.processing import Processing
from function.resolver import Resolver
from function.rules import Rules
from proof.chooser import Chooser, Deviation, Point
from proof.judge import Judge, WatchedLedger, read_status_table
from proof.memory_ledger import Row
from proof.scheduler import MICROS, Scheduler, Task, Violation
from proof.simulated_api import POISONS, TROUBLES, SimulatedApi
from proof.simulated_source import Lane, SimulatedSource

if TYPE_CHECKING:
    from function.ledger import Ledger

DEADLINE_S: Final = 10.0
LEASE_S: Final = 20.0
SETTLE_S: Final = 60.0
WINDOW_S: Final = 300.0
GIVEN_UP_S: Final = 120.0
AGAIN_S: Final = 10.0
ACCEPTED_MAX_S: Final = 600.0
#: How long one record may stand at the head of its partition for a reason of its own:
#: the lease of a process that died, and three answers that nothing was executed, each
#: behind the longest pause of the breaker, a delivery and the source's backoff.
HEAD_S: Final = LEASE_S + 3 * (PAUSE_S_MAX + 2 * DEADLINE_S + 2 * PAUSE_S_MAX)
_RULES: Final = Rules(SETTLE_S, second_person_above_minor=10_000)

#: What can befall a run, beside the API's and the ledger's troubles.
EVENTS: Final = (
    "crash",
    "rebalance",
    "rewind",
    "zombie",
    "early",
    "jump",
    "pause",
    "drain",
    "person",
)
#: A phase that takes so many steps does not come to rest.
_STEPS_MAX: Final = 4_000
#: Rounds of the resolver in which nothing was settled, each pause four times the last,
#: after which nothing will be by itself: parked ones are tried ever more rarely, but
#: where the API can't be asked they are not tried at all.
_QUIET_ROUNDS: Final = 5
_QUIET_ROUNDS_OF_NONE: Final = 3
#: After so many the trouble is over, too: it would be idle.
_PATIENCE: Final = 1
_ROUND_S: Final = 10
_LONGER: Final = 4
_JUMPS_US: Final = tuple(
    round((each_s + 1) * MICROS) for each_s in (LEASE_S, SETTLE_S, WINDOW_S)
)
_STATUS: Final = read_status_table()


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is made of; together with its deviations it says everything."""

    kind: str
    #: Partitions of records; a record is its order's number and its subscriber's.
    partitions: tuple[tuple[tuple[int, int], ...], ...]
    pods: int = 2
    resolvers: int = 1
    #: Steps of the first phase, at the most.
    horizon: int = 400
    gives_up: bool = False
    #: Everything fails for so many subscribers, until a person decides; and how.
    poisoned: int = 0
    poison: str = POISONS[0]
    #: Kind `replay`: what it is after its window.
    after_window: str = "none"
    #: Microseconds that a statement takes by the database's clock.
    tick_us: int = 1_000
    troubles: tuple[str, ...] = TROUBLES
    events: tuple[str, ...] = EVENTS


@functools.cache
def _profile(kind: str, after_window: str) -> ApiProfile:
    settings = Settings.from_env(
        {
            "RECHARGE_API_URL": "http://127.0.0.1:9",
            "LEDGER_DATABASE_URL": "sqlite://",
            "RECHARGE_API_KIND": kind,
            "RECHARGE_API_SETTLE_S": f"{SETTLE_S:g}",
            "RECHARGE_API_REPLAY_WINDOW_S": f"{WINDOW_S:g}",
        }
    )
    profile = load_profile(settings)
    is_asked = kind in {"refuse", "lookup"} or after_window == "refuse"
    return replace(
        profile,
        kind_after_window=Kind(after_window),
        look_up=profile.look_up if is_asked else None,
    )


@functools.cache
def _order(number: int, subscriber: int, partition: int, offset: int) -> TopUp:
    name, msisdn = f"r{number}", f"+39333000000{subscriber}"
    data = {
        "rechargeId": name,
        "channel": "app",
        "msisdn": msisdn,
        "amountMinor": 1000,
        "currency": "EUR",
        "requestedAt": "2026-11-23T10:00:00Z",
    }
    what = [msisdn, 1000, "EUR", None]
    return TopUp(
        idempotency_key=f"app:{name}",
        fingerprint=sha256(json.dumps(what).encode()).hexdigest(),
        channel="app",
        recharge_id=name,
        msisdn=msisdn,
        amount_minor=1000,
        currency="EUR",
        requested_at="2026-11-23T10:00:00Z",
        donor_msisdn=None,
        payload=json.dumps(data).encode(),
        position=Position("recharge.orders", partition, offset),
        event_id=f"partition:{partition}/offset:{offset}",
        event_source="/simulation",
    )


class _Connection:
    """A process's connection to the ledger: each statement may fail on its way."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def __getattr__(self, name: str) -> Callable[..., Any]:
        world, method = self._world, getattr(self._world.ledger, name)

        def call(*args: Any, **options: Any) -> Any:
            return world.execute(name, lambda: method(*args, **options))

        # Found without this detour from now on.
        setattr(self, name, call)
        return call


class _Line:
    """A process's line to the API: the judge hears what the process hears."""

    def __init__(self, world: "World", process: str) -> None:
        self._world = world
        self._process = process

    def recharge(self, order: TopUp, rendered_key: str, deadline: float) -> Answer:
        answer = self._world.api.recharge(order, rendered_key, deadline)
        if answer.classified in {AnswerClass.DONE, AnswerClass.ACCEPTED}:
            self._world.judge.heard(self._process, order, answer)
        return answer

    def look_up(self, rendered_key: str) -> LookUp:
        return self._world.api.look_up(rendered_key)


class _Process:
    """A pod or a resolver, from its start to its crash."""

    def __init__(self, world: "World", name: str, *, is_resolver: bool) -> None:
        self.name = name
        self.is_draining = False
        ledger = cast("Ledger", _Connection(world))
        profile = world.profile
        self.processing = world.make_processing(
            ledger,
            _Line(world, name),
            profile,
            deadline_s=DEADLINE_S,
            lease_s=LEASE_S,
            is_resolver=is_resolver,
            is_draining=lambda: self.is_draining,
            alert=world.alert,
            monotonic=world.monotonic,
            sleep=world.sleep,
        )
        self.resolver = Resolver(
            ledger,
            self.processing,
            world.api,
            profile,
            given_up_s=GIVEN_UP_S,
            again_s=AGAIN_S,
            watch_s=0,
            accepted_max_s=ACCEPTED_MAX_S,
            is_stopping=lambda: self.is_draining,
            alert=world.alert,
            monotonic=world.monotonic,
        )
        #: Of a resolver: when it begins its next round.
        self.round_at = world.scheduler.now
        self.pause_s = _ROUND_S
        self.task: Task | None = None


_READS: Final = frozenset({"look", "due", "accepted"})
_CLAIMS: Final = frozenset({"claim", "reclaim"})
#: What a person may have to decide about.
_FOR_PERSONS: Final = (Status.PARKED, Status.IN_DOUBT, Status.ACCEPTED)
#: Its name, what does it, and to what.
_Act = tuple[str, Callable[[Any], None], Any]


class World:
    """One run of one setup.

    Args:
        setup: what it is made of.
        chooser: takes every choice.
        is_traced: keep a readable line a step.
        make_processing: the class under test; a test hands in a broken one.
        make_ledger: likewise.

    """

    def __init__(
        self,
        setup: Setup,
        chooser: Chooser,
        *,
        is_traced: bool = False,
        make_processing: Callable[..., Processing] = Processing,
        make_ledger: Callable[..., WatchedLedger] = WatchedLedger,
    ) -> None:
        self.setup = setup
        self.chooser = chooser
        self._first_chooser = chooser
        self.make_processing = make_processing
        self.scheduler = Scheduler(is_traced=is_traced)
        self.profile = _profile(setup.kind, setup.after_window)
        self.counts: Counter[str] = Counter()
        self.api = SimulatedApi(self.scheduler, chooser, self.profile, setup.troubles)
        self.ledger = make_ledger(
            self.profile, lease_s=LEASE_S, now=self._database_now, rules=_RULES
        )
        partitions = [
            [
                _order(number, subscriber, partition, offset)
                for offset, (number, subscriber) in enumerate(records)
            ]
            for partition, records in enumerate(setup.partitions)
        ]
        records = [each for partition in partitions for each in partition]
        self.judge = Judge(records, self.api, self.ledger)
        self.source = SimulatedSource(
            self.scheduler, partitions, self.judge.gave_up, gives_up=setup.gives_up
        )
        subscribers = list(dict.fromkeys(each.msisdn for each in records))
        self._poisoned = frozenset(subscribers[: setup.poisoned])
        self.api.poisoned, self.api.poison = self._poisoned, setup.poison
        #: By then every record must be taken; from the end of the faults on.
        self._taken_by = 0
        self._head_us = round(HEAD_S * MICROS) * len(records)
        #: Statements that the server executes although nobody waits any more.
        self._late: list[tuple[str, Callable[[], object]]] = []
        self._pods = [
            _Process(self, f"pod{n}", is_resolver=False) for n in range(setup.pods)
        ]
        self._resolvers = [
            _Process(self, f"resolver{n}", is_resolver=True)
            for n in range(setup.resolvers)
        ]
        #: Pods so far; a pod's name never comes back while it still drains.
        self._made = setup.pods - 1
        self._person: Task | None = None
        self._settled = 0
        #: Nobody else will bring anything on.
        self._is_person_last = False
        is_none = setup.kind == Kind.NONE
        self._quiet_rounds = _QUIET_ROUNDS_OF_NONE if is_none else _QUIET_ROUNDS
        is_windowed = self.profile.kind is Kind.REPLAY
        self._jumps = _JUMPS_US if is_windowed else _JUMPS_US[:2]

    @property
    def chosen(self) -> list[Deviation]:
        """The deviations that this run took."""
        return self._first_chooser.taken

    @property
    def points(self) -> int:
        """The choice points that this run has passed in its first phase."""
        return self._first_chooser.points

    # -- A run ---------------------------------------------------------------------

    def run(self) -> None:
        """Play all three phases.

        Raises:
            Violation: a guarantee is broken.

        """
        try:
            self._trouble()
            self._recover()
            self._decide()
        finally:
            # What is left hangs in mid-call: end it, or the greenlets stay.
            for process in {task.process for task in self.scheduler.tasks}:
                self.scheduler.kill(process)

    def _trouble(self) -> None:
        tasks = self.scheduler.tasks
        for _ in range(self.setup.horizon):
            if not tasks and self._is_quiet() and self._has_come_to_rest(_PATIENCE):
                return
            self._step()

    def _recover(self) -> None:
        self.chooser = self.api.chooser = Chooser()
        self.ledger.paused.clear()
        self.source.gives_up = False
        for process in self._resolvers:
            process.pause_s, process.round_at = _ROUND_S, self.scheduler.now
        self.scheduler.say("-- no more faults")
        self._taken_by = self.scheduler.now + self._head_us
        self._until(self._is_at_rest)
        is_asked = self.setup.kind in {"refuse", "lookup"}
        self.judge.at_rest(is_asked=is_asked, poisoned=self._poisoned)

    def _decide(self) -> None:
        self.api.poisoned = frozenset()
        self._is_person_last = True
        if self.judge.unsettled() or self._accepted():
            self.scheduler.say("-- a person settles what is left")
            self._until(self._is_settled_by_person)
        self.judge.at_end()

    def _until(self, is_enough: Callable[[], bool]) -> None:
        tasks = self.scheduler.tasks
        for _ in range(_STEPS_MAX):
            if not tasks and is_enough():
                return
            if self.scheduler.now > self._taken_by and not self.source.is_done:
                keys = [each.record.idempotency_key for each in self.source.idle()]
                raise Violation(f"waits: {', '.join(keys)} longer than the bound")
            self._step()
        left = [f"{r.idempotency_key} ({r.status})" for r in self.judge.unsettled()]
        raise Violation(f"stuck: no rest after {_STEPS_MAX} steps: {', '.join(left)}")

    def _is_quiet(self) -> bool:
        """Nothing is under way, and every record had its last answer."""
        return (
            not self.scheduler.tasks
            and not self._late
            and not self.api.under_way
            and self.source.is_done
        )

    def _is_over(self) -> bool:
        return self._is_quiet() and not self.judge.unsettled() and not self._accepted()

    def _is_at_rest(self) -> bool:
        return self._is_quiet() and self._has_come_to_rest(self._quiet_rounds)

    def _has_come_to_rest(self, rounds: int) -> bool:
        """Everything is settled, or so many rounds of the resolver settled nothing."""
        if not self.judge.unsettled() and not self._accepted():
            return True
        pause_s = min(each.pause_s for each in self._resolvers)
        return bool(pause_s >= _ROUND_S * _LONGER**rounds)

    def _is_settled_by_person(self) -> bool:
        if self._has_work_for_person():
            self._send_for_person()
        return self._is_over()

    def _accepted(self) -> bool:
        """Whether the resolver, or a person at last, has an accepted order to end."""
        is_followed = self.profile.look_up is not None or self._is_person_last
        return is_followed and any(
            row.status is Status.ACCEPTED for row in self.ledger.orders.values()
        )

    # -- A step --------------------------------------------------------------------

    def _step(self) -> None:
        task = self.scheduler.next()
        if self.chooser.deviates(Point.SCHEDULE):
            acts = self._alternatives(task)
            number = self.chooser.pick(len(acts))
            if number is not None:
                name, act, what = acts[number]
                self.counts[name] += 1
                act(what)
                return
        if task is not None:
            self.scheduler.go_on(task)
        else:
            self._go_on_by_itself()

    def _go_on_by_itself(self) -> None:
        """No task can go on: the world does what comes next."""
        if self._late:
            self._land_statement()
            return
        lane = self.source.ready()
        if lane is not None:
            self._deliver(lane)
            return
        now = self.scheduler.now
        for resolver in self._resolvers:
            if resolver.task is None and resolver.round_at <= now:
                self._begin_round(resolver)
                return
        for request in self.api.under_way:
            if request.lands_by <= now:
                self.api.land(request)
                return
        self._advance(self._next_moment())

    def _next_moment(self) -> int:
        now = self.scheduler.now
        moments = [task.wakes_at for task in self.scheduler.tasks]
        moments += [each.lands_by for each in self.api.under_way]
        moments += [each.round_at for each in self._resolvers if each.task is None]
        for lane in self.source.lanes:
            if lane.task is not None:
                moments.append(lane.timeout_at)
            elif not lane.is_done:
                moments.append(lane.retry_at)
        return min((each for each in moments if each > now), default=now + MICROS)

    def _jump(self, by_us: int | None) -> None:
        """Time passes, whoever could go on: to the next moment, or far."""
        to = self._next_moment() if by_us is None else self.scheduler.now + by_us
        self.scheduler.say("time passes")
        self._advance(to)

    def _advance(self, moment: int) -> None:
        self.scheduler.now = moment
        # Nothing travels longer than is assumed: at its worst it arrives just then.
        for request in [*self.api.under_way]:
            if request.lands_by < moment:
                self.scheduler.now = request.lands_by
                self.api.land(request)
        self.scheduler.now = moment
        self.source.time_passes()

    def _alternatives(self, task: Task | None) -> list[_Act]:
        """Everything that could happen now instead."""
        events, now = self.setup.events, self.scheduler.now
        tasks, late = self.scheduler.tasks, self._late
        acts: list[_Act] = [
            ("switch", self.scheduler.go_on, each)
            for each in tasks
            if each is not task and each.wakes_at <= now
        ]
        ready = self.source.ready() if task is None else None
        acts += [
            ("deliver", self._deliver, lane)
            for lane in self.source.idle()
            if lane is not ready and (lane.retry_at <= now or "early" in events)
        ]
        acts += [
            ("round", self._begin_round, each)
            for each in self._resolvers
            if each.task is None
        ]
        acts += [("arrive", self.api.land, each) for each in self.api.under_way]
        if late:
            acts.append(("late statement", self._land_statement, None))
        if "crash" in events:
            names = {each.process for each in tasks}
            acts += [
                ("crash", self._crash, each)
                for each in (*self._pods, *self._resolvers)
                if each.name in names
            ]
        if "jump" in events:
            acts.append(("wait", self._jump, None))
            acts += [("jump", self._jump, each) for each in self._jumps]
        return acts + self._disturbances(events)

    def _disturbances(self, events: tuple[str, ...]) -> list[_Act]:
        """What the source, an operator or the cluster does."""
        acts: list[_Act] = []
        for lane in self.source.lanes:
            if lane.is_revoked:
                continue
            if "rebalance" in events and not lane.is_done:
                acts.append(("rebalance", self._rebalance, lane))
            if "rewind" in events and lane.index:
                acts.append(("rewind", self._rewind, lane))
            if "zombie" in events and not lane.is_done:
                acts.append(("zombie", self._split, lane))
        if "drain" in events:
            acts += [
                ("drain", self._drain, each)
                for each in self._pods
                if any(task.process == each.name for task in self.scheduler.tasks)
            ]
        if "pause" in events:
            acts.append(("pause", self._switch_pause, None))
        if "person" in events and self._has_work_for_person():
            acts.append(("person", self._send_for_person, None))
        return acts

    # -- What the parts do ---------------------------------------------------------

    def _deliver(self, lane: Lane) -> None:
        pods = self._pods
        pod = pods[lane.partition % len(pods)]
        others = [each for each in pods if each is not pod]
        if self.chooser.deviates(Point.DETAIL):
            number = self.chooser.pick(len(others))
            pod = pod if number is None else others[number]
        order = lane.record
        key = order.idempotency_key

        def answer() -> None:
            receipt = self._process(pod, order)
            status = _STATUS[receipt.outcome]
            self.scheduler.pause(f"answers {key}: {status} {receipt.outcome.value}")
            self.judge.answered(order, receipt, status)
            self.counts[receipt.outcome.value] += 1
            self.source.answer(lane, task, status)

        task = self.scheduler.spawn(pod.name, key, answer)
        self.source.begin(lane, task)
        self.scheduler.say(f"the source delivers {key} to {pod.name}")

    def _process(self, pod: _Process, order: TopUp) -> Receipt:
        try:
            return pod.processing.process(order)
        except LedgerUnavailable:
            return Receipt(Outcome.LEDGER_UNAVAILABLE)
        except Exception as error:
            raise Violation(f"unforeseen: {error!r}") from error

    def _begin_round(self, resolver: _Process) -> None:
        def run() -> None:
            try:
                resolver.resolver.run_once()
            except LedgerUnavailable:
                self.counts["round broken off"] += 1
            except Exception as error:
                raise Violation(f"unforeseen: {error!r}") from error
            settled = len(self.ledger.orders) - len(self.judge.unsettled())
            has_progress = settled != self._settled
            self._settled = settled
            longest = _ROUND_S * _LONGER**self._quiet_rounds
            pause_s = min(longest, _LONGER * resolver.pause_s)
            resolver.pause_s = _ROUND_S if has_progress else pause_s
            resolver.round_at = self.scheduler.now + resolver.pause_s * MICROS
            resolver.task = None

        resolver.task = self.scheduler.spawn(resolver.name, "round", run)

    def _crash(self, process: _Process) -> None:
        self.scheduler.say(f"{process.name} is killed")
        self.judge.killed(process.name)
        for task in [*self.scheduler.tasks]:
            if task.process == process.name:
                self.source.lose(task)
        self.scheduler.kill(process.name)
        self._restart(process)

    def _restart(self, process: _Process) -> None:
        """Begin anew: what it had in memory is gone."""
        pool = self._pods if process in self._pods else self._resolvers
        fresh = _Process(self, process.name, is_resolver=pool is self._resolvers)
        pool[pool.index(process)] = fresh

    def _drain(self, process: _Process) -> None:
        """SIGTERM: what runs ends; another pod takes what comes."""
        self._made += 1
        name = f"pod{self._made}"
        self.scheduler.say(f"{process.name} drains, {name} replaces it")
        process.is_draining = True
        fresh = _Process(self, name, is_resolver=False)
        self._pods[self._pods.index(process)] = fresh

    def _switch_pause(self, _: None) -> None:
        paused = self.ledger.paused
        self.scheduler.say("everything goes on" if paused else "everything is paused")
        if paused:
            paused.clear()
        else:
            paused["*"] = "ann: test"

    def _rebalance(self, lane: Lane) -> None:
        """Another consumer begins at the record that was under way."""
        self.scheduler.say(f"another consumer takes partition {lane.partition}")
        self.source.rebalance(lane, start=lane.index, is_zombie=False)

    def _rewind(self, lane: Lane) -> None:
        """Another consumer begins anew: nothing had been committed."""
        self.scheduler.say(f"another consumer rewinds partition {lane.partition}")
        self.source.rebalance(lane, start=0, is_zombie=False)

    def _split(self, lane: Lane) -> None:
        """Another consumer begins, and the old one does not know yet."""
        self.scheduler.say(f"two consumers have partition {lane.partition}")
        self.source.rebalance(lane, start=lane.index, is_zombie=True)

    def _send_for_person(self, _: None = None) -> None:
        """A person looks at what is unsettled, asks the API's owner, and decides."""

        def decide() -> None:
            for row in [*self.ledger.orders.values()]:
                if self._is_ripe(row):
                    self._decide_about(row)
            self._person = None

        self._person = self.scheduler.spawn("person", "decides", decide)

    def _has_work_for_person(self) -> bool:
        rows = self.ledger.orders.values()
        return self._person is None and any(map(self._is_ripe, rows))

    def _is_ripe(self, row: Row) -> bool:
        """Whether a person may decide: nothing of it can still land."""
        is_old = (
            row.sent_at is None or self.scheduler.now - row.sent_at > SETTLE_S * MICROS
        )
        is_open = row.status in _FOR_PERSONS
        if row.status is Status.ACCEPTED:
            is_open = row.reason in ACCEPTED_CASES
        return is_open and is_old and not self.api.is_pending(row.idempotency_key)

    def _decide_about(self, row: Row) -> None:
        pause = self.scheduler.pause
        key, token = row.idempotency_key, row.token
        pause(f"asks the API's owner about {key}")
        if self.api.is_pending(key):
            return
        executions = self.api.executions(key)
        verdict = Verdict.EXECUTED if executions else Verdict.NOT_EXECUTED
        if not executions and row.status is Status.ACCEPTED:
            # The source was told 200: it is settled elsewhere.
            verdict = Verdict.ABANDON
        elif not executions and self.chooser.deviates(Point.DETAIL):
            number = self.chooser.pick(1)
            verdict = verdict if number is None else Verdict.ABANDON
        pause(f"decides {key}: {verdict}")
        try:
            self.ledger.decide(
                key,
                verdict,
                reason="asked the API's owner",
                reference=executions[0].reference if executions else None,
                attempt_token=token,
            )
        except OperationRefused as refusal:
            self.scheduler.say(f"    refused: {refusal}")

    # -- What processes are handed -------------------------------------------------

    def execute(self, name: str, statement: Callable[[], Any]) -> Any:
        """One statement of a process, as its connection lets it through.

        Raises:
            LedgerUnavailable: before or after it was executed, or it still will be.

        """
        self.scheduler.pause(name)
        self.scheduler.now += self.setup.tick_us
        fault = None
        if self.chooser.deviates(Point.LEDGER):
            faults = ("refused",) if name in _READS else ("refused", "lost", "late")
            if name in _CLAIMS:
                faults = (*faults, "cut")
            number = self.chooser.pick(len(faults))
            fault = None if number is None else faults[number]
        if fault is None:
            result = statement()
            self._note(name, result)
            return result
        self.counts[f"statement {fault}"] += 1
        self.scheduler.say(f"    the connection: {name} {fault}")
        if fault == "refused":
            raise LedgerUnavailable("simulated")
        error = LedgerUnavailable("simulated")
        if name in _CLAIMS:
            token = self.ledger.new_token()
            error = ClaimUncertain(token, "simulated")
            statement = functools.partial(self._claim_as, token, statement)
        if fault == "lost":
            statement()
        if fault == "late":
            self._late.append((name, statement))
        raise error

    def _claim_as(self, token: str, statement: Callable[[], Any]) -> None:
        """A claim whose caller knows its token, and not what became of it."""
        self.ledger.next_token = token
        try:
            statement()
        finally:
            self.ledger.next_token = None

    def _land_statement(self, _: None = None) -> None:
        name, statement = self._late.pop(0)
        self.scheduler.say(f"the server executes a late {name}")
        statement()

    def monotonic(self) -> float:
        """The pods' clock; a process may sleep just before it looks."""
        self.scheduler.pause("looks at the clock")
        return self.scheduler.now / MICROS

    def sleep(self, seconds: float) -> None:
        """Wait in virtual time."""
        until = self.scheduler.now + round(seconds * MICROS)
        self.scheduler.pause("sleeps", until)

    def alert(self, action: str, key: str, reason: str, **_: object) -> None:
        """What a person is told."""
        self.counts[f"alert {action}"] += 1
        self.judge.told(key)
        self.scheduler.say(f"    alert {action} {key} {reason}")

    def _database_now(self) -> int:
        return self.scheduler.now

    def _note(self, name: str, result: object) -> None:
        """What a statement brought, for the trace."""
        if self.scheduler.trace is None:
            return
        rows = ", ".join(
            f"{row.idempotency_key} {row.status.value}"
            for row in self.ledger.orders.values()
        )
        said = result if isinstance(result, bool | int) else bool(result)
        self.scheduler.say(f"    {name} -> {said}; ledger: {rows}")

"""The deployed function: a Kafka record becomes exactly one recharge.

Read in this order, which is the order of one event, then of what surrounds it:

    gunicorn.conf.py  the container's server
    main.py           wires the parts; one HTTP status per outcome
    heads.py          reads a request's head within bounds
    door.py           reads its body within bounds
    event_tokens.py   who may post, where it is asked; issuer_keys.py by whose keys
    events.py         CloudEvent -> TopUp
    json_bound.py     how much memory a JSON text may become
    patience.py       how long what can't become an order is delivered again
    placement.py      did the record come where its subscriber's records must come
    processing.py     claim, recharge, settle; doubt
    circuit_breaker.py  when most calls fail, none is made for a while
    attempt_end.py    what becomes of an order when its call has ended: the truth table
    ledger.py         the statements; schema.py the tables; database.py connections
    recharge_api.py   the call; api_profile.py its meaning, closed_table.py how its file
                      is read; api_auth.py credentials;
                      http_exchange.py one request under a deadline, http_answer.py
                      where an answer begins and ends; retry_after.py
    model.py          statuses, transitions, outcomes; errors.py the error tree
    resolver.py       what the source will not bring again: doubt settled, line drained
    operations.py     what people do: look, decide, pause; grants.py their rights,
                      rules.py what binds them
    retention.py      what goes: purge, payloads, a forgotten number
    reconcile.py      the API operator's statement against the ledger
    replay.py         quarantine and dead letters through the front door again
    doctor/           is the cluster as it must be; its __init__.py has its order
    plan.py           partitions, pods and threads for a wished rate
    config.py         settings; telemetry.py logs; migrate.py and cli.py for operators;
                      durations.py reads `PT1M` and `44d`

Imports go one way, from right to left (tests/repo/test_imports.py holds this table):
"""

#: Who may import whom: a module imports only modules of the rows above its own.
LAYERS = (
    ("errors", "model", "durations", "doctor.diagnosis", "doctor.documents"),
    ("http_answer", "retry_after", "circuit_breaker", "closed_table", "json_bound"),
    ("http_exchange",),
    ("config", "telemetry", "placement", "heads", "door", "plan", "doctor.cluster"),
    ("api_profile", "api_auth", "events", "schema", "database", "issuer_keys"),
    ("rules", "attempt_end"),
    ("migrate", "ledger", "recharge_api", "processing", "event_tokens"),
    ("patience",),
    ("operations", "retention", "reconcile", "replay", "grants", "resolver"),
    ("doctor.ledger", "doctor.api", "doctor.source", "doctor.topics"),
    ("doctor.pods", "doctor.scaling"),
    ("doctor.examination",),
    ("doctor.command",),
    ("main", "cli", "gunicorn.conf"),
)

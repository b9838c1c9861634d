"""The article's own design, as short as it tells it: what `make demo NAIVE=1` plays.

Owns how a careful reader of the article would build it: one transaction around insert,
call and commit, and a key made of group, topic, partition and offset. Must never be
deployed: it recharges twice and loses orders, which is what the demo is there to show.
"""

import os

import functions_framework
import requests
from cloudevents.http import CloudEvent
from sqlalchemy import Column, MetaData, String, Table, create_engine, insert
from sqlalchemy.exc import IntegrityError

ca_file = os.environ.get("LEDGER_TLS_CA_FILE")
engine = create_engine(
    os.environ["LEDGER_DATABASE_URL"],
    connect_args={"ssl": {"ca": ca_file}} if ca_file else {},
)
processed = Table(
    "processed", metadata := MetaData(), Column("id", String(200), primary_key=True)
)
metadata.create_all(engine)


@functions_framework.cloud_event
def handle_topup(event: CloudEvent) -> None:
    """Recharge, unless the record was processed before; any error is redelivered."""
    position = (event["topic"], event["knativekafkapartition"])
    key = "#".join([os.environ["GROUP"], *position, event["knativekafkaoffset"]])
    try:
        with engine.begin() as transaction:
            transaction.execute(insert(processed).values(id=key))
            answer = requests.post(
                os.environ["RECHARGE_API_URL"] + "/recharges",
                json=event.data,
                headers={"Idempotency-Key": key},
                timeout=10,
            )
            answer.raise_for_status()
    except IntegrityError:
        print(f"{key} was processed before")

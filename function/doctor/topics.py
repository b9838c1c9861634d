"""Whether the topics keep order and records, and the ledger outlasts them.

Owns what is checked about KafkaTopics and retention; must never read anything itself.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from function.config import Settings
from function.doctor import documents as kinds
from function.doctor.diagnosis import Diagnosis, error, ok, skipped, unknown, warning
from function.doctor.documents import Document, Parts, at, items, number, subject_of
from function.durations import age_s, shown
from function.retention import Horizon

_COPIES_MIN: Final = 3
#: Kafka's own default, where a topic says nothing.
_RETENTION_DEFAULT_S: Final = 604_800.0


def retention_s(topic: Document | None) -> float | None:
    """How long a topic keeps a record; None without a topic, infinity for ever."""
    if topic is None:
        return None
    told = at(topic, "spec", "config", "retention.ms")
    if told is None:
        return _RETENTION_DEFAULT_S
    milliseconds = number(told)
    if milliseconds is None:
        return None
    return float("inf") if milliseconds < 0 else milliseconds / 1000


def check_topics(parts: Parts, settings: Settings | None) -> Iterator[Diagnosis]:
    """Everything about the two topics.

    Args:
        parts: what was read.
        settings: the function's; None when they can't be known.

    """
    if parts.topic is None and parts.source is not None:
        yield from _not_declared(parts)
    for topic in (parts.topic, parts.dead_letter_topic):
        if topic is not None:
            yield from _topic(topic)
    if settings is not None:
        yield from _retention(parts, settings)
        yield from _purges(parts, settings)


def _not_declared(parts: Parts) -> Iterator[Diagnosis]:
    documents = parts.documents
    subject = f"topic {next(iter(kinds.topics_of(parts.source)), '?')}"
    message = "no KafkaTopic declares it: its retention was not compared"
    if not documents.is_live:
        yield skipped(subject, message)
    elif documents.is_readable(kinds.KAFKA_TOPIC):
        yield unknown(
            subject,
            message,
            "compare retention.ms with TOPIC_RETENTION_S, and say --partitions N",
        )


def _topic(topic: Document) -> Iterator[Diagnosis]:
    subject = subject_of(topic)
    config = at(topic, "spec", "config")
    if "compact" in str(at(config, "cleanup.policy") or "delete"):
        yield error(
            subject,
            "is compacted: of a subscriber's orders only the last would be kept",
            "set cleanup.policy: delete",
        )
    copies = number(at(topic, "spec", "replicas")) or 0
    in_sync = number(at(config, "min.insync.replicas"))
    if copies < _COPIES_MIN:
        yield warning(
            subject,
            f"has {copies:g} copies: with one broker orders are lost",
            f"set replicas: {_COPIES_MIN} where it is for real money",
        )
    elif in_sync is None or in_sync < 2:  # noqa: PLR2004
        yield error(
            subject,
            "min.insync.replicas is not 2: an acknowledged order may be on one broker "
            "alone",
            "set min.insync.replicas: 2",
        )
    if str(at(config, "unclean.leader.election.enable")).lower() == "true":
        yield error(
            subject,
            "unclean.leader.election.enable: acknowledged orders may vanish",
            "remove it",
        )


def _retention(parts: Parts, settings: Settings) -> Iterator[Diagnosis]:
    pairs: Sequence[tuple[str, float, Document | None]] = (
        ("TOPIC_RETENTION_S", settings.topic_retention_s, parts.topic),
        (
            "DEAD_LETTER_RETENTION_S",
            settings.dead_letter_retention_s,
            parts.dead_letter_topic,
        ),
    )
    for name, told_s, topic in pairs:
        real_s = retention_s(topic)
        if topic is None or real_s is None:
            continue
        subject = subject_of(topic)
        if real_s == float("inf"):
            yield error(
                subject,
                "keeps its records for ever: no purge of the ledger can be safe",
                "set retention.ms",
            )
        elif told_s < real_s:
            yield error(
                subject,
                f"keeps a record for {shown(real_s)}, {name} says {shown(told_s)}: the "
                "ledger may forget an order that comes again",
                f"set {name}: {real_s:g}",
            )
        else:
            yield ok(subject, f"keeps a record no longer than {name} says")


def _purges(parts: Parts, settings: Settings) -> Iterator[Diagnosis]:
    """Every CronJob that purges the ledger, which refuses what is too young."""
    horizon = Horizon.of(settings)
    for job in parts.documents.of_kind(kinds.CRON_JOB):
        for container in items(kinds.pod_spec(job).get("containers")):
            words = _words(container)
            if "purge" not in words or "--payloads" in words:
                continue
            older = _option(words, "--older-than")
            age = age_s(older or "")
            if age is None:
                yield error(
                    subject_of(job),
                    f"purges with --older-than {older or 'missing'}, which is no age",
                    f"say at least {horizon.total_s / 86_400:g}d",
                )
            elif age < horizon.total_s:
                yield error(
                    subject_of(job),
                    f"purges what is older than {shown(age)}, less than "
                    f"{horizon.arithmetic()}",
                    f"say at least {horizon.total_s / 86_400:g}d",
                )
            else:
                yield ok(
                    subject_of(job),
                    f"the ledger is kept for {shown(age)}, at least "
                    f"{horizon.arithmetic()}",
                )


def _words(container: Document) -> list[str]:
    return kinds.texts(container.get("command")) + kinds.texts(container.get("args"))


def _option(words: list[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None

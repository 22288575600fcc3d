"""The tables of the server: its whole state after `kill -9`, beside the blobs.

    runs ─┬─ models         a version after every committed round; version 0 is the initial model
          ├─ tokens         single-use permissions to enrol, as hashes
          ├─ sign_ins       keys and sessions of the dashboard, as hashes
          ├─ devices        `client` is the order of enrolment, and the index in random streams
          └─ rounds ─┬─ assignments ── uploads      a device at work; the bytes it is sending
                     ├─ reports                     accepted, at most one for each device
                     ├─ ledger                      what a committed round released
                     └─ evaluations
    audit, leader

Times are `*_ms`: milliseconds since 1970 on the servers' common time (`clock`). Ids are random, 32
hexadecimal digits, except a device's, which is derived from its key.

A small vector stands in its row (`content`); a large one is a blob, of which the row has the `key`.

Compatibility: a change of this file is a new migration; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

OPEN = ("SELECTING", "TRAINING", "AGGREGATING")
TAKING = ("SELECTING", "TRAINING")
# As texts, since a partial index serves only a query with its exact words, without bound values.
OPEN_ROUND = text("state IN ('SELECTING', 'TRAINING', 'AGGREGATING')")
ACTIVE = text("state = 'active'")
UNSWEPT = text("swept = false")


def _id() -> Column[str]:
    return Column("id", String(32), primary_key=True)


def _run(*, primary_key: bool = False, index: bool = False) -> Column[str]:
    run = ForeignKey("runs.id")
    return Column("run", String(32), run, nullable=False, primary_key=primary_key, index=index)


runs = Table(
    "runs",
    metadata,
    _id(),
    Column("name", String(200), nullable=False, unique=True),
    Column("experiment", Text, nullable=False),
    Column("settings", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("plan", Text, nullable=False),  # what devices do with the model
    Column("seed", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),  # running, paused, finished
    Column("reason", Text, nullable=False),  # why it is paused
    Column("round", Integer, nullable=False),  # the last committed one
    Column("version", Integer, nullable=False),  # of the model
    Column("evaluated", Integer, nullable=False),  # the last round with a settled evaluation
    Column("attempt", Integer, nullable=False),  # at the next round
    Column("strikes", Integer, nullable=False),  # abandoned since the last success or resume
    Column("created_ms", BigInteger, nullable=False),
    Column("begun", Text),  # JSON, the keys that its file gave at first; NULL: an older version's
    Column("epoch", BigInteger, nullable=False, server_default="0"),  # of its manifests
)

models = Table(
    "models",
    metadata,
    _run(primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("round", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("key", String(200), nullable=False),  # of the blob; empty where the content is here
    Column("num_bytes", BigInteger, nullable=False),
    Column("optimizer_key", String(200)),
    Column("created_ms", BigInteger, nullable=False),
    Column("content", LargeBinary),
)

tokens = Table(
    "tokens",
    metadata,
    Column("hash", String(64), primary_key=True),
    _run(),
    Column("expires_ms", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("device", String(32)),  # who used it
)

sign_ins = Table(
    "sign_ins",
    metadata,
    Column("hash", String(64), primary_key=True),
    _run(),
    Column("kind", String(16), nullable=False),  # key, session
    Column("expires_ms", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

devices = Table(
    "devices",
    metadata,
    _id(),
    _run(),
    Column("client", Integer, nullable=False),
    Column("public_key", LargeBinary(32), nullable=False),
    Column("name", String(200), nullable=False),
    Column("device_class", String(200), nullable=False),
    Column("sequence", BigInteger, nullable=False),  # of its last signed request
    Column("enrolled_ms", BigInteger, nullable=False),
    Column("seen_ms", BigInteger, nullable=False),  # of its last signed request
    Column("revoked_ms", BigInteger),
    Column("lowered", Integer, nullable=False, server_default="0"),  # reports that counted less
    Column("lowered_round", Integer),  # the last of them, and the share that it asked for
    Column("lowered_share", Float),
    Column("left", String(32)),  # why it is not expected (`leaving`); NULL: it is
    Index("uq_devices_client", "run", "client", unique=True),
)

rounds = Table(
    "rounds",
    metadata,
    _id(),
    _run(),
    Column("kind", String(16), nullable=False),  # train, evaluate
    Column("number", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("goal", Integer, nullable=False),
    Column("minimum", Integer, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("version", Integer, nullable=False),  # of the model that devices receive
    Column("cohort", Text),  # JSON, the client indices; NULL when whoever checks in is selected
    Column("selection_deadline_ms", BigInteger),  # NULL until the first device is selected
    Column("report_deadline_ms", BigInteger),  # NULL until TRAINING
    Column("opened_ms", BigInteger, nullable=False),
    Column("started_ms", BigInteger),  # NULL until the first device is selected
    Column("closed_ms", BigInteger),
    Column("swept", Boolean, nullable=False),  # its blobs are gone
    Index("uq_rounds_attempt", "run", "kind", "number", "attempt", unique=True),
    Index(
        "uq_rounds_open",
        "run",
        unique=True,
        sqlite_where=OPEN_ROUND,
        postgresql_where=OPEN_ROUND,
    ),
    Index("ix_rounds_unswept", "id", sqlite_where=UNSWEPT, postgresql_where=UNSWEPT),
)

assignments = Table(
    "assignments",
    metadata,
    _id(),
    Column("round", String(32), ForeignKey("rounds.id"), nullable=False),
    Column("device", String(32), ForeignKey("devices.id"), nullable=False),
    Column("client", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # active, reported, expired, failed
    Column("reason", Text, nullable=False),
    Column("assigned_ms", BigInteger, nullable=False),
    Column("lease_ms", BigInteger, nullable=False),
    Index("ix_assignments_round", "round", "state"),
    Index("ix_assignments_device", "device"),
    Index(
        "uq_assignments_active",
        "round",
        "device",
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    ),
)

uploads = Table(
    "uploads",
    metadata,
    _id(),
    Column("assignment", String(32), ForeignKey("assignments.id"), nullable=False, unique=True),
    Column("round", String(32), ForeignKey("rounds.id"), nullable=False, index=True),
    Column("device", String(32), ForeignKey("devices.id"), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("codec", String(32), nullable=False),
    Column("weight", Float, nullable=False),
    Column("loss", Float, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Column("part", String(32)),  # where its bytes are, since it began again; NULL: by its id
)

reports = Table(
    "reports",
    metadata,
    # A round's id stands for its number and attempt: one report for (device, round, attempt).
    Column("round", String(32), ForeignKey("rounds.id"), primary_key=True),
    Column("device", String(32), ForeignKey("devices.id"), primary_key=True),
    Column("assignment", String(32), ForeignKey("assignments.id"), nullable=False),
    Column("client", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("codec", String(32), nullable=False),
    Column("weight", Float, nullable=False),  # as it was claimed
    Column("norm", Float),  # of what is trained; NULL of metrics, and of older versions
    Column("statistics_norm", Float),
    Column("counted", Float),  # the weight in the model, where it was lowered
    Column("loss", Float, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Column("key", String(200)),  # of the blob, of an update that was uploaded
    Column("metrics", Text),  # JSON, name: [sum, count]
    Column("accepted_ms", BigInteger, nullable=False),
    Column("content", LargeBinary),  # of an update that came inside its report, until it is swept
)

ledger = Table(
    "ledger",
    metadata,
    Column("round", String(32), ForeignKey("rounds.id"), primary_key=True),
    _run(index=True),
    Column("kind", String(16), nullable=False),
    Column("number", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("version", Integer, nullable=False),  # after the round
    Column("model_sha256", String(64), nullable=False),
    Column("accepted", Integer, nullable=False),
    Column("accepted_sha256", String(64), nullable=False),
    Column("weight", Float, nullable=False),
    Column("loss", Float),
    Column("median_loss", Float),  # over the reports; NULL before there were any
    Column("uplink_bytes", BigInteger, nullable=False),
    Column("downlink_bytes", BigInteger, nullable=False),
    Column("committed_ms", BigInteger, nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    _run(primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), primary_key=True),  # central, federated
    Column("metrics", Text, nullable=False),  # JSON, name: value
    Column("medians", Text),  # the same over devices, of a federated one
    Column("num_devices", Integer, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(64), nullable=False),
    Column("detail", Text, nullable=False),  # JSON
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)

leader = Table(
    "leader",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
    Column("holder", String(32), nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("heartbeat_ms", BigInteger, nullable=False),
)

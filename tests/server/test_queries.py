"""Every statement that a request or the leader executes finds its rows by an index.

A walk through all routes and a whole run's events records the statements; the database is then
asked for their plans.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import defaultdict

import pytest
from sqlalchemy import event, insert, text, update
from test_dashboard import browser, enter, key_of

from fleet import Fleet, fingerprint
from messages import check_in
from potluck.core import RefusedError
from potluck.protocol import (
    ROUTES,
    Accepted,
    Assignment,
    Error,
    Evaluation,
    Failed,
    Finished,
    Preview,
    Progress,
    Wait,
    encode_message,
    new_key,
    parse_invitation,
    public_key,
)
from potluck.server.console import Lines
from potluck.server.dashboard.render import Renderer
from potluck.server.rounds.uploads import find_report
from potluck.server.storage.database_tables import (
    assignments,
    evaluations,
    ledger,
    metadata,
    models,
    reports,
    rounds,
    runs,
)
from remote import Served, read

FEW = {"runs", "leader", "sign_ins"}
"""Tables of a handful of rows."""
ONCE = re.compile(r"UPDATE .*\sWHERE \w+\.(created|seen)_ms > ", re.DOTALL)
"""What a server that takes the lead brings back after a clock that was ahead; no request does."""
NOTHING = hashlib.sha256(bytes(12)).hexdigest()
PARTIAL = {
    index.name
    for table in metadata.tables.values()
    for index in table.indexes
    if index.dialect_options["sqlite"]["where"] is not None
}
"""Indexes of what is open or active alone, which may be read from end to end."""


def recorded(engine):
    """The statements of an engine with parameters of each, as they are executed."""
    found = {}

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, parameters, _context, many):
        found[statement] = parameters[0] if many and parameters else parameters

    return found


def unindexed(db, statement, values):
    """The tables that the plan of a statement reads from one end to the other."""
    if statement.split()[0] not in ("SELECT", "UPDATE", "DELETE", "INSERT"):
        return []
    if db.dialect.name == "sqlite":
        steps = [row[3] for row in db.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)]
        if "WHERE" not in statement and "LIMIT" in statement and len(steps) == 1:
            return []  # the first rows in the order of an index
        scans = [re.match(r"SCAN (\w+)(?: USING (?:COVERING )?INDEX (\w+))?$", s) for s in steps]
        return [scan[1] for scan in scans if scan and scan[2] not in PARTIAL]
    (plan,) = db.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", values).one()
    return list(_scans(plan[0]["Plan"]))


def _scans(node, limited=False):
    limited = limited or node["Node Type"] == "Limit"
    has_condition = "Index Cond" in node or limited
    has_condition = has_condition or node.get("Index Name") in PARTIAL
    if node["Node Type"] == "Seq Scan" or ("Index" in node["Node Type"] and not has_condition):
        yield node.get("Relation Name", node.get("Index Name"))
    for below in node.get("Plans", ()):
        yield from _scans(below, limited)


class Walk:
    """Three devices, an operator, a browser and the leader, in a run of two rounds of each kind."""

    def __init__(self, served):
        self.served, self.asked = served, set()
        self.devices = [self._watched(served.device()) for _ in range(3)]

    def _watched(self, caller):
        send = caller.send

        def noted(method, path, *arguments, **options):
            named = re.sub(r"offset=\d+", "offset={offset}", path)
            named = re.sub(r"models/[0-9a-f]{64}", "models/{sha256}", named)
            self.asked.add((method, re.sub(r"uploads/[0-9a-f]{32}", "uploads/{upload}", named)))
            return send(method, path, *arguments, **options)

        caller.send = noted
        return caller

    def run(self):
        self.preview()
        for number in range(2):
            self.train(is_inline=number == 1)
            self.evaluate()
            self.dashboard()
        self.until_asked(self.devices[0], Finished)

    def train(self, *, is_inline):
        """A round whose third device is late; two report, in a body each or inside the report."""
        given = [self.until_asked(device, Assignment) for device in self.devices]
        digest = json.loads(given[0].manifest)["sha256"]
        bodies = [fingerprint(one.client, 4).astype("<f4").tobytes() for one in given]
        for device, one in zip(self.devices, given, strict=True):
            assert device.send("GET", f"/v1/models/{digest}").status_code == 200
            device.ask("progress", Progress(assignment=one.assignment, phase="train", fraction=0.5))
        late = self.devices[2].report(given[2], bodies[2]).upload
        self.devices[2].put(late, 0, bodies[2][:8])
        if is_inline:
            self.devices[2].ask("failure", Failed(assignment=given[2].assignment, reason="error"))
        sent = []
        for device, one, body in zip(self.devices[:2], given, bodies, strict=False):
            if is_inline:
                update = base64.b64encode(body).decode()
                assert isinstance(device.report(one, body, update=update), Accepted)
            else:
                sent.append((device, device.report(one, body).upload))
                assert isinstance(device.put(sent[-1][1], 0, body), Accepted)
        for device, upload in [*sent, *sent]:  # also once what was sent is swept
            assert isinstance(read(device.send("GET", f"/v1/uploads/{upload}")), Accepted)
            self.served.run.service.sweep()
        for upload in (late, "0" * 32):
            assert isinstance(read(self.devices[2].send("GET", f"/v1/uploads/{upload}")), Error)

    def evaluate(self):
        for device in self.devices[:2]:
            given = self.until_asked(device, Assignment)
            assert given.kind == "evaluate"
            names = ("assignment", "round", "attempt")
            place = {name: getattr(given, name) for name in names}
            device.ask("evaluation", Evaluation(**place, metrics={"accuracy": (1.0, 2)}))

    def until_asked(self, device, kind):
        """What a device is told that asks until it is told that."""
        while not isinstance(answer := device.check_in(), kind):
            assert isinstance(answer, Wait), answer
            time.sleep(0.05)
        return answer

    def preview(self):
        """Who looks at the run before enrolling."""
        token, key, device = (
            parse_invitation(self.served.invite()).token,
            new_key(),
            self.devices[0],
        )
        body = encode_message(Preview(token=token, public_key=public_key(key).hex()))
        headers = device.signed("POST", "/v1/preview", body, key=key)
        read(device.send("POST", "/v1/preview", body, headers=headers))

    def dashboard(self):
        with browser(self.served) as client:
            assert enter(client, key_of(self.served)).status_code == 303
            assert client.get("/dashboard").status_code == 200
            with client.stream("GET", "/dashboard/events") as stream:
                assert next(line for line in stream.iter_lines() if line.startswith("event"))
            assert client.post("/dashboard/sign-out").status_code == 303


def test_no_statement_of_a_request_reads_a_table_from_end_to_end(tmp_path, places):
    settings = {"minimum": 1.0, "over_selection": 1.5, "federated_every": 1, "num_rounds": 2}
    with Served(tmp_path, places=places(), count=2, **settings) as served:
        engine = served.run.service.database.engine
        found = recorded(engine)
        walk = Walk(served)
        walk.run()
        assert walk.asked >= {(r.method, r.path) for r in ROUTES} - {("POST", "/v1/enrol")}
        statements = {s: values for s, values in found.items() if not ONCE.search(s)}
        with engine.begin() as db:
            if db.dialect.name == "postgresql":
                db.execute(text("SET LOCAL enable_seqscan = off"))
            read = {s: unindexed(db, s, values) for s, values in statements.items()}
    bad = [f"{steps}: {' '.join(s.split())}" for s, steps in read.items() if set(steps) - FEW]
    assert not bad, "\n\n".join(bad)


def past(fleet, num_rounds):
    """Rounds that a run might have had: reported by all, committed and evaluated."""
    service, run = fleet.service, fleet.run
    made = defaultdict(list)
    judged = {"metrics": '{"accuracy": 0.5}', "num_devices": 0, "created_ms": 0}
    made[evaluations].append({"run": run, "round": 0, "kind": "central"} | judged)
    for number in range(1, num_rounds + 1):
        id, times = f"{number:032d}", {"opened_ms": number, "started_ms": number}
        over = {"state": "COMMITTED", "reason": "", "closed_ms": number + 1, "swept": True}
        sizes = {"goal": 3, "minimum": 3, "slots": 3, "version": number - 1}
        place = {"run": run, "kind": "train", "number": number, "attempt": 1}
        made[rounds].append({"id": id} | place | sizes | over | times)
        committed = {"version": number, "model_sha256": id, "accepted": 3, "accepted_sha256": id}
        committed |= {"weight": 3.0, "uplink_bytes": 9, "downlink_bytes": 9, "committed_ms": number}
        made[ledger].append({"round": id} | place | committed)
        version = {"sha256": NOTHING, "key": "", "num_bytes": 12, "created_ms": number}
        version["content"] = bytes(12)
        made[models].append({"run": run, "version": number, "round": number} | version)
        made[evaluations].append({"run": run, "round": number, "kind": "central"} | judged)
        for client, device in enumerate(fleet.devices):
            key, who = f"{number:028d}{client:04d}", {"round": id, "device": device}
            times = {"assigned_ms": 0, "lease_ms": 0, "state": "reported", "reason": ""}
            made[assignments].append({"id": key, "client": client} | who | times)
            sent = {"assignment": key, "client": client, "sha256": key, "num_bytes": 12}
            sent |= {"codec": "float32", "weight": 1.0, "loss": 0.1, "num_steps": 1}
            made[reports].append(who | sent | {"key": f"reports/{id}/{key}", "accepted_ms": 0})
    with service.database.write() as db:
        for table, rows in made.items():
            db.execute(insert(table), rows)
        db.execute(update(runs).values(round=num_rounds, version=num_rounds))


def work(folder, num_rounds):
    """The steps of SQLite's machine in what is asked after so many rounds."""
    fleet = Fleet(f"sqlite:///{folder}/{num_rounds}.db", folder / "blobs", count=3)
    service, run = fleet.service, fleet.run
    past(fleet, num_rounds)
    renderer, lines = Renderer(service, run), Lines(service, run)
    renderer.snapshot(), lines.poll()  # these read it all
    count, steps = [0], {}
    event.listen(service.database.engine, "checkout", lambda c, *_: meter(c, count))

    def measured(name, call):
        before = count[0]
        call()
        steps[name] = count[0] - before

    def unknown_upload():
        with pytest.raises(RefusedError):
            find_report(service, fleet.devices[0], "f" * 32)

    measured("tick", service.tick)
    measured("check-in", lambda: check_in(service, fleet.devices[0]))
    measured("unknown upload", unknown_upload)
    measured("report", lambda: fleet.take_part(fleet.devices[0]))
    for device in fleet.devices[1:]:
        fleet.take_part(device)
    measured("commit", service.tick)
    measured("sweep", service.sweep)
    measured("evaluation", lambda: service.evaluate(run, lambda _: {"accuracy": 0.5}))
    measured("dashboard", renderer.snapshot)
    measured("lines", lines.poll)
    measured("status", fleet.status)
    service.close()
    return steps


def meter(connection, count):
    def passed():
        count[0] += 10

    connection.set_progress_handler(passed, 10)


def test_what_a_request_reads_does_not_grow_with_the_rounds_that_are_over(tmp_path):
    few, many = work(tmp_path, 20), work(tmp_path, 420)
    assert few.keys() == many.keys()
    grown = {name: many[name] - steps for name, steps in few.items()}
    # The dashboard counts the rounds in an index, eight steps for each; a row would take twenty.
    assert all(grown[name] < (4000 if name in ("dashboard", "lines") else 200) for name in grown)

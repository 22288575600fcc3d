"""Joining a run: enrol once with an invitation, then take part.

for event in join(url, invitation, home, trainer): ...
"""

from __future__ import annotations

import platform
import re
import resource
import signal
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from potluck.config.plan import read_plan
from potluck.core import ConfigError, RefusedError
from potluck.device.agent import OFFERS, Agent, Event
from potluck.device.clock import Clock, Stopped, SystemClock
from potluck.device.connection import Connection
from potluck.device.consent import Ask, Consent
from potluck.device.eligibility import LinuxSensor, Sensor
from potluck.device.folder import Enrolment, Home
from potluck.device.policy import Policy
from potluck.device.sent_log import Record
from potluck.device.trainer import Trainer
from potluck.device.trouble import PASSES, Backoff, Trouble
from potluck.protocol import (
    VERSION,
    Enrol,
    Enrolled,
    Preview,
    Previewed,
    fingerprint,
    parse_invitation,
    public_key,
    verify_manifest,
)
from potluck.protocol.invitation import Invitation
from potluck.protocol.messages import DEVICE_NAME


def join(
    url: str,
    invitation: str | None,
    folder: Path | str,
    trainer: Trainer,
    *,
    name: str | None = None,
    sensor: Sensor | None = None,
    clock: Clock | None = None,
    limit_bytes: int | None = None,
    policy: Policy | None = None,
    ask: Ask = lambda told: True,
    offers: tuple[str, ...] = OFFERS,
    proxy: str | None = None,
) -> Generator[Event]:
    """Takes part in the run of an invitation until it is over.

    Args:
        invitation: what `potluck enroll` printed; not needed by a device that is enrolled.
        folder: the device's own; see `Home`.
        limit_bytes: the most that it sends in a day.
        policy: what the owner lets a run do.
        ask: shows the owner what the run is to do, before this device enrols and whenever that
            changes, and returns the answer; without it the caller has agreed.
        offers: what it accepts: codecs, and `inline` for small vectors inside messages.
        proxy: the http://host:port of an HTTP proxy that leads to the server.

    Raises:
        ConfigError: no invitation and not enrolled, or enrolled elsewhere. Or the data do not fit
            the run, the policy forbids it, or the owner does not agree. A new device's invitation
            stays valid.
        DataError: the same, of the data alone.
        RefusedError: the invitation cannot be used, or the device was revoked.
        RunError: the folder cannot be used. Any other trouble is waited out (`trouble`).
    """
    if name is not None and not re.fullmatch(DEVICE_NAME, name):
        raise ConfigError(
            "a device's name must be 1 to 64 letters, digits, spaces, dots, underscores and "
            f"hyphens, got name={name[:80]!r}. Shorten it, or leave it out."
        )
    clock, senses = clock or SystemClock(), sensor or LinuxSensor()
    rules = policy or Policy()
    invited = None if invitation is None else parse_invitation(invitation)
    trouble = Trouble(Backoff(clock))
    home = _open(folder, trouble)

    def attempt() -> Generator[Event]:
        record = Record(home.folder / "sent", limit_bytes, rules)
        enrolment = home.enrolment()
        if enrolment is None:
            if invited is None:
                raise ConfigError(
                    f"a device must be invited, got none and no enrolment in {str(folder)!r}. "
                    "Give --token the string that `potluck enroll` printed."
                )
            home.expect(invited.token)
            consent = Consent(home, rules, trainer, invited.server_key, ask)
            pins = (invited.certificate, invited.server_key)
            with Connection(url, *pins, home, record, clock, proxy=proxy) as connection:
                preview(invited, home, connection, record, consent)
                enrolment = enrol(url, invited, home, connection, trainer, name)
            yield Event("enrolled", 0, f"in {enrolment.run}")
        else:
            consent = Consent(home, rules, trainer, enrolment.server_key, ask)
            if invited is not None:
                _check_same(enrolment, invited, home)
        while True:
            # A server may move; its certificate, run and key may not.
            pins = (enrolment.certificate, enrolment.server_key)
            try:
                with Connection(url, *pins, home, record, clock, proxy=proxy) as connection:
                    told = (record, trainer, senses, clock, consent, rules, offers)
                    yield from Agent(home, enrolment, connection, *told).work()
                return
            except RefusedError as error:
                if error.code != "unknown":
                    raise
                again = _invited_again(enrolment, invited, home, error)
            home.expect(again.token)
            with Connection(url, *pins, home, record, clock, proxy=proxy) as connection:
                enrolment = enrol_again(url, again, home, connection, trainer, name)
            yield Event("enrolled", 0, f"in {enrolment.run} again, whose server was restored")

    try:
        while True:
            try:
                with closing(attempt()) as events:
                    for event in events:
                        if event.what not in ("failed", "refused"):
                            trouble.over()
                        yield event
                return
            except PASSES as error:
                code = error.code if isinstance(error, RefusedError) else ""
                if code == "revoked" or (code == "token" and home.enrolment() is None):
                    raise
                trouble.wait(error)
    finally:
        home.close()


def _open(folder: Path | str, trouble: Trouble) -> Home:
    while True:
        try:
            return Home(folder)
        except OSError as error:  # a full disk; what a person must mend is a RunError
            trouble.wait(error)


def run_until_stopped(
    url: str,
    invitation: str | None,
    folder: Path,
    trainer: Trainer,
    *,
    show: Callable[[Event], None],
    policy: Policy | None = None,
    **options: Any,
) -> bool:
    """Takes part until the run is over, or until SIGTERM or Ctrl-C. Returns whether it is over.

    Call it in the main thread: the signals end it at once. `options` are those of `join`.
    """
    clock = SystemClock()

    def stop(number: int, frame: object) -> None:
        clock.interrupt()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        events = join(url, invitation, folder, trainer, clock=clock, policy=policy, **options)
        with closing(events), bounded_memory(policy):
            for event in events:
                show(event)
    except BaseException as error:
        if not _is_of_a_stop(error):
            raise
        return False
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return True


def _is_of_a_stop(error: BaseException | None) -> bool:
    """Returns whether a stop ended the work, or failed it during the clean-up."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


@contextmanager
def bounded_memory(policy: Policy | None) -> Generator[None]:
    """Lets the system enforce the owner's bound: beyond it an allocation fails."""
    if policy is None or policy.max_memory_bytes is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    hard = before[1]
    most = policy.max_memory_bytes if hard < 0 else min(policy.max_memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def preview(
    invited: Invitation, home: Home, connection: Connection, record: Record, consent: Consent
) -> None:
    """Asks for consent and tries the data on the run's plan, before the invitation is used.

    Raises:
        ConfigError, DataError: they do not fit, or the owner or the policy says no.
        RefusedError: the token could not be used.
    """
    message = Preview(token=invited.token, public_key=public_key(home.key()).hex())
    answer = connection.ask(f"/v{VERSION}/preview", message, Previewed)
    connection.correct_clock(answer.server_time_ms)
    manifest = verify_manifest(
        answer.manifest.encode(),
        bytes.fromhex(answer.signature),
        bytes.fromhex(invited.server_key),
        run=invited.run,
        now_ms=connection.now_ms(),
        last_seen_version=0,
    )
    record.add_manifest(connection.now_ms(), answer.manifest, answer.signature)
    consent.require(manifest, read_plan(manifest.plan))


def enrol(
    url: str,
    invited: Invitation,
    home: Home,
    connection: Connection,
    trainer: Trainer,
    name: str | None,
) -> Enrolment:
    """Uses an invitation's token. Safe to repeat: the same key gets the same answer.

    Raises:
        RefusedError: the token is unknown, used or expired; or the server is another.
    """
    key = public_key(home.key())
    message = Enrol(
        token=invited.token,
        public_key=key.hex(),
        name=name,
        runtime=trainer.runtime(),
        device_class=f"{platform.system()}-{platform.machine()}".lower() or "unknown",
    )
    answer = connection.ask(f"/v{VERSION}/enrol", message, Enrolled)
    connection.correct_clock(answer.server_time_ms)
    expected = (invited.run, invited.server_key, fingerprint(key))
    if (answer.run, answer.server_key, answer.device) != expected:
        raise RefusedError(
            "token",
            f"the server must be that of the invitation (run={invited.run!r}), got "
            f"run={answer.run!r} with another key. Ask for another invitation.",
        )
    enrolment = Enrolment(
        url=url,
        device=answer.device,
        run=answer.run,
        server_key=answer.server_key,
        certificate=invited.certificate,
    )
    home.keep_enrolment(enrolment)
    return enrolment


def _invited_again(
    enrolment: Enrolment, invited: Invitation | None, home: Home, error: RefusedError
) -> Invitation:
    """Returns what a device enrols with again that is unknown to its server."""
    if invited is not None:
        return invited
    token = home.token()
    if token is None:
        raise error
    return Invitation(
        token=token,
        run=enrolment.run,
        server_key=enrolment.server_key,
        certificate=enrolment.certificate,
    )


def enrol_again(
    url: str,
    invited: Invitation,
    home: Home,
    connection: Connection,
    trainer: Trainer,
    name: str | None,
) -> Enrolment:
    """Enrols at a server that was restored from a backup of before this device came.

    Raises:
        RefusedError: revoked: the device is enrolled there, and was revoked; unknown: so is the
            invitation.
    """
    try:
        return enrol(url, invited, home, connection, trainer, name)
    except RefusedError as error:
        if error.code == "unknown":
            raise RefusedError("revoked", str(error)) from None
        if error.code != "token":
            raise
        raise RefusedError(
            "unknown",
            f"the server of run={invited.run!r} must know this device or its invitation, got "
            "neither: it was restored from a backup of before the device came, or begun anew. Ask "
            "whoever runs the server for a new invitation, and give it with --token; if it was "
            "begun anew, with another --home, too.",
        ) from None


def _check_same(enrolment: Enrolment, invited: Invitation, home: Home) -> None:
    pinned = (enrolment.run, enrolment.server_key, enrolment.certificate)
    if pinned != (invited.run, invited.server_key, invited.certificate):
        raise ConfigError(
            f"this device is enrolled in run={enrolment.run!r}, got an invitation of another "
            f"server or run={invited.run!r}. Name another folder with --home, or delete "
            f"{str(home.folder / 'enrolment.json')!r}."
        )

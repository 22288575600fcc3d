"""The commands of a server's operators, while it runs: thin clients of the socket in its folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potluck.cli.options import HOME, Debug, HomeFolder, command

if TYPE_CHECKING:
    from potluck.server.admin.client import Operator

app = typer.Typer(rich_markup_mode=None)

_WAITS = "waiting for a server in {} to start, at most {:g} s (Ctrl-C ends this)"
_WHY_LEFT = {
    "unsupported": "cannot train: its data do not fit",
    "no_data": "cannot train: it has no data",
    "declined": "its owner, or the owner's policy, does not agree to the run",
    "silent": "silent in two rounds: left out until it is back",
}


@app.command()
@command
def enroll(
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many.")] = 1,
    days: Annotated[float, typer.Option(metavar="DAYS", help="Until they expire.")] = 7.0,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="At most, for a server that still starts: 60, or 10 where its folder is missing.",
            show_default=False,
        ),
    ] = None,
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Print invitations, one a line: each lets one device join.

    An invitation is a secret. On the device: potluck join ADDRESS --token INVITATION
    """
    operator = operator_of(home)
    operator.wait(wait, lambda limit: typer.echo(_WAITS.format(home, limit), err=True))
    for invitation in operator.post("enroll", count=count, days=days)["invitations"]:
        typer.echo(invitation)


@app.command()
@command
def status(home: HomeFolder = HOME, debug: Debug = False) -> None:
    """Tell how the run is going."""
    from potluck.cli.table_output import show_pairs, show_table
    from potluck.core import main_metric

    told = operator_of(home).get("status")
    show_pairs(_status_rows(told))
    metrics = {e["round"]: e["metrics"] for e in told["evaluations"] if e["kind"] == "central"}
    metric = main_metric({name for scores in metrics.values() for name in scores} or ["accuracy"])
    rows = [
        (
            str(row["number"]),
            str(row["attempt"]),
            str(row["accepted"]),
            _score("loss", row["loss"]),
            _score("loss", row["median_loss"]),
            _score(metric, metrics.get(row["number"], {}).get(metric)),
        )
        for row in told["rounds"]
        if row["kind"] == "train"
    ]
    if rows:
        typer.echo()
        show_table(("round", "attempt", "reports", "loss", "median loss", f"test {metric}"), rows)
    if told["lowered"]:
        typer.echo()
        show_table(
            ("device that counts for less", "name", "rounds", "the last", "asked for"),
            [_lowered_row(row) for row in told["lowered"]],
        )


@app.command()
@command
def devices(home: HomeFolder = HOME, debug: Debug = False) -> None:
    """List the devices."""
    from potluck.cli.table_output import show_table

    rows = [
        (
            str(row["client"]),
            row["id"],
            row["name"] or "-",
            row["device_class"],
            _moment(row["enrolled_ms"]),
            str(row["lowered"]),
            "revoked" if row["revoked_ms"] else _WHY_LEFT.get(row["left"], "takes part"),
        )
        for row in operator_of(home).get("devices")
    ]
    show_table(("client", "device", "name", "class", "enrolled", "lowered", "state"), rows)


@app.command()
@command
def dashboard(home: HomeFolder = HOME, debug: Debug = False) -> None:
    """Print a link that opens the dashboard in a browser, once and within an hour.

    The link is a secret: who opens it sees the run until signing out, or for a week.
    """
    typer.echo(operator_of(home).post("dashboard")["link"])


@app.command()
@command
def pause(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="For `status`.")] = "",
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Begin no further round; devices at work may finish."""
    operator_of(home).post("pause", reason=reason or "an operator paused it")
    typer.echo("paused. Go on with: potluck resume")


@app.command()
@command
def resume(home: HomeFolder = HOME, debug: Debug = False) -> None:
    """Go on with a paused run."""
    operator_of(home).post("resume")
    typer.echo("resumed")


@app.command()
@command
def abandon(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="For the log.")] = "",
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """End the open attempt at a round without a model; the same round is tried again."""
    operator_of(home).post("abandon", reason=reason or "an operator abandoned it")
    typer.echo("abandoned. The round is tried again, unless the run is paused")


@app.command("fall-back")
@command
def fall_back(
    version: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Else the newest that can be read."),
    ] = None,
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Go on with an older model, where the newest is lost.

    Rounds go on counting. What was learnt since that model is not learnt again.
    """
    asked = {} if version is None else {"version": version}
    told = operator_of(home).post("fall-back", **asked)
    typer.echo(f"the model of version {told['version']} is now version {told['now']}")
    typer.echo("If the run is paused, go on with: potluck resume")


@app.command()
@command
def revoke(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="See `potluck devices`.")],
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Throw a device out, for good; what it reported before stays."""
    operator_of(home).post("revoke", device=device)
    typer.echo(f"revoked: {device}")


@app.command()
@command
def export(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run directory, or a server's folder; the folder of --home if left out. "
            "A name that ends in .safetensors is that of the file to write.",
        ),
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="The file to write.")] = Path(
        "model.safetensors"
    ),
    version: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Of a server: after N commits; else the newest."),
    ] = None,
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Write the trained model as safetensors, with the names of the model's own tensors.

    In PyTorch: model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
    """
    if run is not None and run.suffix == ".safetensors" and not run.is_dir():
        run, to = None, run
    content = _exported(run, version, home)
    to.write_bytes(content)
    typer.echo(f"written: {to} ({len(content)} bytes)")


def _exported(run: Path | None, version: int | None, home: Path) -> bytes:
    """Returns the model of a run directory or, through its server, of a served run."""
    if run is None or (run / "admin.sock").exists() or (run / "admin.key").exists():
        asked = {} if version is None else {"version": version}
        return operator_of(run or home).fetch("export", **asked)
    if not (run / "manifest.json").exists():
        found = sorted(path.parent for path in run.glob("**/manifest.json"))
        hint = f" Name one of these: {', '.join(map(str, found[:5]))}." if found else ""
        raise ValueError(
            f"RUN must be a run directory or a server's folder, got {str(run)!r}.{hint}"
        )
    if version is not None:
        raise ValueError(
            f"--version must be left out for a run directory, which keeps its newest model alone, "
            f"got version={version}."
        )
    from potluck.simulation.runs.export import export_run

    return export_run(run)


@app.command()
@command
def audit(
    since: Annotated[
        str | None,
        typer.Option(
            metavar="HASH",
            help="One that this command printed before, or that a device keeps in DIR/audit: the "
            "log must go on from there.",
        ),
    ] = None,
    home: HomeFolder = HOME,
    debug: Debug = False,
) -> None:
    """Check the log of who did what, and that devices, tokens, rounds and models are as it says.

    Who can rewrite the whole log, or cut off its end, is found by a hash that was kept elsewhere.
    """
    from potluck.core import RunError

    told = operator_of(home).get("audit" if since is None else f"audit?since={since.strip()}")
    if told["broken"] is not None:
        number, reason = told["broken"]["number"], told["broken"]["reason"]
        raise RunError(
            "the audit log must be as it was written, and the tables as it says, got "
            f"{f'row {number}: ' * (number > 0)}{reason}. "
            "Compare both with a copy that was kept elsewhere."
        )
    typer.echo(f"whole: {told['rows']} rows, the last with hash {told['hash']}")


@app.command()
@command
def metrics(home: HomeFolder = HOME, debug: Debug = False) -> None:
    """Print the server's metrics, as Prometheus reads them."""
    typer.echo(operator_of(home).text("metrics"), nl=False)


def operator_of(home: Path) -> Operator:
    """Returns the admin client of this folder's server."""
    from potluck.server.admin.client import Operator
    from potluck.server.storage.state_folder import StateFolder

    return Operator(StateFolder(home))


def _status_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    state = told["state"] + (f": {told['reason']}" if told["reason"] else "")
    rows = [
        ("run", told["name"]),
        ("state", state),
        ("rounds committed", str(told["round"])),
        ("devices", _counted(told)),
    ]
    current = told["open"]
    if current:
        rows += [
            (
                "open round",
                f"{current['number']} ({current['kind']}, attempt {current['attempt']})",
            ),
            ("phase", current["state"].lower()),
            ("at work", str(current["active"])),
            ("reports", f"{current['reported']} of {current['goal']}"),
        ]
    return rows


def _lowered_row(row: dict[str, Any]) -> tuple[str, ...]:
    asked = f"{100 * row['lowered_share']:.0f} % of the round" + " (alarm)" * row["is_alarm"]
    last = str(row["lowered_round"])
    return row["id"], row["name"] or "-", str(row["lowered"]), last, asked


def _counted(told: dict[str, Any]) -> str:
    left, needed = told["left"], told["population"]
    counted = str(told["devices"]) + (f", {left} of them silent or unable to train" if left else "")
    waits = told["state"] == "running" and told["devices"] < needed
    return counted + (f"; the first round waits for {needed}" if waits else "")


def _score(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    if metric == "accuracy":
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _moment(milliseconds: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(milliseconds / 1000))
    except (ValueError, OverflowError, OSError):
        return "-"

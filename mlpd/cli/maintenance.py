"""`mlpd fsck`, `backup` and `restore`: a data directory checked, copied and brought back."""

from pathlib import Path
from typing import Any

import click

from mlpd.cli.lazy import AS_JSON, Failure
from mlpd.cli.output import (
    print_json,
    print_lines,
    print_pairs,
    print_table,
    progress,
    show_bytes,
    show_duration,
    show_time,
)
from mlpd.cli.session import Session, connected, examples

EXIT_PROBLEMS = 1
EXIT_CANNOT_RUN = 2

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("mlpd-data"),
    show_default=True,
    envvar="MLPD_DATA_DIR",
    help="The data directory.",
)


@click.command(epilog=examples("mlpd fsck --data-dir mlpd-data", "mlpd fsck --online"))
@data_dir_option
@click.option("--deep", is_flag=True, help="Compare features with a replay of the log, too.")
@click.option("--repair", is_flag=True, help="Mend the registry's records, remove stray files.")
@click.option("--online", is_flag=True, help="Ask the running daemon at --url instead.")
@connected
def fsck(session: Session, data_dir: Path, *, deep: bool, repair: bool, online: bool) -> None:
    """Check a data directory.

    LMDB, the log, segments, definitions, features and the registry: everything is read and
    compared, nothing is changed.  No daemon may run on it; --online asks the daemon itself, which
    checks all but LMDB's pages.  Exit code 0: clean, 1: problems, 2: it could not run.
    """
    from mlpd.core.errors import MlpdError

    if online and (deep or repair):
        raise click.UsageError("--deep and --repair need a data directory that stands still.")
    try:
        report = _ask(session) if online else _check(data_dir, deep=deep, repair=repair)
    except MlpdError as error:
        raise _cannot_run(error) from error
    session.show(report, _print_report)
    if not report["clean"]:
        click.get_current_context().exit(EXIT_PROBLEMS)


@click.command(epilog=examples("mlpd backup /backups/mlpd-2026-11-23", "mlpd backup --copy DEST"))
@click.argument("destination", metavar="DEST", type=click.Path(path_type=Path))
@click.option("--copy", is_flag=True, help="Copy segments and models even where links would do.")
@connected
def backup(session: Session, destination: Path, *, copy: bool) -> None:
    """Back up a running daemon.

    Everything acknowledged until now goes to DEST, a new or empty folder on the daemon's host,
    while the daemon goes on working.  On the same filesystem segments and models are hard links:
    quick, but on the same disk.
    """
    with progress("the daemon writes a backup"):
        done = session.patient_client.backup(str(destination.absolute()), copy=copy)
    session.show(done, _print_backup)


def _print_backup(done: dict[str, Any]) -> None:
    shared = done["linked_bytes"]
    print_pairs(
        {
            "backup": done["destination"],
            "sequence": done["sequence"],
            "time": show_time(done["time"]),
            "holds": f"{show_bytes(done['size_bytes'])} in {done['files']:,} files",
            "shared": f"{show_bytes(shared)} by hard links" if shared else None,
            "store grew by": show_bytes(done["lmdb_growth_bytes"]),
            "took": show_duration(done["took_s"]),
        }
    )


@click.command(epilog=examples("mlpd restore /backups/mlpd-2026-11-23 --data-dir mlpd-data"))
@click.argument("source", metavar="BACKUP", type=click.Path(path_type=Path))
@data_dir_option
@click.option("--despite-problems", is_flag=True, help="Even if fsck finds something wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def restore(source: Path, data_dir: Path, *, despite_problems: bool, as_json: bool) -> None:
    """Bring a backup back.

    Every file is verified first, then copied to the data directory, which must be new or empty,
    and checked as by mlpd fsck.  Only then the directory gets its name.
    """
    click.get_current_context().meta[AS_JSON] = as_json
    from mlpd.core.time import system_clock
    from mlpd.daemon.restore import restore as run

    with progress("restoring") as bar:
        done = run(
            source,
            data_dir,
            system_clock,
            despite_problems=despite_problems,
            on_stage=lambda stage: bar.describe(f"restoring: {stage}"),
        )
    if as_json:
        print_json(done)
        return
    print_pairs(
        {
            "restored": done["data_directory"],
            "sequence": done["sequence"],
            "as of": show_time(done["time"]),
            "holds": f"{show_bytes(done['size_bytes'])} in {done['files']:,} files",
            "fsck": "clean" if done["fsck"]["clean"] else "problems",
        }
    )
    print_lines("", f"Start it:  mlpd serve --data-dir {data_dir} --config {data_dir}/config.toml")


def _ask(session: Session) -> dict[str, Any]:
    with progress("the daemon checks its data directory"):
        found: dict[str, Any] = session.patient_client.fsck()
        return found


def _check(data_dir: Path, *, deep: bool, repair: bool) -> dict[str, Any]:
    from mlpd.core.time import system_clock
    from mlpd.daemon.fsck import check_stopped

    with progress("checking") as bar:
        return check_stopped(
            data_dir,
            system_clock,
            deep=deep,
            repair=repair,
            on_section=lambda section: bar.describe(f"checking {section}"),
        )


def _cannot_run(error: Any) -> Failure:
    as_json = bool(click.get_current_context().meta.get(AS_JSON))
    failure = Failure(error, as_json=as_json)
    failure.exit_code = EXIT_CANNOT_RUN  # type: ignore[misc]  # click reads it so
    return failure


def _print_report(report: dict[str, Any]) -> None:
    rows = [
        (section, "ok" if section not in _sections(report) else "failed", _counts(counts))
        for section, counts in report["checked"].items()
    ]
    rows += [(section, "-", why) for section, why in report["skipped"].items()]
    print_table(["section", "state", "checked"], rows)
    for done in report["repaired"]:
        print_lines("", f"Repaired: {done}")
    for problem in report["problems"]:
        print_pairs(
            {
                "problem": f"{problem['subject']}: {problem['message']}",
                "code": problem["code"],
                "what to do": problem["hint"],
            },
            title=problem["section"],
        )
    total = len(report["problems"]) + report["more"]
    print_lines("", f"{total:,} problems." if total else "Clean.")


def _sections(report: dict[str, Any]) -> set[str]:
    return {problem["section"] for problem in report["problems"]}


def _counts(counts: dict[str, int]) -> str:
    parts = (
        show_bytes(count) if name == "bytes" else f"{count:,} {name.replace('_', ' ')}"
        for name, count in counts.items()
    )
    return ", ".join(parts)

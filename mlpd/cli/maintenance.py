"""`mlpd fsck`, `backup` and `restore`: a data directory checked, copied and brought back."""

from pathlib import Path
from typing import Any

import click

from mlpd.cli.lazy import AS_JSON, Failure
from mlpd.cli.output import (
    print_lines,
    print_pairs,
    print_table,
    progress,
    show_bytes,
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

"""`mlpd shard promote`, `replicas`: followers, and one that takes its owner's place."""

from typing import TYPE_CHECKING, Any

import click

import mlpd.cli.moving  # noqa: F401 - its commands are of the same group
from mlpd.cli.output import print_lines
from mlpd.cli.session import Session, confirm, connected, examples, yes_option
from mlpd.cli.shard import shard

if TYPE_CHECKING:
    from mlpd.cluster.replica.promote import Plan


@shard.command(
    epilog=examples(
        "mlpd shard promote a --dry-run",
        "mlpd shard promote a --to http://127.0.0.1:8711 --yes",
        "mlpd shard promote a --lost --url http://127.0.0.1:8711",
        "mlpd shard promote a --cancel",
    )
)
@click.argument("name", metavar="SHARD")
@click.option("--to", metavar="URL", help="Which follower; by default the one that has most.")
@click.option("--lost", is_flag=True, help="The owner is dead: go on without what it had more.")
@click.option("--cancel", is_flag=True, help="Give up a promotion that was ended half-way.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, change nothing.")
@yes_option
@connected
def promote(
    session: Session,
    name: str,
    to: str | None,
    *,
    lost: bool,
    cancel: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Let a follower take the place of its shard's owner.

    Nothing is lost where the owner answers: it stops writing, the follower gets the rest, and the
    owner becomes a follower.  If it is interrupted, the same command goes on where it was.
    """
    from mlpd.cluster.members import connections, fetch_map
    from mlpd.cluster.replica.promote import carry_out, give_up, plan_promotion, run_steps

    known = fetch_map(session.client, session.url)
    with connections("mlpd shard promote") as connect:
        if cancel:
            found = run_steps(give_up(known, name), connect)
            said = f"Shard {name} is as it was: {found.shard(name).url} is its owner."
            session.show({"epoch": found.epoch}, lambda _: print_lines(said))
            return
        plan = run_steps(plan_promotion(known, name, to=to, lost=lost), connect)
        if not session.as_json:
            print_lines(*_announce(plan))
        answer: dict[str, Any] = {"dry_run": dry_run, **_describe(plan)}
        if dry_run:
            session.show(answer, lambda _: print_lines("Nothing was changed."))
            return
        confirm(session, "Promote it?", yes=yes)
        done = run_steps(carry_out(plan), connect)
    answer |= {
        "epoch": done.epoch,
        "sequence": done.sequence,
        "pause_s": round(done.pause_s, 3),
        "not_told": list(done.not_told),
    }
    session.show(answer, lambda found: print_lines(*_report(plan, found)))


def _describe(plan: "Plan") -> dict[str, Any]:
    return {
        "shard": plan.shard,
        "from": plan.owner,
        "to": plan.follower,
        "lost": plan.lost,
        "begun": plan.decided,
        "lag_rows": plan.lag_rows,
        "silent_s": plan.silent_s,
    }


def _announce(plan: "Plan") -> list[str]:
    what = f"The follower at {plan.follower} takes the place of {plan.shard}'s owner, {plan.owner}"
    if plan.decided:
        return [f"{what}: that was begun, its map is out. It is only to be finished."]
    if not plan.lost:
        waits = "Writes wait for it; reads too, while the two start in their new roles."
        return [
            f"{what}, which becomes a follower.",
            f"{waits} Nothing is lost. It is {plan.lag_rows} rows behind.",
        ]
    ago = "it isn't known when" if plan.silent_s is None else f"{plan.silent_s:.0f} s ago"
    lag = f"When that last answered ({ago}), the follower was {plan.lag_rows} rows behind:"
    return [
        f"{what}, which is lost.",
        f"{lag} these are lost, and whatever the owner acknowledged since.",
        "How many rows that were is said when the old data directory is started again.",
    ]


def _report(plan: "Plan", done: dict[str, Any]) -> list[str]:
    since = f"since epoch {done['epoch']}, with all up to sequence {done['sequence']}"
    pause = f"writes stood still for {done['pause_s']:.2f} s"
    lines = [f"{plan.follower} is the owner of shard {plan.shard} {since}; {pause}."]
    if done["not_told"]:
        names = ", ".join(done["not_told"])
        lines.append(f"Not told yet: {names}; mlpd shard status shows it, the next change tells.")
    return lines


@shard.command(
    epilog=examples(
        "mlpd shard replicas a http://127.0.0.1:8711",
        "mlpd shard replicas a --none",
    )
)
@click.argument("name", metavar="SHARD")
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option("--none", "no_more", is_flag=True, help="Take all followers off the map.")
@click.option("--dry-run", is_flag=True, help="Ask the followers, change nothing.")
@connected
def replicas(
    session: Session, name: str, urls: tuple[str, ...], *, no_more: bool, dry_run: bool
) -> None:
    """Write a shard's followers into the map: these and no others.

    Clients then find them, and one of them can be promoted.  mlpd serve --follow makes a follower.
    """
    from mlpd.cluster.members import connections, fetch_map
    from mlpd.cluster.moving import newest_map
    from mlpd.cluster.replica.listing import check_followers, set_replicas, with_replicas

    if bool(urls) == no_more:
        raise click.UsageError("give the URLs of followers, or --none")
    known = fetch_map(session.client, session.url)
    with connections("mlpd shard replicas") as connect:
        new = with_replicas(newest_map(known, connect), name, urls)
        check_followers(new, name, connect)
        not_told = [] if dry_run else set_replicas(new, connect)
    written = list(new.shard(name).replicas)
    answer = {"dry_run": dry_run, "shard": name, "replicas": written}
    shown = ", ".join(written) or "no followers"
    would = "would have" if dry_run else "has"
    session.show(
        {**answer, "epoch": new.epoch, "not_told": not_told},
        lambda _: print_lines(f"Shard {name} {would} {shown}, by the map of epoch {new.epoch}."),
    )

"""Bugs that are planted to show that the simulation finds them; each patches the product."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from mlpd.client.operations import Cluster
from mlpd.client.requests import Request
from mlpd.cluster import moving
from mlpd.core.routing import SLOTS_HEADER
from mlpd.daemon import arriving, leaving, ownership
from mlpd.daemon.arriving import Arrivals
from mlpd.daemon.ingest import Ingest
from mlpd.daemon.part import Moves, make_part
from mlpd.daemon.read import Read
from mlpd.storage import map_store
from mlpd.storage.lineage import Lineage
from tests.cluster.histories import world
from tests.cluster.histories.network import Network
from tests.cluster.histories.nodes import Node, SimulatedWriter

patch = mock.patch.object


def no_epoch_is_compared() -> AbstractContextManager[Any]:
    return _both(patch(map_store, "check_next", _nothing), patch(ownership, "check_next", _nothing))


def writes_go_on_in_the_pause() -> AbstractContextManager[Any]:
    return _parts_by(lambda m: m if m.leaving and m.leaving.state != "paused" else _without(m))


def reads_go_on_until_the_new_map() -> AbstractContextManager[Any]:
    def paused(moves: Moves) -> Moves:
        if moves.leaving is None or moves.leaving.state != "leaving":
            return moves
        return replace(moves, leaving=replace(moves.leaving, state="paused"))

    return _parts_by(paused)


def events_are_acknowledged_before_the_disk_has_them() -> AbstractContextManager[Any]:
    return patch(SimulatedWriter, "acknowledges_early", new=True)


def the_map_is_not_flushed() -> AbstractContextManager[Any]:
    return patch(Node, "forgets_map", new=True)


def events_are_repeated_without_a_key() -> AbstractContextManager[Any]:
    return _without_header("Idempotency-Key")


def what_is_split_anew_counts_for_all_slots() -> AbstractContextManager[Any]:
    return _without_header(SLOTS_HEADER)


def an_old_epoch_may_write() -> AbstractContextManager[Any]:
    def check(self: Any, text: str | None, *, changes: bool) -> bool:  # noqa: ARG001 - as it is
        return text is not None

    return patch(ownership.Ownership, "check_epoch", check)


def a_chunk_may_come_twice() -> AbstractContextManager[Any]:
    real = Arrivals._take

    def take(self: Any, txn: Any, found: Any, chunk: Any) -> None:
        real(self, txn, replace(found, through=chunk.after), chunk)

    return patch(Arrivals, "_take", take)


def the_tail_is_left_behind() -> AbstractContextManager[Any]:
    """The source says that nothing came after its last chunk, and nobody compares."""

    def paused(self: Any, txn: Any, note: Any) -> None:
        if note is not None and note.state == "paused":
            note = replace(note, sequence=0)
        real(self, txn, note)

    real = leaving.Departures._note
    equal = patch(leaving, "digest_rows", lambda *_: ("0" * 16, 0))
    return _both(patch(leaving.Departures, "_note", paused), equal)


def lineage_is_ignored() -> AbstractContextManager[Any]:
    return patch(Lineage, "counts", lambda _, slots, __: np.ones(len(slots), np.bool_))


def a_cancelled_import_leaves_its_rows() -> AbstractContextManager[Any]:
    async def remove(*_: Any) -> int:
        return 0

    return patch(arriving, "remove_rows", remove)


def copies_are_taken_after_the_seal() -> AbstractContextManager[Any]:
    return _parts_by(lambda moves: replace(moves, arriving=None))


def the_old_owner_forgets_its_answers() -> AbstractContextManager[Any]:
    return patch(Ingest, "known_answer", _nothing)


def ownership_is_not_looked_at_again_in_the_transaction() -> AbstractContextManager[Any]:
    return patch(ownership.Ownership, "check_still", _nothing)


def any_map_may_take_slots() -> AbstractContextManager[Any]:
    return patch(ownership, "_check_moved", _nothing)


def cancelling_sets_no_epoch() -> AbstractContextManager[Any]:
    """The map is as it was, so that a driver who read it before may still set the next one."""

    def cancelled(shard_map: Any, part: Any, connect: Any) -> Any:
        moving.ask(shard_map, part.source, connect, lambda c: c.leave("cancel", part.move))
        moving.ask(shard_map, part.target, connect, lambda c: c.arrive("cancel", part.move))
        moving.ask(shard_map, part.source, connect, lambda c: c.leave("finish", part.move))
        return shard_map

    return _both(patch(moving, "cancel", cancelled), patch(world, "cancel", cancelled))


def a_driver_passes_a_cancelled_move() -> AbstractContextManager[Any]:
    def leave(self: Any, step: str, move: str, **fields: Any) -> Any:
        answer = real(self, step, move, **fields)
        if step == "begin" and answer["leaving"]["state"] == "cancelling":
            answer["leaving"]["state"] = "copying"
        return answer

    real = Cluster.leave
    return patch(Cluster, "leave", leave)


def a_driver_and_its_source_pass_a_cancelled_move() -> AbstractContextManager[Any]:
    return _both(a_driver_passes_a_cancelled_move(), a_cancelled_move_may_go_on())


def a_cancelled_move_may_go_on() -> AbstractContextManager[Any]:
    any_state = ("copying", "paused", "leaving", "cancelling")
    return mock.patch.dict(leaving._NEXT, {"paused": any_state, "leaving": any_state})


def sequences_are_not_waited_for() -> AbstractContextManager[Any]:
    real = Read.read

    def read(self: Any, closure: Any, given: Any, **how: Any) -> Any:
        return real(self, closure, given, **{**how, "min_sequence": 0})

    async def reach(*_: Any, **__: Any) -> bool:
        return True

    return _both(patch(Read, "read", read), patch(SimulatedWriter, "reach", reach))


BUGS: list[Callable[[], AbstractContextManager[Any]]] = [
    no_epoch_is_compared,
    writes_go_on_in_the_pause,
    reads_go_on_until_the_new_map,
    events_are_acknowledged_before_the_disk_has_them,
    the_map_is_not_flushed,
    events_are_repeated_without_a_key,
    what_is_split_anew_counts_for_all_slots,
    an_old_epoch_may_write,
    a_chunk_may_come_twice,
    the_tail_is_left_behind,
    lineage_is_ignored,
    a_cancelled_import_leaves_its_rows,
    copies_are_taken_after_the_seal,
    ownership_is_not_looked_at_again_in_the_transaction,
    sequences_are_not_waited_for,
    a_driver_and_its_source_pass_a_cancelled_move,
]
RARE = {
    events_are_acknowledged_before_the_disk_has_them: 80,
    a_cancelled_import_leaves_its_rows: 33,
    copies_are_taken_after_the_seal: 57,
    ownership_is_not_looked_at_again_in_the_transaction: 70,
    a_driver_and_its_source_pass_a_cancelled_move: 76,
}
"""Seeds just before those that find the rarest; where the schedule changes, others do later."""
HIDDEN = [the_old_owner_forgets_its_answers, any_map_may_take_slots, cancelling_sets_no_epoch]
"""What histories don't find, or too seldom; docs/decisions/simulation.md."""


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _without(moves: Moves) -> Moves:
    return replace(moves, leaving=None)


def _parts_by(alter: Callable[[Moves], Moves]) -> AbstractContextManager[Any]:
    def made(member: Any, moves: Any = None) -> Any:
        return make_part(member, None if moves is None else alter(moves))

    return patch(ownership, "make_part", made)


def _without_header(name: str) -> AbstractContextManager[Any]:
    def alter(request: Request) -> Request:
        left = {key: value for key, value in request.headers.items() if key != name}
        return replace(request, headers=left)

    return patch(Network, "alter", staticmethod(alter))


@contextmanager
def _both(*patches: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        yield

"""Rows over shards: reads and predictions, each row answered by the shard that has its entities."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlpd.client import requests as r
from mlpd.client.scatter import (
    Ask,
    Gathered,
    Piece,
    Scatter,
    Topology,
    sorted_by_name,
    with_headers,
)
from mlpd.client.table import Table
from mlpd.core.errors import MlpdError, ValidationError
from mlpd.core.routing import EPOCH_HEADER, Entities, Routing, distinct, key_slots
from mlpd.core.shards import Shard
from mlpd.core.specs import EntitySpec


class Rows(Scatter):
    """A read or a prediction: each row goes to the shard that has its entities.

    `kind` and `name`: where the routing has the entities; names of single features for a read of
    these.  `fields`: of the body, beside the table `of_rows`.
    """

    def __init__(
        self,
        kind: str,
        names: Sequence[str],
        request: r.Request,
        fields: Mapping[str, Any],
        of_rows: str,
    ) -> None:
        self._kind, self._names = kind, names
        self._request, self._fields, self._of_rows = request, fields, of_rows
        self._table = Table(fields[of_rows])

    def __len__(self) -> int:
        return len(self._table)

    def whole(self) -> r.Request:
        """Return it as one request; of a sequence by shard a router knows what to make."""
        return self._build(self._fields)

    def known(self, routing: Routing) -> bool:
        """Tell whether the routing has the service or route, or all features."""
        named = getattr(routing, self._kind)
        return all(name in named for name in self._names)

    def split(
        self,
        topology: Topology,
        rows: Sequence[int] | None,
        done: Gathered,  # noqa: ARG002 - every row can be sent
    ) -> list[Piece]:
        """Return a piece per shard; one with rows that need cells of others waits for them.

        So do its other rows: one call less, and the whole answer waits anyway.
        """
        wanted = range(len(self._table)) if rows is None else rows
        placed, others = self._place(topology, wanted)
        asks = [self._ask(topology, shard, groups) for shard, groups in others.by_shard()]
        return [
            self._piece(topology, shard, placed[shard], needs=_needs(asks, placed[shard]))
            for shard in sorted_by_name(placed)
        ]

    def fill(self, topology: Topology, piece: Piece, answers: Mapping[str, Any]) -> Piece:
        """Return a piece with the cells of its rows; rows that lack some are left out."""
        lost = {row for ask in piece.needs if ask.shard.name not in answers for row in ask.rows}
        rows = [row for row in piece.rows if row not in lost]
        mine, t_us = set(rows), 0
        groups, sequences = list[dict[str, Any]](), dict[str, int]()
        for ask in piece.needs:
            if ask.shard.name in answers and mine & set(ask.rows):
                answer = answers[ask.shard.name]
                t_us = max(t_us, answer["t_us"])
                sequences[ask.shard.name] = answer["sequence"]
                groups += _take_cells(ask, answer["groups"], mine)
        cells = {"t_us": t_us, "sequences": sequences, "groups": groups}
        return self._piece(topology, piece.shard, rows, cells=cells)

    def merge(self, done: Gathered) -> Any:
        """Return the answer in the order of the rows; raises if no row has one."""
        if not done.answers:
            raise next(iter(done.failures.values()))
        parts = [(piece, answer) for piece, answer in done.answers if isinstance(answer, Mapping)]
        merge = merge_predictions if self._of_rows == "rows" else merge_features
        merged = merge(parts, len(self._table), done.failures)
        sequences: dict[str, int] = {}
        for piece, answer in parts:
            sequences[piece.shard.name] = max(
                answer["sequence"], sequences.get(piece.shard.name, 0)
            )
        times = {"t_us": max(answer["t_us"] for _, answer in parts), "sequence": sequences}
        return {**merged, **times}

    def _place(
        self, topology: Topology, rows: Sequence[int]
    ) -> "tuple[dict[Shard, list[int]], _Others]":
        """Return the rows of each shard, and keys of theirs that others own.

        A row's home has its first key; one without any goes where others go, or anywhere.
        """
        named = getattr(topology.routing, self._kind)
        entities = distinct(entity for name in self._names for entity in named.get(name, ()))
        columns = self._table.columns(dict.fromkeys(c for e in entities for c in e.columns))
        placed: dict[Shard, list[int]] = {}
        others, anywhere = _Others(entities, columns), list[int]()
        owners = _owners(topology, entities, columns, len(self._table), rows)
        for row, of_row in zip(rows, owners, strict=True):
            home = next((shard for shard in of_row if shard is not None), None)
            if home is None:
                anywhere.append(row)
            else:
                placed.setdefault(home, []).append(row)
                others.add(row, of_row, home)
        if anywhere or not len(self._table):
            shard = min(placed, key=lambda s: s.name, default=topology.shard_map.arbiter)
            placed[shard] = sorted([*placed.get(shard, ()), *anywhere])
        return placed, others

    def _piece(
        self,
        topology: Topology,
        shard: Shard,
        rows: list[int],
        *,
        needs: tuple[Ask, ...] = (),
        cells: Mapping[str, Any] | None = None,
    ) -> Piece:
        taken = () if needs else self._table.take(rows)  # of what isn't sent yet
        fields = {**self._fields, self._of_rows: taken, "cells": cells}
        fields["min_sequence"] = self._sequence_of(shard)
        headers = {EPOCH_HEADER: str(topology.shard_map.epoch)}
        return Piece(shard, with_headers(self._build(fields), headers), rows, needs=needs)

    def _ask(self, topology: Topology, shard: Shard, groups: "Sequence[_Group]") -> Ask:
        """Return what a shard is asked for keys of rows that live elsewhere."""
        fields: dict[str, Any] = {
            "keys": [{"columns": g.columns, "values": [*map(list, g.keys)]} for g in groups],
            "at": self._fields.get("at"),
            "min_sequence": self._sequence_of(shard),
        }
        if self._kind == "routes":
            fields["route"] = self._names[0]
        else:
            fields |= {name: self._fields.get(name) for name in ("service", "features", "request")}
        request = r.call("POST", "v1", "cluster", "cells", fields=fields)
        request = replace(request, deadline_s=self._request.deadline_s)
        headers = {EPOCH_HEADER: str(topology.shard_map.epoch)}
        rows = sorted({row for group in groups for row in group.places})
        places = [group.places for group in groups]
        return Ask(shard, with_headers(request, headers), rows, places)

    def _sequence_of(self, shard: Shard) -> int | None:
        """Return what a shard must have seen; raises ValidationError(code="wrong_sequence")."""
        sequence = self._fields.get("min_sequence")
        if isinstance(sequence, Mapping):
            return sequence.get(shard.name)
        if sequence is not None:
            raise ValidationError(
                "min_sequence is one number, and sequences are by shard",
                code="wrong_sequence",
                hint="Give back what an answer of this cluster had as its sequence.",
            )
        return None

    def _build(self, fields: Mapping[str, Any]) -> r.Request:
        plain = {name: value for name, value in fields.items() if value is not None}
        plain[self._of_rows] = r.plain_table(fields[self._of_rows])
        return replace(self._request, body=r.pack(plain))


def owners_of(features: Iterable[str]) -> list[str]:
    """Return the views and transforms that single features are of; request fields are of none."""
    owners = (feature.partition(".")[0] for feature in features)
    return [owner for owner in owners if owner != "request"]


def merge_features(
    parts: Sequence[tuple[Piece, Any]], rows: int, failures: Mapping[int, MlpdError]
) -> dict[str, Any]:
    """Return columns, statuses and event times with None in rows that failed, and `errors`."""
    merged: dict[str, Any] = {}
    for group in ("columns", "statuses", "event_times"):
        merged[group] = {name: [None] * rows for name in parts[0][1][group]}
        for piece, answer in parts:
            for name, values in answer[group].items():
                column = merged[group].setdefault(name, [None] * rows)
                for row, value in zip(piece.rows, values, strict=True):
                    column[row] = value
    if failures:
        merged["errors"] = [{"index": i, **failures[i].to_dict()} for i in sorted(failures)]
    return merged


def merge_predictions(
    parts: Sequence[tuple[Piece, Any]], rows: int, failures: Mapping[int, MlpdError]
) -> dict[str, Any]:
    """Return predictions in order; those that failed have no id and no score, but an `error`."""
    predictions: list[Any] = [None] * rows
    for piece, answer in parts:
        for row, prediction in zip(piece.rows, answer["predictions"], strict=True):
            predictions[row] = prediction
    for row, error in failures.items():
        predictions[row] = {"prediction_id": None, "score": None, "error": error.to_dict()}
    first = parts[0][1]
    return {
        "route": first["route"],
        "route_version": max(answer["route_version"] for _, answer in parts),
        "predictions": predictions,
    }


def _owners(
    topology: Topology,
    entities: Entities,
    columns: Mapping[str, Sequence[Any]],
    count: int,
    rows: Sequence[int],
) -> list[tuple[Shard | None, ...]]:
    """Return, of each row, the owner of each entity's key; None without a key."""
    if not entities:
        return [()] * len(rows)
    index = np.array(rows, np.int64)
    slots = (key_slots(entity, columns, count)[index] for entity in entities)
    return list(zip(*(topology.owners(column.tolist()) for column in slots), strict=True))


@dataclass(frozen=True, slots=True)
class _Group:
    """Keys of one entity that a shard is asked for, and where those of rows are among them."""

    columns: tuple[str, ...]
    keys: dict[tuple[Any, ...], int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)


class _Others:
    """Keys of rows that other shards than their home own."""

    def __init__(self, entities: Entities, columns: Mapping[str, Sequence[Any]]) -> None:
        self._entities, self._columns = entities, columns
        self._found: dict[Shard, dict[EntitySpec, _Group]] = {}

    def add(self, row: int, owners: Sequence[Shard | None], home: Shard) -> None:
        """Note a row whose keys have these owners."""
        for entity, owner in zip(self._entities, owners, strict=True):
            if owner is not None and owner != home:
                groups = self._found.setdefault(owner, {})
                group = groups.setdefault(entity, _Group(entity.columns))
                key = tuple(self._columns[name][row] for name in entity.columns)
                group.places[row] = group.keys.setdefault(key, len(group.keys))

    def by_shard(self) -> list[tuple[Shard, list[_Group]]]:
        """Return the groups that each shard is asked for, by its name."""
        return [(s, [*self._found[s].values()]) for s in sorted_by_name(self._found)]


def _needs(asks: Sequence[Ask], rows: Sequence[int]) -> tuple[Ask, ...]:
    """Return the asks that some of the rows need."""
    mine = set(rows) if asks else ()
    return tuple(ask for ask in asks if any(row in mine for row in ask.rows))


def _take_cells(
    ask: Ask, groups: Sequence[Mapping[str, Any]], rows: set[int]
) -> Iterator[dict[str, Any]]:
    """Yield the groups of an answer with the keys of some rows alone."""
    for group, places in zip(groups, ask.places, strict=True):
        taken = sorted({place for row, place in places.items() if row in rows})
        yield {
            "columns": group["columns"],
            "keys": [group["keys"][place] for place in taken],
            "views": {
                name: {
                    part: None if values is None else [values[place] for place in taken]
                    for part, values in cells.items()
                }
                for name, cells in group["views"].items()
            },
        }

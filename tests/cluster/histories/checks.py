"""What must hold, told from what clients were told and what stores hold; plain and slow.

Event number i brings n = 2**i: a sum of n tells which events it counts, and the count beside it
whether one of them is in it twice.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlpd.core.columns import DType
from mlpd.core.hashing import slot_of
from mlpd.core.keys import encode_entity
from mlpd.core.shards import ShardMap
from mlpd.storage.lineage import load_lineage
from mlpd.storage.log import RecordKind, copy_records, decode_record
from tests.cluster.histories.nodes import Node

EVENTS_MAX = 60
Key = tuple[str, str]
"""Entity and key: ("user", "u1")."""


def slot(key: Key) -> int:
    """Return the slot of a key."""
    encoded = encode_entity([DType.STRING], [key[1]], key[0])
    assert encoded is not None
    return slot_of(encoded)


def events_in(count: int, total: int) -> Counter[int]:
    """Return how often each event is in a count and a sum; -1 for what no event explains."""
    found = Counter(i for i in range(EVENTS_MAX + 8) if total >> i & 1)
    if count != len(found):
        found[-1] = count - len(found)
    return found


@dataclass
class History:
    """What clients were told."""

    violations: list[str] = field(default_factory=list)
    sent: dict[int, tuple[Key, Key]] = field(default_factory=dict)
    acknowledged: dict[Key, set[int]] = field(default_factory=dict)
    seen: dict[Key, set[int]] = field(default_factory=dict)
    """What reads have shown."""
    codes: Counter[str] = field(default_factory=Counter)
    stored: list[tuple[str, int, range]] = field(default_factory=list)
    """What was acknowledged by one member alone: its name, the sequence, the events."""
    sequenced: list[tuple[str, int, dict[Key, set[int]]]] = field(default_factory=list)
    """Reads with a `min_sequence`: the member, the sequence, and what was shown of its keys."""

    def blame(self, text: str) -> None:
        self.violations.append(text)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for key in self.sent[number]:
                self.acknowledged.setdefault(key, set()).add(number)

    def note_sequences(self, sequences: Mapping[str, int], numbers: range) -> None:
        """Note which sequences an acknowledgement told."""
        if len(sequences) == 1:  # else it isn't told which events are at which member
            ((name, sequence),) = sequences.items()
            self.stored.append((name, sequence, numbers))

    def check_sequences(self) -> None:
        """No read is older than its `min_sequence`, whenever what it had to wait for was told."""
        for name, sequence, shown in self.sequenced:
            for _, at, numbers in (s for s in self.stored if s[0] == name and s[1] <= sequence):
                for key, found in shown.items():
                    if missing := {n for n in numbers if key in self.sent[n]} - found:
                        self.blame(
                            f"{key} of {name} lacks {sorted(missing)} of sequence {at} in a read "
                            f"from {sequence} on"
                        )

    def due(self, keys: Iterable[Key]) -> dict[Key, set[int]]:
        """Return what a read that begins now must show of each key."""
        return {key: self.acknowledged.get(key, set()) | self.seen.get(key, set()) for key in keys}

    def check_read(self, key: Key, due: set[int], count: int, total: int, where: str) -> None:
        """Check what a read showed."""
        found = events_in(count or 0, total or 0)
        if found[-1]:
            self.blame(f"{where}: {key} counts {count} for {sorted(+found)}")
            return
        shown = {number for number in found if number >= 0}
        if missing := due - shown:
            self.blame(f"{where}: {key} lacks {sorted(missing)}")
        if strange := {n for n in shown if key not in self.sent.get(n, ())}:
            self.blame(f"{where}: {key} counts {sorted(strange)}, which were never sent for it")
        self.seen.setdefault(key, set()).update(shown)


class Owners:
    """Who answers for what, looked at whenever that changes."""

    def __init__(self, nodes: Mapping[str, Node], history: History) -> None:
        self._nodes, self._history = nodes, history
        self._maps: dict[int, ShardMap] = {}
        self._epochs: dict[str, int] = {}

    def check(self) -> None:
        """No slot is written or read at two places; one map has an epoch, which never goes back."""
        writes = reads = 0
        for node in self._nodes.values():
            if node.daemon is None or node.ownership.member is None:
                continue
            self._check_map(node.name, node.ownership.member.shard_map)
            part = node.ownership.part
            owned = (1 << 16384 * 8) - 1 if part is None else int.from_bytes(part.flags, "big")
            frozen = 0
            if part is not None and part.frozen is not None:
                frozen = int.from_bytes(part.frozen, "big")
            if reads & owned:
                self._history.blame(f"{node.name} and another one answer for the same slots")
            if writes & (owned & ~frozen):
                self._history.blame(f"{node.name} and another one take the same slots")
            reads |= owned
            writes |= owned & ~frozen

    def forget(self, name: str) -> None:
        """Forget what a member went by: another daemon is in its place."""
        self._epochs.pop(name, None)

    def _check_map(self, name: str, shard_map: ShardMap) -> None:
        known = self._maps.setdefault(shard_map.epoch, shard_map)
        if known is not shard_map and known != shard_map:
            self._history.blame(f"there are two maps of epoch {shard_map.epoch}")
        if shard_map.epoch < self._epochs.get(name, 0):
            self._history.blame(f"{name} went back to epoch {shard_map.epoch}")
        self._epochs[name] = shard_map.epoch


def check_log(node: Node, key: Key) -> Counter[int]:
    """Return which events of a node's log count for a key, by its lineage, row by row."""
    assert node.daemon is not None
    found: Counter[int] = Counter()
    wanted = slot(key)
    with node.daemon.environment.snapshot() as snapshot:
        lineage = load_lineage(snapshot)
        kinds = frozenset({RecordKind.EVENTS})
        for start, value in copy_records(snapshot, 1, int(snapshot.sequence), kinds=kinds):
            record = decode_record(value, start)
            columns = {name: column.to_list() for name, column in record.columns().items()}
            for i, (of, n) in enumerate(zip(columns[key[0]], columns["n"], strict=True)):
                if of != key[1]:
                    continue
                at = np.array([wanted]), np.array([record.first + i])
                if lineage is None or lineage.counts(*at)[0]:
                    found[n.bit_length() - 1] += 1
    return found


def check_end(
    nodes: Mapping[str, Node], shard_map: ShardMap, reads: Mapping[Key, Any], history: History
) -> None:
    """Check what is left when all is quiet: online values, and the logs that they come from."""
    for key, (count, total) in reads.items():
        due = history.due([key])[key]
        history.check_read(key, due, count, total, "at the end")
        owner = shard_map.owner(slot(key)).name
        counted = check_log(nodes[owner], key)
        if counted != events_in(count or 0, total or 0):
            history.blame(
                f"{key} reads {total:x} at {owner}, its log has {sorted(counted.items())}"
            )

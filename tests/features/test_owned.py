"""Entities of slots that are owned: the others are as if their rows had no key."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlpd.core.columns import DType
from mlpd.core.convert import column_of
from mlpd.core.hashing import SLOTS, slot_of
from mlpd.core.specs import EntitySpec
from mlpd.features.entities import entity_codes, only_owned

USER = EntitySpec("user", (("user", DType.STRING),))


@given(st.lists(st.none() | st.sampled_from("abcdefgh"), max_size=30), st.integers(0, 2**32))
def test_only_rows_of_owned_slots_keep_their_entity(users: list[str | None], seed: int) -> None:
    flags = np.random.default_rng(seed).integers(0, 2, SLOTS, np.uint8).tobytes()
    columns = {"user": column_of(DType.STRING, list(users))}
    entities, codes = entity_codes(USER, columns)
    kept, mine = only_owned(entities, codes, flags)
    assert kept == [entity for entity in entities if flags[slot_of(entity)]]
    for before, after in zip(codes.tolist(), mine.tolist(), strict=True):
        is_mine = before >= 0 and bool(flags[slot_of(entities[before])])
        assert (after >= 0) == is_mine
        if is_mine:
            assert kept[after] == entities[before]

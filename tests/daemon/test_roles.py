"""Roles: each step is durable, may come twice, and is refused from where it would be wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlpd.core.errors import ConflictError, InternalError, UnavailableError
from mlpd.core.shards import Shard, ShardMap
from mlpd.daemon.roles import Roles
from mlpd.storage.map_store import FileMapStore, Member
from mlpd.storage.roles import Role, RoleStore

OLD, NEW, OTHER = "http://old:1", "http://new:1", "http://other:1"
FIRST = ShardMap("0f" * 16, 1, (Shard("a", OLD, (NEW,)),), (0,) * 16_384)
SECOND = replace(FIRST, epoch=2, shards=(Shard("a", NEW, (OLD,)),))


OWNER = Role()


class Host:
    """A directory with a role and a map, and what goes by them; made anew, it is a restart."""

    def __init__(self, root: Path, role: Role = OWNER, lease_us: int = 0) -> None:
        self.store, self.maps, self.now_s = RoleStore(root), FileMapStore(root), 100.0
        if self.maps.load() is None:
            self.maps.store(Member("a", FIRST), 0)
            self.store.store(role)
        self.roles = Roles(self.store, lease_us, lambda: self.now_s)
        self.roles.member = self.maps.load

    def adopt(self, new: ShardMap) -> None:
        member = self.maps.load()
        assert member is not None
        self.maps.store(Member("a", new), member.shard_map.epoch)


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Host]:
    return lambda *how: Host(tmp_path, *how)


def refused(roles: Roles) -> str | None:
    try:
        roles.check_begin()
    except UnavailableError as error:
        return error.code
    return None


async def test_an_owner_pauses_resumes_and_is_fenced(host: Callable[..., Host]) -> None:
    one = host()
    assert refused(one.roles) is None
    for _ in range(2):
        await one.roles.pause(NEW, "t1")
    assert refused(one.roles) == "promoting"
    assert refused(host().roles) == "promoting"
    with pytest.raises(ConflictError) as caught:
        await one.roles.pause(OTHER, "t2")
    assert caught.value.code == "promotion_under_way"
    await one.roles.pause(NEW, "t2")
    with pytest.raises(ConflictError) as caught:
        await one.roles.resume("t1")
    assert caught.value.code == "other_pause"
    await one.roles.resume("t2")
    assert refused(one.roles) is None
    await one.roles.pause(NEW, "t3")
    for new, token, code in (
        (SECOND, "t2", "other_pause"),
        (replace(SECOND, epoch=3), "t3", "epoch_moved"),
        (replace(FIRST, epoch=2), None, "same_owner"),
    ):
        with pytest.raises(ConflictError) as caught:
            await one.roles.fence(new, one.adopt, token=token)
        assert caught.value.code == code
    for _ in range(2):
        await one.roles.fence(SECOND, one.adopt, token="t3")
    assert one.roles.changed.is_set()
    again = host()
    assert (again.roles.role, refused(again.roles)) == (Role("fenced", NEW), "not_owner")
    with pytest.raises(ConflictError):
        await again.roles.resume("t3")


async def test_one_that_was_killed_between_map_and_role_can_only_be_fenced(
    host: Callable[..., Host],
) -> None:
    killed = host()
    await killed.roles.pause(NEW, "t")
    killed.maps.store(Member("a", SECOND), 1)
    one = host()
    with pytest.raises(ConflictError) as caught:
        await one.roles.resume("t")
    assert caught.value.code == "other_pause"
    await one.roles.fence(SECOND, lambda _: None)
    assert host().roles.role == Role("fenced", NEW)


async def test_a_follower_stands_waits_for_its_promise_and_is_promoted(
    host: Callable[..., Host],
) -> None:
    one = host(Role("follower", OLD))
    await one.roles.ask(3_000_000)
    with pytest.raises(ConflictError) as caught:
        await one.roles.promote(SECOND, one.adopt, since=7, lost=True)
    assert caught.value.code == "wrong_role"
    assert await one.roles.stand() == pytest.approx(3.03)
    with pytest.raises(ConflictError) as caught:
        await one.roles.ask(3_000_000)
    assert caught.value.code == "wrong_role"
    again = host()  # its process doesn't know when it promised, so all of it counts anew
    again.now_s += 2.0
    with pytest.raises(ConflictError) as caught:
        await again.roles.promote(SECOND, again.adopt, since=7, lost=True)
    assert caught.value.code == "lease_runs"
    again.now_s += 2.0
    for _ in range(2):
        await again.roles.promote(SECOND, again.adopt, since=7, lost=True)
    assert refused(again.roles) == "not_owner"  # until it has started anew
    owner = host().roles
    assert (owner.role, refused(owner)) == (Role("owner", fence=(OLD,), since=7), None)
    await owner.told(OLD)
    assert host().roles.role.fence == ()


async def test_one_that_heard_of_a_newer_owner_than_its_map_is_not_promoted_by_it(
    host: Callable[..., Host],
) -> None:
    one = host(Role("follower", OTHER))  # the map says OLD
    await one.roles.stand()
    with pytest.raises(ConflictError) as caught:
        await one.roles.promote(SECOND, one.adopt, since=7, lost=True)
    assert caught.value.code == "newer_owner"


async def test_a_lease_is_needed_to_begin_and_to_acknowledge(host: Callable[..., Host]) -> None:
    one = host(OWNER, 3_000_000)
    roles = one.roles
    assert refused(roles) == "lease_lost"
    roles.lease.renew(NEW, roles.lease.give(one.now_s))
    assert refused(roles) is None
    one.now_s += 3.0
    with pytest.raises(UnavailableError, match="not known"):
        roles.check_end()


def test_a_damaged_role_lets_nobody_start(tmp_path: Path) -> None:
    for text in ("{", "{}", '{"name": "king", "fence": []}', '{"name": "owner"}'):
        (tmp_path / "role.json").write_text(text)
        with pytest.raises(InternalError) as caught:
            RoleStore(tmp_path).load()
        assert caught.value.code == "damaged_role"

"""The role of a data directory: owner of its shard's slots, follower, or neither any more.

`role.json` in the directory; without it the daemon is an owner.  docs/paths/replica.md tells how
one becomes another.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mlpd.core.errors import InternalError, StorageFullError
from mlpd.storage.files import atomic_write

ROLE_FILE = "role.json"
RoleName = Literal["owner", "paused", "fenced", "follower", "standing"]
_NAMES = ("owner", "paused", "fenced", "follower", "standing")


@dataclass(frozen=True, slots=True)
class Role:
    """What a daemon is to its shard.

    `owner` reads and writes; `paused` reads, while the follower at `url` takes its place, and
    `token` names the pause; `fenced` had its place taken by `url`; `follower` has what the owner at
    `url` has; `standing` is one that asks its owner no more, as it is about to be promoted.
    `fence`: former owners that an owner still has to tell.  `lease_us`: the longest lease that a
    follower has promised.  `since`: newest sequence when an owner was promoted.
    """

    name: RoleName = "owner"
    url: str = ""
    token: str = ""
    fence: tuple[str, ...] = ()
    lease_us: int = 0
    since: int = 0

    @property
    def follows(self) -> bool:
        """Whether its data is another daemon's."""
        return self.name in ("follower", "standing")

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return json.dumps(asdict(self)).encode()


class RoleStore:
    """The role in a file of the data directory `root`."""

    def __init__(self, root: Path) -> None:
        self._path = root / ROLE_FILE

    def load(self) -> Role:
        """Return what is stored; raises InternalError(code="damaged_role")."""
        try:
            fields = json.loads(self._path.read_bytes())
            role = Role(**{**fields, "fence": tuple(fields["fence"])})
        except FileNotFoundError:
            return Role()
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(self._path, str(error)) from None
        if role.name not in _NAMES:
            raise _damaged(self._path, f"{role.name!r} is no role")
        return role

    def store(self, role: Role) -> None:
        """Replace what is stored, durably; blocks.  Raises StorageFullError."""
        try:
            atomic_write(self._path, role.encode())
        except OSError as error:
            raise StorageFullError(
                f"the role can't be stored: {error.strerror or error}",
                hint="Free some space in the data directory; the daemon stays what it was.",
            ) from error


def _damaged(path: Path, why: str) -> InternalError:
    return InternalError(
        f"{path} is damaged: {why}",
        code="damaged_role",
        hint="Follow the shard's owner anew: mlpd serve --follow URL --discard. Without the file "
        "this would be an owner, beside another one.",
    )

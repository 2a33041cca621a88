"""Parts: what members know of the same thing, gathered by whichever of them is asked.

Each has what its own requests taught it: labels joined to its predictions, counts of what it
served, sums over its units.  What is gathered are sums, so that they add up to what one daemon that
had served everything would have; docs/paths/follow.md says which.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import UnionType
from typing import Any

from mlpd.core.errors import InvalidRequestError, MlpdError, UnavailableError, ValidationError
from mlpd.core.shards import Shard
from mlpd.daemon.peers import Peers, together

ASK_S = 30.0
PATH = "/v1/cluster/parts"

Give = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""Returns this member's part, as what msgpack takes; raises as it likes."""


class Parts:
    """Gives this member's parts and asks `others`, in the order of the map, for theirs."""

    def __init__(self, others: Callable[[], Sequence[Shard]], peers: Peers) -> None:
        self._others = others
        self._peers = peers
        self._given: dict[str, tuple[Give, Mapping[str, type | UnionType]]] = {}

    def offer(self, what: str, give: Give, **fields: type | UnionType) -> None:
        """Let `give` answer for this member when others ask for `what`, with `fields` of types."""
        self._given[what] = give, fields

    @property
    def is_alone(self) -> bool:
        """Whether nobody else has a part."""
        return not self._others()

    async def give(self, what: str, fields: Mapping[str, Any]) -> Any:
        """Return this member's part.

        Raises InvalidRequestError(code="unknown_part"), and ValidationError(code="wrong_fields").
        """
        if what not in self._given:
            raise InvalidRequestError(
                f"there are no parts called {what!r}",
                code="unknown_part",
                hint=f"There are: {', '.join(sorted(self._given))}.",
            )
        give, wanted = self._given[what]
        is_right = fields.keys() == wanted.keys() and all(
            isinstance(fields[name], kind) and not isinstance(fields[name], bool)
            for name, kind in wanted.items()
        )
        if not is_right:
            raise ValidationError(
                f"a part of {what} is asked for with the fields {', '.join(wanted) or 'none'}",
                code="wrong_fields",
                hint="Members ask each other; ask any of them for what all of them know.",
            )
        return await give(fields)

    async def others(
        self, what: str, fields: Mapping[str, Any], *, timeout_s: float = ASK_S
    ) -> list[Any]:
        """Return the parts of all other members, in the order of the map, asked at once.

        Raises UnavailableError(code="part_missing") if one of them gives none: sums without it
        would pass for the whole.
        """
        asked = (self._ask(shard, what, fields, timeout_s) for shard in self._others())
        return await together(*asked)

    async def _ask(
        self, shard: Shard, what: str, fields: Mapping[str, Any], timeout_s: float
    ) -> Any:
        body = {"what": what, "fields": dict(fields)}
        try:
            answer = await self._peers.ask(shard.url, "POST", PATH, body, timeout_s=timeout_s)
        except MlpdError as error:
            raise UnavailableError(
                f"shard {shard.name} doesn't give its part of {what}: {error.message}",
                code="part_missing",
                hint="What the others have alone would pass for the whole; ask again when "
                "mlpd shard status shows that shard.",
                details={"shard": shard.name, "why": error.code},
            ) from None
        return answer["part"]

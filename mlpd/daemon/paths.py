"""Where things are in a data directory."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DataPaths:
    """Paths below the data directory `root`; nothing is created by asking."""

    root: Path

    @property
    def lmdb(self) -> Path:
        """The truth: log, rows, tables."""
        return self.root / "lmdb"

    @property
    def segments(self) -> Path:
        """The log compacted into Parquet."""
        return self.root / "segments"

    @property
    def registry(self) -> Path:
        """The model registry, an OCI image layout."""
        return self.root / "registry"

    @property
    def runs(self) -> Path:
        """One folder per training run: log, pictures, report."""
        return self.root / "runs"

    @property
    def kernels(self) -> Path:
        """Compiled transforms; may be deleted."""
        return self.root / "cache" / "kernels"

    @property
    def lock(self) -> Path:
        """Held by the daemon that owns the directory."""
        return self.root / "daemon.lock"

    @property
    def socket(self) -> Path:
        """The unix socket that the daemon serves beside its port."""
        return self.root / "mlpd.sock"

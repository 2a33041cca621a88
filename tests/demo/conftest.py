"""The real flights, once per session; tests that need them are skipped without the package."""

import polars as pl
import pytest

from mlpd.cli.demo.flights import EventTables, build_events, data_folder, read_flights
from mlpd.core.errors import UnavailableError


@pytest.fixture(scope="session")
def flights() -> pl.DataFrame:
    """All flights of 2013."""
    try:
        folder = data_folder()
    except UnavailableError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    return read_flights(folder)


@pytest.fixture(scope="session")
def events(flights: pl.DataFrame) -> EventTables:
    """All events of 2013."""
    return build_events(data_folder(), flights)

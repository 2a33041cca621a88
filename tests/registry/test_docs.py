"""docs/formats/registry.md against the code: fields, media types, event kinds, states."""

import re
from dataclasses import fields
from pathlib import Path

import mlpd
from mlpd.registry.fsck import Problem
from mlpd.registry.lineage import Lineage
from mlpd.registry.manifest import FORMATS, PICTURES, ROLES, WEIGHT_FILES, media_type_of
from mlpd.registry.records import EventKind, VersionState

PAGE = (Path(mlpd.__file__).parent / "docs" / "formats" / "registry.md").read_text()


def first_column(heading: str) -> list[str]:
    section = PAGE.split(heading, 1)[1]
    table = section.split("\n\n| ", 1)[1].split("\n\n", 1)[0]
    cells = [row.split("|")[1 if row.startswith("|") else 0] for row in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_field_of_the_lineage_is_documented() -> None:
    assert sorted(first_column("### Lineage")) == sorted(f.name for f in fields(Lineage))


def test_every_file_and_media_type_is_documented() -> None:
    files = first_column("Layers, in this order")
    assert files == [
        *WEIGHT_FILES,
        "signature.*",
        "encoder.*",
        "lineage.json",
        "profile.*",
        "golden.*",
        "parity.*",
        "report.*",
        *(f"{picture}.svg" for picture in PICTURES),
        "calibration.*",
        "components.*",
    ]
    assert media_type_of("roc.svg") in PAGE
    for role in set(ROLES) - {"lineage"}:
        for suffix in FORMATS:
            kind = media_type_of(f"{role}.{suffix}")
            assert kind in PAGE or kind.replace(f"+{suffix}", "+*") in PAGE
    for suffix in FORMATS:
        assert f"`{suffix}`" in PAGE


def test_every_event_kind_and_state_is_documented() -> None:
    assert first_column("up to 64 KiB of JSON.") == list(EventKind)
    for state in VersionState:
        assert f"`{state}`" in PAGE


def test_fsck_names_every_kind_of_problem() -> None:
    source = (Path(mlpd.__file__).parent / "registry" / "fsck.py").read_text()
    used = set(
        re.findall(r'"((?:layout|blob|dangling|wrong|alias|records|journal|index)\w*)"', source)
    )
    documented = set(re.findall(r"`(\w+)`", Problem.__doc__ or ""))
    assert used - {"journal", "index"} <= documented | {"layout"}
    assert documented - {"kind", "subject"} <= used

"""The rules of versions, states and aliases, and the fold that a model of plain Python repeats."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlpd.core.errors import ConflictError, NotFoundError, ValidationError
from mlpd.registry import rows
from mlpd.registry.catalog import NEXT_STATES
from mlpd.registry.records import (
    MAX_REPORT_BYTES,
    Alias,
    Cause,
    Event,
    EventKind,
    VersionState,
    parse_reference,
)
from mlpd.storage.environment import Environment, Table

READY = VersionState.READY
ChangeRunner = Callable[..., Any]


def digest(n: int) -> str:
    return f"sha256:{n:064x}"


def read(env: Environment, name: str, *args: Any) -> Any:
    with env.snapshot() as snapshot:
        found = getattr(rows, name)(snapshot, *args)
        return list(found) if hasattr(found, "__next__") else found


def register(change: ChangeRunner, n: int, model: str = "clf", state: VersionState = READY) -> int:
    number: int = change(model, "register", digest(n), 100, state).number
    return number


def test_numbers_count_up_per_model(change: ChangeRunner) -> None:
    assert [register(change, n) for n in range(3)] == [1, 2, 3]
    assert register(change, 0, model="other") == 1


def test_the_same_content_is_the_same_version(change: ChangeRunner, env: Environment) -> None:
    assert register(change, 1) == register(change, 1) == 1
    assert len(read(env, "versions", "clf")) == 1
    assert read(env, "last_sequence") == 1


def test_a_deleted_number_is_never_used_again(change: ChangeRunner, env: Environment) -> None:
    register(change, 1)
    register(change, 2)
    change("clf", "set_state", 2, VersionState.DELETED)
    assert register(change, 2) == 3
    assert [v.state for v in read(env, "versions", "clf")] == ["ready", "deleted", "ready"]


def test_quarantined_content_gets_a_new_number(change: ChangeRunner) -> None:
    register(change, 1)
    change("clf", "set_state", 1, VersionState.QUARANTINED)
    assert register(change, 1) == 2
    change("clf", "set_state", 1, READY)
    assert register(change, 1) == 2


@pytest.mark.parametrize("before", list(VersionState))
@pytest.mark.parametrize("after", list(VersionState))
def test_only_the_listed_transitions_happen(
    change: ChangeRunner, before: VersionState, after: VersionState
) -> None:
    register(change, 1, state=VersionState.PENDING)
    if before is not VersionState.PENDING:
        change("clf", "set_state", 1, before)
    if after is before or after in NEXT_STATES[before]:
        assert change("clf", "set_state", 1, after).state is after
    else:
        with pytest.raises(ConflictError) as caught:
            change("clf", "set_state", 1, after)
        assert caught.value.code == "invalid_transition"


def test_an_alias_moves_only_from_where_it_is_expected(change: ChangeRunner) -> None:
    register(change, 1)
    register(change, 2)
    assert change("clf", "move_alias", "champion", 1, None).version == 1
    assert change("clf", "move_alias", "champion", 2, 1).version == 2
    for expected in (1, None):
        with pytest.raises(ConflictError) as caught:
            change("clf", "move_alias", "champion", 1, expected)
        assert caught.value.code == "alias_moved"
        assert caught.value.details == {"expected": expected, "current": 2}


@pytest.mark.parametrize("state", [s for s in VersionState if s is not READY])
def test_an_alias_points_at_ready_versions_only(change: ChangeRunner, state: VersionState) -> None:
    register(change, 1, state=VersionState.PENDING)
    change("clf", "set_state", 1, state)
    with pytest.raises(ConflictError) as caught:
        change("clf", "move_alias", "champion", 1, "any")
    assert caught.value.code == "version_not_ready"


def test_a_version_with_an_alias_is_neither_archived_nor_deleted(change: ChangeRunner) -> None:
    register(change, 1)
    change("clf", "move_alias", "champion", 1, "any")
    for state in (VersionState.ARCHIVED, VersionState.DELETED):
        with pytest.raises(ConflictError) as caught:
            change("clf", "set_state", 1, state)
        assert caught.value.code == "version_in_use"
    change("clf", "move_alias", "champion", None, 1)
    assert change("clf", "set_state", 1, VersionState.DELETED).is_deleted


def test_a_protected_alias_moves_by_force_alone(change: ChangeRunner, env: Environment) -> None:
    register(change, 1)
    register(change, 2)
    change("clf", "move_alias", "champion", 1, "any")
    change("clf", "protect", "champion", True)
    with pytest.raises(ConflictError) as caught:
        change("clf", "move_alias", "champion", 2, "any")
    assert caught.value.code == "alias_protected"
    change("clf", "move_alias", "champion", 2, "any", cause=Cause("me", "urgent", force=True))
    newest = read(env, "history", "clf")[0]
    assert (newest.cause.force, newest.cause.why) == (True, "urgent")
    change("clf", "protect", "champion", False)
    assert change("clf", "move_alias", "champion", 1, 2).version == 1


def test_rolling_back_twice_goes_back_twice(change: ChangeRunner) -> None:
    for n in (1, 2, 3):
        change("clf", "move_alias", "champion", register(change, n), "any")
    assert change("clf", "roll_back", "champion", 3).version == 2
    assert change("clf", "roll_back", "champion", "any").version == 1
    with pytest.raises(ConflictError) as caught:
        change("clf", "roll_back", "champion", "any")
    assert caught.value.code == "nothing_to_roll_back_to"


def test_rollback_passes_over_versions_that_are_not_ready(change: ChangeRunner) -> None:
    for n in (1, 2, 3):
        change("clf", "move_alias", "champion", register(change, n), "any")
    change("clf", "set_state", 2, VersionState.QUARANTINED)
    assert change("clf", "roll_back", "champion", "any").version == 1


def test_rollback_brings_a_removed_alias_back(change: ChangeRunner) -> None:
    change("clf", "move_alias", "champion", register(change, 1), "any")
    change("clf", "move_alias", "champion", None, 1)
    assert change("clf", "roll_back", "champion", None).version == 1


def test_history_tells_who_when_why_from_to_and_report(
    change: ChangeRunner, env: Environment
) -> None:
    register(change, 1)
    register(change, 2)
    change("clf", "move_alias", "champion", 1, "any")
    cause = Cause("ada", "better by 0.02", {"auc": {"low": 0.01, "high": 0.03}})
    change("clf", "move_alias", "champion", 2, 1, cause=cause)
    event = read(env, "history", "clf")[0]
    assert event.cause == cause
    assert event.body == {"alias": "champion", "from": 1, "to": 2, "rollback": False}
    assert event.kind is EventKind.ALIAS
    assert event.time_us > 1_600_000_000_000_000
    assert [e.sequence for e in read(env, "history", "clf")] == [4, 3, 2, 1]


def test_moving_to_where_it_is_leaves_no_event(change: ChangeRunner, env: Environment) -> None:
    change("clf", "move_alias", "champion", register(change, 1), "any")
    change("clf", "move_alias", "champion", 1, 1)
    assert read(env, "last_sequence") == 2


def test_models_whose_names_begin_alike_stay_apart(change: ChangeRunner, env: Environment) -> None:
    for model in ("a", "a-b", "a.b", "ab"):
        number = register(change, 1, model=model)
        change(model, "move_alias", "champion", number, None)
    for model in ("a", "a-b", "a.b", "ab"):
        assert [v.name for v in read(env, "versions", model)] == [model]
        assert [a.model for a in read(env, "aliases", model)] == [model]
        assert {e.model for e in read(env, "history", model)} == {model}
    assert read(env, "models") == ["a", "a-b", "a.b", "ab"]


def test_what_is_unknown_says_so(change: ChangeRunner) -> None:
    register(change, 1)
    for verb, args, code in [
        ("set_state", (9, READY), "unknown_version"),
        ("set_state", (1 << 80, READY), "unknown_version"),
        ("move_alias", ("champion", 9, "any"), "unknown_version"),
    ]:
        with pytest.raises(NotFoundError) as caught:
            change("clf", verb, *args)
        assert caught.value.code == code
    for verb, args in [
        ("move_alias", ("x", None, "any")),
        ("roll_back", ("x", "any")),
        ("protect", ("x", True)),
    ]:
        with pytest.raises(NotFoundError) as caught:
            change("nope", verb, *args)
        assert caught.value.code == "unknown_model"


@pytest.mark.parametrize(
    ("text", "selector"), [("clf", "champion"), ("clf@3", 3), ("clf@shadow-1", "shadow-1")]
)
def test_references(text: str, selector: object) -> None:
    reference = parse_reference(text)
    assert (reference.name, reference.selector) == ("clf", selector)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "clf@",
        "clf@0",
        "clf@007",
        "clf@v3",
        "clf@9999999999",
        "Clf",
        "../clf",
        "clf@a/b",
        "clf@1@2",
        None,
        3,
    ],
)
def test_malformed_references_are_refused(text: object) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_reference(text)
    assert caught.value.code == "invalid_name"


@pytest.mark.parametrize(
    "fields",
    [
        {"by": ""},
        {"by": "x" * 201},
        {"by": "me", "why": "y" * 2_001},
        {"by": "me", "why": "\ud800"},
        {"by": "me", "report": {"auc": float("nan")}},
        {"by": "me", "report": {"text": "x" * MAX_REPORT_BYTES}},
        {"by": "me", "report": [1]},
    ],
)
def test_a_cause_is_bounded(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Cause(**fields)
    assert caught.value.code == "invalid_cause"


def test_event_bytes_are_one_line_that_decodes() -> None:
    cause = Cause("a\nb", "tab\t\r\n\u2028", {"x": [1, None]})
    event = Event(sequence=1, time_us=2, kind=EventKind.PROTECTION, model="m", cause=cause, body={})
    assert b"\n" not in event.encode()
    assert Event.decode(event.encode()) == event


class _Machine(RuleBasedStateMachine):
    """Random changes of one model, compared with lists and dicts."""

    change: ChangeRunner
    env: Environment
    counter = 0

    def __init__(self) -> None:
        super().__init__()
        _Machine.counter += 1
        self.model = f"m{_Machine.counter}"
        self.states: list[str] = []
        self.stack: list[int] = []  # of champion; the last is where it points

    @rule(content=st.integers(0, 10**9))
    def register(self, content: int) -> None:
        seed = digest(len(self.states) * 10**10 + content)
        version = self.change(self.model, "register", seed, 1, READY)
        self.states.append("ready")
        assert version.number == len(self.states)

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        to = data.draw(st.integers(1, len(self.states)))
        if self.states[to - 1] == "ready":
            self.change(self.model, "move_alias", "champion", to, "any")
            if self.stack[-1:] != [to]:
                self.stack.append(to)
        else:
            with pytest.raises(ConflictError):
                self.change(self.model, "move_alias", "champion", to, "any")

    @precondition(lambda self: self.states)
    @rule(data=st.data(), state=st.sampled_from(list(VersionState)))
    def set_state(self, data: st.DataObject, state: VersionState) -> None:
        number = data.draw(st.integers(1, len(self.states)))
        before = VersionState(self.states[number - 1])
        used = self.stack[-1:] == [number] and state in ("archived", "deleted")
        if state is before or (state in NEXT_STATES[before] and not used):
            self.change(self.model, "set_state", number, state)
            self.states[number - 1] = state
        else:
            with pytest.raises(ConflictError):
                self.change(self.model, "set_state", number, state)

    @precondition(lambda self: self.states)
    @rule()
    def roll_back(self) -> None:
        now, stack = self.stack[-1:], self.stack[:-1]
        while stack and (self.states[stack[-1] - 1] != "ready" or stack[-1:] == now):
            stack.pop()
        if stack:
            self.change(self.model, "roll_back", "champion", "any")
            self.stack = stack
        else:
            with pytest.raises(ConflictError):
                self.change(self.model, "roll_back", "champion", "any")

    @invariant()
    def records_agree(self) -> None:
        assert [v.state for v in read(self.env, "versions", self.model)] == self.states
        alias: Alias = read(self.env, "get_alias", self.model, "champion")
        assert alias.version == (self.stack[-1] if self.stack else None)


def test_random_changes_agree_with_a_plain_model(change: ChangeRunner, env: Environment) -> None:
    _Machine.change, _Machine.env = staticmethod(change), env
    limits = settings(
        max_examples=15,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(_Machine, settings=limits)
    with env.snapshot() as snapshot:
        assert rows.last_sequence(snapshot) == sum(1 for _ in rows.events(snapshot, 0))
        assert snapshot.count(Table.MODELS) > 0

"""README and docs against the repository: links, commands, module docstrings, no machine paths."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mlpd.cli import main

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "mlpd" / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*/README.md"))]
MODULES = sorted(
    path for folder in ("mlpd", "bench", "conf") for path in (ROOT / folder).rglob("*.py")
)

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|work|Users|tmp|mnt)/")
_ALLOWED_PATHS = re.compile(r"/(?:home|Users)/(?:you|user)\b")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Return the prose: code is where brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = (re.sub(r"[^\w\- ]", "", t.lower()) for t in _HEADING.findall(page.read_text()))
    return {title.replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in _LINK.findall(index)}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_no_path_of_the_machine_they_were_written_on(page: Path) -> None:
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert not _MACHINE_PATH.search(_ALLOWED_PATHS.sub("", line)), f"line {number}: {line}"


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `mlpd ...` in blocks of shell commands, typed after `$ ` or bare."""
    for language, body in _FENCE.findall(text):
        if language not in ("sh", "console"):
            continue
        lines = body.replace("\\\n", " ").splitlines()
        typed = (line[2:] for line in lines if line.startswith("$ "))
        for line in typed if language == "console" else lines:
            yield from _mlpd_commands(line)


def _mlpd_commands(line: str) -> Iterator[list[str]]:
    if "mlpd" not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|<>()"):
            while words and re.fullmatch(r"\w+=\S*|do|then", words[0]):
                words.pop(0)
            if words and Path(words[0]).name == "mlpd":
                yield words[1:]
            words = []
        else:
            words.append(word)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Command, "invoke", lambda *_: None)


def parse(words: list[str]) -> None:
    """Parse a command line as the shell's `mlpd` would; needs `nothing_runs`."""
    main.main(words, prog_name="mlpd", standalone_mode=False)


README_COMMANDS = [shlex.join(words) for words in commands(README.read_text())]


def test_the_readme_shows_commands() -> None:
    assert len(README_COMMANDS) > 10


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("line", README_COMMANDS)
def test_every_command_of_the_readme_parses(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = next(_mlpd_commands(f"mlpd {line}"))
    for word in words:  # files that the tour makes before it names them
        if word.endswith((".parquet", ".onnx", ".json")):
            (tmp_path / word).parent.mkdir(exist_ok=True)
            (tmp_path / word).touch()
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    parse(words)


@pytest.mark.usefixtures("nothing_runs")
def test_an_unknown_option_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        parse(["status", "--no-such-option"])


def test_ci_runs_the_tests_as_the_readme_does() -> None:
    shown = [
        line.strip()
        for language, body in _FENCE.findall(README.read_text())
        if language == "sh"
        for line in body.splitlines()
        if "pytest" in line
    ]
    assert len(shown) == 1
    assert shown[0] in (ROOT / ".ci" / "run").read_text()


def test_every_module_says_what_it_is_for() -> None:
    assert MODULES
    for path in MODULES:
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        assert len(first) >= 10, path  # a charter in one line

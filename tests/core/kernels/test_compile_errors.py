"""What the compile child says about code that can't become a kernel: one child compiles it all."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlpd.core.errors import DefinitionError, InternalError, MlpdError
from mlpd.core.kernels import build, compile_sources, load_kernels, parse_signature
from mlpd.core.kernels.unit import source_unit

ENTRY = """
def run(x_, out_, n_):
    for i in range(n_):
        out_[i] = user(x_[i])
"""
COLUMNS = parse_signature("run", ("x_", "out_", "n_"), "const f8[], f8[], i8", None)
WRITES = parse_signature("run", ("x",), "const f8[]", None)
TO_INTEGER = parse_signature("run", ("x",), "f8", "i8")
TO_FLOAT = parse_signature("run", ("x",), "f8", "f8")
TO_NONE = parse_signature("run", ("x",), "f8", None)

BAD = {
    "allocates": "def user(x):\n    # a comment\n    y = np.zeros(3)\n    return x + y[0]\n",
    "lists": "def user(x):\n    y = [x]\n    return y[0]\n",
    "raises": "def user(x):\n    if x > 0:\n        raise ValueError(x)\n    return x\n",
    "prints": "def user(x):\n    print(x)\n    return x\n",
    "attribute": "def user(x):\n    y = x\n\n    return y.foo\n",
    "wrong_call": "def user(x):\n    return math.exp('a')\n",
    "undefined": "def user(x):\n    y = x\n    return y + undefined\n",
    "imports": "def user(x):\n    import os\n    return os.getpid() + x\n",
    "builtin": "def user(x):\n    return len(open('/etc/passwd').read())\n",
    "helper": "def helper(x):\n    return x.foo\n\n\ndef user(x):\n    return helper(x)\n",
    "no_native_code": "def user(x):\n    return math.gamma(x)\n",
}
BAD_ENTRIES = {
    "const": (WRITES, "def run(x):\n    x[0] = 1.0\n"),
    "float_result": (TO_INTEGER, "def run(x):\n    return x\n"),
    "text_result": (TO_FLOAT, 'def run(x):\n    return "a"\n'),
    "unwanted_result": (TO_NONE, "def run(x):\n    return x\n"),
    "missing_result": (TO_FLOAT, "def run(x):\n    x += 1\n"),
}
CASES = {name: (COLUMNS, text + ENTRY) for name, text in BAD.items()} | BAD_ENTRIES


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MlpdError]:
    """Return the error of each bad text, all from one child."""
    units = [
        source_unit(text, "transforms", {"run": signature}, boundscheck=True)
        for signature, text in CASES.values()
    ]
    cache = tmp_path_factory.mktemp("bad")
    request = {"cache_dir": str(cache), "units": [unit.describe() for unit in units]}
    answers = json.loads(build._run_child(json.dumps(request)))
    assert not list(cache.iterdir())
    triples = zip(CASES, units, answers, strict=True)
    return {name: build._compile_error(unit, answer) for name, unit, answer in triples}


@pytest.mark.parametrize(
    ("name", "function", "line", "message"),
    [
        ("allocates", "user", 3, r"it allocates memory, which a kernel can't do: .*zeros\("),
        ("lists", "user", 2, "it allocates memory, which a kernel can't do: .*build_list"),
        ("raises", "user", 3, "it allocates memory, .*raise .*ValueError"),
        ("prints", "run", 0, r"it needs PyErr_\w+, .* at run time: a kernel can't .* print"),
        ("attribute", "user", 4, "Unknown attribute 'foo' of type float64"),
        ("wrong_call", "user", 2, r"No implementation of .*exp.* signature: exp\("),
        ("undefined", "user", 3, "name 'undefined' is not defined"),
        ("imports", "user", 2, "IMPORT_NAME"),
        ("builtin", "user", 2, "open"),
        ("helper", "helper", 2, "Unknown attribute 'foo'"),
        ("no_native_code", "run", 0, "it needs numba_gamma at run time"),
        ("const", "run", 2, r"setitem\(readonly array"),
        ("float_result", "run", 0, "returns float64 but is declared to return i8"),
        ("text_result", "run", 0, "returns unicode_type but is declared to return f8"),
        ("unwanted_result", "run", 0, "returns float64 but is declared to return None"),
        ("missing_result", "run", 0, "returns none but is declared to return f8"),
    ],
)
def test_a_bad_function_is_named_with_its_line(
    errors: dict[str, MlpdError], name: str, function: str, line: int, message: str
) -> None:
    error = errors[name]
    assert isinstance(error, DefinitionError)
    assert error.code == "transform_compile"
    assert (error.details["function"], error.details["line"]) == (function, line), error.message
    with pytest.raises(DefinitionError, match=message):
        raise error
    assert len(error.message) < 600
    assert "\x1b" not in error.message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("def user(x):\n    return (x\n", 2, "never closed"),
        ("x = 1\nimport os\n", 2, "only plain functions and literal constants"),
        ("x = [].append\n", 1, "only plain functions and literal constants"),
        ("class A:\n    pass\n", 1, "only plain functions and literal constants"),
        ("\n@cached\ndef f(x):\n    return x\n", 3, "only plain functions"),
        ("def f(x=print(1)):\n    return x\n", 1, "only plain functions"),
        ("def f(x, *, y=print(1)):\n    return x\n", 1, "only plain functions"),
        ("def f(x):\n    return x\n", 0, "there is no function 'run'"),
        ("\ndef run(x):\n    return x\n", 2, "'run' doesn't take what its signature says"),
        ("x = " + "(" * 500 + ")" * 500 + "\n", 1, "too many nested parentheses"),
        ("\0", 0, "null"),
    ],
)
def test_text_that_isnt_plain_functions_is_refused_without_a_child(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        compile_sources(text, kernels={"run": COLUMNS}, cache_dir=tmp_path / "cache")
    assert caught.value.code == "transform_compile"
    assert caught.value.details["line"] == line
    assert not (tmp_path / "cache").exists()


def test_text_without_an_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"transforms declares no @kernel"):
        compile_sources("def f(x):\n    return x\n", kernels={}, cache_dir=tmp_path)


def test_transforms_become_kernels_and_no_module_of_their_name_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transforms.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = """
LIMIT = 3.0


def user(x: __import__("os").abort()) -> "float64":
    return min(x, LIMIT) + math.floor(abs(x)) + np.sqrt(4.0)
"""
    kernels = compile_sources(text + ENTRY, kernels={"run": COLUMNS}, cache_dir=tmp_path)
    values, out = np.array([1.5, -7.25]), np.zeros(2)
    kernels.run(values, out, 2)
    assert out.tolist() == [4.5, 1.75]


def test_a_built_in_module_that_doesnt_compile_is_our_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_kernels.py").write_text(
        "from mlpd.core.kernels import kernel\n\n\n"
        '@kernel("f8[]")\ndef broken(values):\n    values.foo()\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InternalError, match="bad_kernels: 'broken', line 6: Unknown") as caught:
        load_kernels("bad_kernels", cache_dir=tmp_path / "cache")
    assert caught.value.code == "kernel_compile"

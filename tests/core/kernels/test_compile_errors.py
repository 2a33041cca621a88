"""What the compile child says about code that can't become a kernel: one child compiles it all."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlpd.core.errors import DefinitionError, InternalError, MlpdError
from mlpd.core.kernels import build, compile_sources, load_kernels
from mlpd.core.kernels.unit import source_unit

ENTRY = """
@kernel("f8[], f8[], i8")
def run(x_, out_, n_):
    for i in range(n_):
        out_[i] = user(x_[i])
"""

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
    "const": '@kernel("const f8[]")\ndef run(x):\n    x[0] = 1.0\n',
    "float_result": '@kernel("f8", returns="i8")\ndef run(x):\n    return x\n',
    "text_result": '@kernel("f8", returns="f8")\ndef run(x):\n    return "a"\n',
    "unwanted_result": '@kernel("f8")\ndef run(x):\n    return x\n',
    "missing_result": '@kernel("f8", returns="f8")\ndef run(x):\n    x += 1\n',
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MlpdError]:
    """Return the error of each bad text, all from one child."""
    units = [
        source_unit(text if "@kernel" in text else text + ENTRY, "transforms", boundscheck=True)
        for text in BAD.values()
    ]
    cache = tmp_path_factory.mktemp("bad")
    request = {"cache_dir": str(cache), "units": [unit.describe() for unit in units]}
    answers = json.loads(build._run_child(json.dumps(request)))
    assert not list(cache.iterdir())
    triples = zip(BAD, units, answers, strict=True)
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
        ("x = 1\nimport os\n", 2, "only functions and literal constants"),
        ("x = [].append\n", 1, "only functions and literal constants"),
        ("class A:\n    pass\n", 1, "only functions and literal constants"),
        ("\n@cached\ndef f(x):\n    return x\n", 3, "decorators other than"),
        ("@kernel('f8')\n@device\ndef f(x):\n    return x\n", 3, "decorators other than"),
        ("@kernel(TYPES)\ndef f(x):\n    return x\n", 2, "decorators other than"),
        ("@device\ndef f(x=print(1)):\n    return x\n", 2, "'f' has defaults"),
        ("@device\ndef f(x, *, y=print(1)):\n    return x\n", 2, "'f' has defaults"),
        ("x = " + "(" * 500 + ")" * 500 + "\n", 1, "too many nested parentheses"),
        ("\0", 0, "null"),
    ],
)
def test_text_that_isnt_plain_functions_is_refused_without_a_child(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        compile_sources(text, cache_dir=tmp_path / "cache", what="transforms")
    assert caught.value.code == "transform_compile"
    assert caught.value.details["line"] == line
    assert not (tmp_path / "cache").exists()


def test_text_without_an_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"transforms declares no @kernel"):
        compile_sources("def f(x):\n    return x\n", cache_dir=tmp_path)


def test_transforms_become_kernels(tmp_path: Path) -> None:
    text = """
LIMIT = 3.0


@device
def user(x: __import__("os").abort()) -> "float64":
    return min(x, LIMIT) + math.floor(abs(x)) + np.sqrt(4.0)
"""
    kernels = compile_sources(text + ENTRY, cache_dir=tmp_path)
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

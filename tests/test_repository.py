"""Rules that hold for every file: sizes, docstrings, no path of one machine, and the two links."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import turbo

ROOT = Path(__file__).resolve().parent.parent
CODE = ("kernels", "envs", "turbo", "tests", "bench", "examples", "docs")
SHOWN = ("kernels", "envs", "turbo", "examples")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".cfg", ".sh", ""}

MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 80
# A longer one is named here, with its length and the reason: {"kernels/x.py": 450}
LONGER_FILES: dict[str, int] = {}
# {"turbo/train.py:main": 95}
LONGER_FUNCTIONS: dict[str, int] = {}

# An absolute path of one machine: at the start of a word, so that addresses of pages are not meant.
MACHINE_PATH = re.compile(r"(?<![\w.~*$}/-])/(?:work|root|home|tmp|Users)/")


def files(folders, suffixes):
    """The files of these folders and, where every folder is asked for, of the root."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    if folders is CODE:
        paths += sorted(ROOT.glob("*")) + sorted((ROOT / ".ci").glob("*"))
    return [
        path
        for path in paths
        if path.is_file()
        and path.suffix in suffixes
        and "__pycache__" not in path.parts
        and path.relative_to(ROOT).parts[:2] not in (("turbo", "kernels"), ("turbo", "envs"))
    ]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def definitions(body):
    """Functions and classes of a module or class body, and those under an `if` or `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions(node.body)


PYTHON = files(SHOWN, {".py"})


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_what_is_public_says_what_it_does(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} does not open with what it does"
    silent = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for node in definitions(tree.body)
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not silent, "without a docstring:\n" + "\n".join(silent)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_and_functions_stay_short(path):
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    allowed = LONGER_FILES.get(name_of(path), MAX_FILE_LINES)
    assert lines <= allowed, f"{name_of(path)} has {lines} lines, {allowed} are allowed"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            name = f"{name_of(path)}:{node.name}"
            allowed = LONGER_FUNCTIONS.get(name, MAX_FUNCTION_LINES)
            assert lines <= allowed, f"{name} has {lines} lines, {allowed} are allowed"


def test_no_path_of_one_machine():
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in files(CODE, TEXT)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if path != Path(__file__).resolve() and MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_path_pattern():
    for text in ("x = '/tmp/x'", "cd /home/me", "(/root/a)", "file:/work/b"):
        assert MACHINE_PATH.search(text)
    for text in ("example.org/work/", "~/work/", "./tmp/", "frame/work/", "$HOME/work/"):
        assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize("folder", ["kernels", "envs"])
def test_the_links(folder):
    link = ROOT / "turbo" / folder
    if not (ROOT / folder).is_dir():
        pytest.skip("an unpacked source distribution holds the files in the place of the link")
    assert link.is_symlink(), f"turbo/{folder} must be a link to ../{folder}"
    assert link.readlink().as_posix() == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py would make a root package named {folder}"
    )


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert turbo.__version__ == project["version"]
    assert f"## [{turbo.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

"""The commands: `python -m turbo` lists them, `python -m turbo train ...` runs one.

A command is a module of this package that can be run; what is said about it is the opening line of
its file. Nothing is imported for the list. Left out: what the commands do.
"""

import ast
import importlib
import sys
from difflib import get_close_matches
from pathlib import Path

import turbo


def commands() -> dict[str, str]:
    """Name and opening line of every module that can be run, in the order of the alphabet."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and '\nif __name__ == "__main__":\n' in source:
            opening = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            found[path.stem] = opening.partition(": `python -m")[0].rstrip(".")
    return found


def overview() -> str:
    """The version, how a command is run, and the list."""
    listed = commands()
    width = max(map(len, listed))
    lines = [f"  {name:{width}}  {what}" for name, what in listed.items()]
    return "\n".join(
        [
            version(),
            "",
            "usage: python -m turbo COMMAND ...   (or python -m turbo.COMMAND ...)",
            "       python -m turbo COMMAND --help   what every flag of it does",
            "",
            *lines,
        ]
    )


def version() -> str:
    """Name and version of the distribution."""
    return f"gtr-turbo {turbo.__version__}"


def main(argv: list[str] | None = None) -> int:
    """List the commands, or run one; returns the exit status."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before `conclude` is there to answer it
        print("\ninterrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name in ("-V", "--version"):
        print(version())
        return 0
    if name not in commands():
        near = get_close_matches(name, [*commands(), "--help", "--version"], n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        print(f"error: {name!r} is no command{hint} (see python -m turbo)", file=sys.stderr)
        return 2
    from turbo.flags import conclude  # after the list, which nothing is imported for

    def run() -> int:
        return importlib.import_module(f"turbo.{name}").main(argv[1:])

    return conclude(run)


if __name__ == "__main__":
    sys.exit(main())

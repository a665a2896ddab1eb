"""Links from Markdown to lines of code, kept right: `python -m bench.tour_links`.

A link that names what it shows, [`Decoder.advance`](../turbo/decode.py#L114), gets the number of
the line where that function, class, field or constant is defined. A test fails when a number is out
of date, or when a link to a line names nothing.

Left out: links without a line, and whether files are there (tests/test_markdown.py).
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # that of bench.harness comes with torch: seconds
FOLDERS = ("docs", "kernels", "envs", "turbo", "bench", "examples", "tests")
LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<path>[^)#\s]+\.py)#L(?P<line>\d+)\)")


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    inside = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md"))]
    return [*sorted(ROOT.glob("*.md")), *inside]


def definitions(source: str) -> dict[str, int]:
    """The line of every function, class, method, field and constant, by its qualified name."""
    found: dict[str, int] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.setdefault(prefix + node.name, node.lineno)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            found.setdefault(prefix + name.id, node.lineno)

    walk(ast.parse(source).body, "")
    return found


def refresh(text: str, folder: Path) -> str:
    """`text` with every link's line put right; ValueError names the link that cannot be."""

    def line(match: re.Match) -> str:
        shown, path = match["text"], folder / match["path"]
        name = re.fullmatch(r"`([\w.]+)`", shown)
        if name is None:
            raise ValueError(f"{match[0]}: the text of a link to a line is a name, like `main`")
        if not path.is_file():
            raise ValueError(f"{match[0]}: there is no such file")
        lines = definitions(path.read_text(encoding="utf-8"))
        if name[1] not in lines:
            raise ValueError(f"{match[0]}: {match['path']} does not define {name[1]}")
        return f"[{shown}]({match['path']}#L{lines[name[1]]})"

    return LINK.sub(line, text)


def main() -> int:
    """Put the links of every page right; returns the exit status."""
    changed = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            right = refresh(text, page.parent)
        except ValueError as error:
            print(f"error: {page.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 1
        if right != text:
            page.write_text(right, encoding="utf-8")
            changed += 1
    print(f"{changed} pages changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

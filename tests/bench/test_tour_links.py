"""bench/tour_links.py: links to lines are right, are put right, or are named where they cannot."""

import pytest

from bench.tour_links import ROOT, definitions, pages, refresh


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_lines_are_right(page):
    text = page.read_text(encoding="utf-8")
    assert refresh(text, page.parent) == text, "run `make tour`"


def test_the_tour_has_links_and_they_lead_to_definitions():
    """The line that a link names holds the name: checked without the parser."""
    from bench.tour_links import LINK

    page = ROOT / "docs" / "tour.md"
    links = list(LINK.finditer(page.read_text(encoding="utf-8")))
    assert len(links) > 50
    for link in links:
        lines = (page.parent / link["path"]).read_text(encoding="utf-8").splitlines()
        name = link["text"].strip("`").rpartition(".")[2]
        line = lines[int(link["line"]) - 1].strip()
        assert line.startswith((f"def {name}(", f"class {name}", f"{name} = ", f"{name}: ")), line


SOURCE = '''"""Doc."""
import os

LIMIT: int = 3
FIRST, SECOND = 1, 2


@decorated
class Thing:
    """Doc."""

    size: int = 0

    @property
    def width(self):
        def inner(): ...


def thing(): ...
'''


def test_definitions():
    assert definitions(SOURCE) == {
        "LIMIT": 4,
        "FIRST": 5,
        "SECOND": 5,
        "Thing": 9,
        "Thing.size": 12,
        "Thing.width": 15,
        "thing": 19,
    }


def test_lines_are_put_right(tmp_path):
    (tmp_path / "code.py").write_text(SOURCE)
    text = "See [`Thing.width`](code.py#L1), [`thing`](code.py#L999), [code](code.py), [`x`](a.md)."
    right = (
        "See [`Thing.width`](code.py#L15), [`thing`](code.py#L19), [code](code.py), [`x`](a.md)."
    )
    assert refresh(text, tmp_path) == right == refresh(right, tmp_path)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("[`absent`](code.py#L1)", "does not define absent"),
        ("[`inner`](code.py#L1)", "does not define inner"),
        ("[`thing`](none.py#L1)", "there is no such file"),
        ("[the thing](code.py#L1)", "is a name, like `main`"),
    ],
)
def test_what_cannot_be_put_right_is_named(tmp_path, link, message):
    (tmp_path / "code.py").write_text(SOURCE)
    with pytest.raises(ValueError, match=message):
        refresh(f"See {link}.", tmp_path)

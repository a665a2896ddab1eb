"""Links of all Markdown files lead somewhere, also to headings; quoted figures are the study's."""

import re
from pathlib import Path

import pytest

from bench.tour_links import ROOT, pages

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
FIGURE = re.compile(r"(-?\d+\.\d)(?: %| points)? \[(-?\d+\.\d), (-?\d+\.\d)\]")


def prose(text: str) -> str:
    """Markdown without its code, in which brackets are no links."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_code, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        if count:
            found[f"{slug}-{count}"] = 1
    return set(found)


def dead_links(text: str, page: Path) -> list[str]:
    """Links of a page that lead nowhere within the repository; others are not followed."""
    dead = []
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or not found.is_relative_to(ROOT):
            dead.append(target)
        elif anchor and found.suffix == ".md":
            if anchor not in anchors(found.read_text(encoding="utf-8")):
                dead.append(target)
        elif anchor and not re.fullmatch(r"L\d+", anchor):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    dead = dead_links(page.read_text(encoding="utf-8"), page)
    assert not dead, f"{page.relative_to(ROOT)} links to what is not there: {', '.join(dead)}"


def test_dead_links_are_seen():
    page = ROOT / "README.md"
    text = """[a](docs/LOG.md) [b](docs/none.md) ![c](docs/none.png) [d](#commands) [e](#nowhere)
[f](docs/LOG.md#nowhere) [g](https://example.org/x) `[h](none.md)` [`i`](none.py#L3)
[j](turbo/train.py#L3) [k](turbo/train.py#main) [l](../../outside.md) [m [n]](none2.md)
```
[o](none3.md)
```
"""
    assert dead_links(text, page) == [
        "docs/none.md",
        "docs/none.png",
        "#nowhere",
        "docs/LOG.md#nowhere",
        "none.py#L3",
        "turbo/train.py#main",
        "../../outside.md",
        "none2.md",
    ]


def test_anchors_are_those_of_github():
    text = "# What's `new`?\n## A_b, [c d](x.md) (e)\n### Same\n### Same\n```\n# no heading\n```\n"
    assert anchors(text) == {"whats-new", "a_b-c-d-e", "same", "same-1"}


def test_pages_for_learners_are_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("tour", "learn", "faq", "reliability", "metrics"):
        assert f"(docs/{name}.md)" in text


def test_quoted_figures_are_those_of_the_study():
    """All figures with an interval in docs/learn.md; after another study the page is to be read."""
    study = (ROOT / "docs" / "study" / "README.md").read_text(encoding="utf-8")
    known = set(FIGURE.findall(" ".join(study.split())))
    learn = (ROOT / "docs" / "learn.md").read_text(encoding="utf-8")
    quoted = FIGURE.findall(" ".join(learn.split()))
    assert len(quoted) > 15
    unknown = [figure for figure in quoted if figure not in known]
    assert not unknown, f"docs/learn.md quotes what docs/study/README.md does not say: {unknown}"

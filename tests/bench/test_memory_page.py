"""The page of planned memory, and README's table, say what the planner says."""

from bench import memory_page


def test_the_page_is_what_the_planner_says():
    written = memory_page.PAGE.read_text(encoding="utf-8")
    assert written == memory_page.page(), "run `make memory`"
    assert "not measured" in written


def test_readme_has_the_same_table():
    text = memory_page.README.read_text(encoding="utf-8")
    assert memory_page.readme(text) == text, "run `make memory`"
    assert memory_page.table() in text
    section = text.split("## Which model fits which card")[1].split("\n## ")[0]
    assert "not measured" in section

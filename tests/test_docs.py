"""The code of README and docs runs, its commands exist, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from earlybird.cli import main
from earlybird.methods import METHODS
from earlybird.train.recipe import keys

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every call of earlybird in a page's shell blocks, indented blocks and spans of code."""
    for page in PAGES:
        for text, before in ((page.read_text("utf-8"), r"(?:^ {4}|`)"), ("\n".join(blocks(page, "sh")), "^")):
            for found in re.findall(before + r"earlybird ([a-z]+)([^`#\n]*)", text, flags=re.MULTILINE):
                yield page.name, *found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


def test_commands_and_flags_exist(capsys):
    helps = {}
    found = list(commands())
    assert len(found) > 20
    for page, command, rest in found:
        words = [command]
        if command == "ticket":  # a group: its commands have flags of their own
            words += rest.split()[:1]
            command = " ".join(words)
        if command not in helps:
            assert main([*words, "--help"]) == 0, f"{page}: {command}"
            helps[command] = capsys.readouterr().out
        for flag in re.findall(r"(?<![\w-])--[a-z-]+", rest):
            assert flag in re.findall(r"--[a-z-]+", helps[command]), f"{page}: earlybird {command} {flag}"


def test_recipes_page_names_every_key():
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    assert [key.name for key in keys() if not key.method and f"`{key.name}`" not in text] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_that_names_its_settings(method):
    text = (ROOT / "docs" / f"{method.replace('_', '-')}.md").read_text("utf-8")
    assert METHODS[method].link in text
    assert "## When it does not pay" in text
    # 'strict' is part of what the published preset means
    own = [key.name for key in keys() if key.method == method and key.name != "strict"]
    assert [name for name in own if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target

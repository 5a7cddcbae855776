"""Hooks of MkDocs: reference pages that are generated from the code, and links to files outside the site.

See https://www.mkdocs.org/user-guide/configuration/#hooks.
"""

import argparse
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gpdit_lightning.cli import RECIPE, VERBS, Verb, record_of
from gpdit_lightning.cli.fit_help import HELP
from gpdit_lightning.cli.parsing import parser_of

OPTION_OF_FIT = re.compile(r"  (--\S+ .*)\n((?: {8}.*\n?)*)")
TOUR = Path(__file__).with_name("tour.py")
FIT_PAGE = "fit.md"  # also of `validate` and `test`


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for the options of each verb, and one that lists the verbs."""
    pages = {page_of(name, verb): options_page(name, verb) for name, verb in reversed(VERBS.items())}
    rows = (f"| [`{name}`]({page_of(name, verb)}) | {verb.summary} |" for name, verb in VERBS.items())
    pages["verbs.md"] = "\n".join(["# Verbs and options", "", "| verb | purpose |", "|---|---|", *rows, ""])
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}", content=content))
    files.append(File.generated(config, "tutorials/tour.md", content=tour_page()))
    return files


def tour_page() -> str:
    """Return the notebook docs/tour.py as Markdown."""
    _, *cells = re.split(r"^# %%", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return "\n".join(
        re.sub(r"^# ?", "", cell.removeprefix(" [markdown]\n"), flags=re.MULTILINE)
        if cell.startswith(" [markdown]")
        else f"```python\n{cell.strip()}\n```\n"
        for cell in cells
    )


def page_of(name: str, verb: Verb) -> str:
    """Return the name of the page of a verb."""
    return FIT_PAGE if verb.record == RECIPE else f"{name}.md"


def options_page(name: str, verb: Verb) -> str:
    """Return the options of a verb as Markdown."""
    if verb.record == RECIPE:
        return f"# fit, validate, test\n\n{''.join(options_of_fit())}"
    parser = parser_of(name, verb.summary, record_of(name))
    parts = [f"# {name}\n\n{verb.summary}\n\n    {parser.format_usage().strip()}\n"]
    for group in parser._action_groups:
        options = [option(action) for action in group._group_actions if is_shown(action)]
        if options:
            parts.append(f"\n## {(group.title or '').capitalize()}\n\n{''.join(options)}")
    return "".join(parts)


def is_shown(action: argparse.Action) -> bool:
    """Return whether an option is listed."""
    return argparse.SUPPRESS not in (action.help, action.default)


def option(action: argparse.Action) -> str:
    """Return an option as an entry of a definition list."""
    names = ", ".join(action.option_strings) or action.dest
    has_value = action.nargs != 0 and action.option_strings
    value = f" {action.metavar or action.dest.upper()}" if has_value else ""
    default = f" Default: `{action.default}`." if isinstance(action.default, bool | int | float | str) else ""
    return f"`{names}{value}`\n:   {' '.join((action.help or '').split()) or 'See the recipe.'}{default}\n\n"


def options_of_fit() -> Iterator[str]:
    """Yield the sections of the checked-in help of `fit` as Markdown."""
    head, *sections = re.split(r"^(?=\S.*:$)", HELP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    yield f"```text\n{head.strip()}\n```\n"
    for section in sections:
        title, _, options = section.partition(":\n")
        yield f"\n## {title}\n\n"
        for name, text in OPTION_OF_FIT.findall(options):
            yield f"`{name}`\n:   {' '.join(text.split()) or 'See Lightning.'}\n\n"


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Show links to files outside the site as their paths: the site does not depend on where the project is hosted."""
    folder = posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        return link[0] if target.startswith("docs/") else f"{link[1]} (`{target}`)"

    return re.sub(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)[^)]*\)", shown, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Remove the roles of references in docstrings, such as :class:, of which the names remain."""
    return re.sub(r":(?:class|func|meth|data|mod):(?=<code>|<a )", "", html)

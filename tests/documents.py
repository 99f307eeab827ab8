"""The documents, as tests read them: blocks of code, tables, names in code spans."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md"])


def text_of_file(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """Return the blocks of code in a language; those inside of lists lose their indent."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def block_with(text: str, part: str) -> str:
    """Return the one block of code that contains a text."""
    found = [block for block in blocks(text) if part in block]
    assert len(found) == 1, part
    return found[0]


def prose(text: str) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def section(text: str, heading: str) -> str:
    return re.split(rf"^#+ {re.escape(heading)}\n", text, flags=re.MULTILINE)[1].partition("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of each table, without the row that names its columns."""
    found = re.findall(r"^\|.*\n\|[-:| ]+\|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in table.splitlines()]
        for table in found
    ]


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of all tables below a heading."""
    return [row for table in tables(section(text, heading)) for row in table]


def names(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)

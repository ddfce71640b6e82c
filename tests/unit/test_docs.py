"""docs/papers.md names functions with their lines. ``python tests/unit/test_docs.py`` puts the lines right."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[2]
PAPERS = ROOT / "docs" / "papers.md"
# `name`, `file.py:12`; a further `name`, line 12 is in the file named last.
REFERENCE = re.compile(r"(`(?P<name>[\w.]+)`, )(?:(`(?P<file>[\w/]+\.py):)(?P<at>\d+)`|(line )(?P<line>\d+))")


def lines_of(file: str, name: str) -> list[int]:
    """Where a file defines or assigns a name."""
    own = re.escape(name.rpartition(".")[2])
    begins = re.compile(rf"\s*(def|class) {own}\b|{own}\b.*=")
    return [at for at, line in enumerate((ROOT / file).read_text().splitlines(), 1) if begins.match(line)]


def corrected(text: str) -> tuple[str, list[str]]:
    """The text with every line number right, and what could not be found or was wrong."""
    wrong, file = [], ""

    def mend(match: re.Match) -> str:
        nonlocal file
        file = match["file"] or file
        said = int(match["at"] or match["line"])
        found = lines_of(file, match["name"])
        if said in found:
            return match[0]
        wrong.append(f"{match['name']}, {file}:{said}, is at {found}")
        if not found:
            return match[0]
        nearest = min(found, key=lambda at: abs(at - said))
        return f"{match[1]}{match[3]}{nearest}`" if match["file"] else f"{match[1]}{match[6]}{nearest}"

    return REFERENCE.sub(mend, text), wrong


def test_every_function_is_where_the_papers_page_says():
    _, wrong = corrected(PAPERS.read_text())
    assert not wrong, "\n".join([*wrong, f"python {pathlib.Path(__file__).relative_to(ROOT)} puts lines right"])


def test_a_moved_function_is_found():
    here = "tests/unit/test_docs.py"
    at = lines_of(here, "lines_of")[0]
    text = f"`lines_of`, `{here}:3`; `corrected`, line 4; `nothing`, line 5"
    mended, wrong = corrected(text)
    assert mended.startswith(f"`lines_of`, `{here}:{at}`; `corrected`, line {lines_of(here, 'corrected')[0]};")
    assert len(wrong) == 3 and wrong[2].endswith("is at []")


if __name__ == "__main__":
    mended, wrong = corrected(PAPERS.read_text())
    PAPERS.write_text(mended)
    sys.exit("\n".join(x for x in wrong if x.endswith("[]")) or 0)

"""
The figures in the pages, compared with results/*.csv: the tables between <!-- table: NAME --> and
<!-- end -->, the decimal numbers in the assessment's sentences, each of which must stand in one of
its tables or in CITED, and some phrases of the lessons.
"""

import re
from pathlib import Path

from assessment.measure import ROOT, markdown
from assessment.tables import TABLES, attention, step_memory
from plumbing.errors import InputError
from plumbing.files import replacing

README = ROOT / "README.md"
ASSESSMENT = ROOT / "assessment" / "README.md"

# Numbers in sentences that no table of ours holds, and where they come from
CITED = {
    "2.13": "the version of torch",
    "0.8": "the temperature",
    "1.24": "Longformer, table 4, shrinking windows",
    "1.21": "Longformer, table 4, growing windows",
    "0.193": "all three before attend was rewritten: the same runs but for rounding",
    "0.029": "the same",
    "258.6": "python -m assessment cost endless",
    "258.7": "python -m assessment cost endless",
}

MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(?:(?!<!-- table:).)*?(<!-- end -->)", re.DOTALL)
DECIMAL = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\d.]*\w)")   # not 1.5e-2, and not 2.13.0


def renewed(page):
    """The text of a page, each table as the CSV files have it"""
    tables = {table.__name__: table for table in TABLES}

    def fill(found):
        if found[2] not in tables:
            raise InputError(f"there is no table {found[2]}: choose from {', '.join(tables)}")
        return f"{found[1]}\n{markdown(*tables[found[2]]())}\n{found[3]}"
    return MARKED.sub(fill, page)


def strangers(page):
    """The decimal numbers of a page's sentences that stand in none of its tables"""
    tables = "".join(found[0] for found in MARKED.finditer(page))
    known = set(DECIMAL.findall(tables)) | CITED.keys()
    sentences = re.sub(r"`[^`]*`|\]\([^)]*\)", "", MARKED.sub("", page))
    return [number for number in DECIMAL.findall(sentences) if number not in known]


def in_lessons():
    """{page: words that it must contain}"""
    columns, rows = attention()
    faster = dict(zip(columns, rows["forward and backward"], strict=True))
    return {
        "3_rope.md": f"{step_memory('rope', 2048)} times the memory",
        "5_windows.md": f"{faster['1,024']} times at 1,024 tokens, {faster['4,096']} at 4,096 and "
                        f"{faster['16,384']} at 16,384",
    }


def differences():
    """A line for every figure in the pages that is not as in the CSV files"""
    found = []
    marked = []
    for page in (README, ASSESSMENT):
        text = page.read_text(encoding="utf-8")
        for old, new in zip(MARKED.finditer(text), MARKED.finditer(renewed(text)), strict=True):
            marked.append(old[2])
            if old[0] != new[0]:
                found.append(f"{page.name}: table {old[2]}")
    for table in TABLES:
        times = marked.count(table.__name__)
        if times != 1:
            found.append(f"table {table.__name__} stands {times} times in the pages")
    for number in strangers(ASSESSMENT.read_text(encoding="utf-8")):
        found.append(f"{ASSESSMENT.name}: {number} stands in no table")
    for name, words in in_lessons().items():
        text = Path(ROOT, "lessons", name).read_text(encoding="utf-8")
        if words not in " ".join(text.split()):
            found.append(f"{name}: does not say {words!r}")
    return found


def main(argv):
    if argv not in ([], ["--write"]):
        raise InputError(f"figures takes --write or nothing, found {' '.join(argv)}")
    if argv:
        for page in (README, ASSESSMENT):
            text = renewed(page.read_text(encoding="utf-8"))
            with replacing(page) as f:
                f.write(text.encode())
    found = differences()
    if found:
        raise InputError("figures in the pages differ from results/*.csv: " + "; ".join(found))
    print("the tables, and the decimal numbers in the assessment's sentences, are as in "
          "results/*.csv")

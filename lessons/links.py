"""
`python -m lessons.links` renews the links of the lessons to lines of the code, after a change of
it. Such a link names a function or a class: [`rotate`](../model.py#L1-L9).
"""

import re
from pathlib import Path

from lessons.exercises import find
from plumbing.errors import InputError, run_script

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L[\d\-L]+\)")


def renewed(text):
    """The text of a page with links that lead to where the functions are now"""
    def link(match):
        name, file = match.groups()
        node = find((HERE.parent / file).read_text(encoding="utf-8"), name)
        if node is None:
            raise InputError(f"a lesson links to {name} in {file}, where it is not")
        return f"[`{name}`](../{file}#L{node.lineno}-L{node.end_lineno})"
    return LINK.sub(link, text)


def main(argv):
    if argv:
        raise InputError(f"lessons.links takes nothing more, found {' '.join(argv)}")
    for page in sorted(HERE.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(renewed(text), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run_script(main)

"""Rules of English for docstrings, comments, messages and pages.

List what breaks them in some files or folders: `python tests/test_english.py distattn/cache`.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = ("distattn", "README.md", "docs/pages")

NO_VERB = (
    "A An The All Any Both Each Every No None Of In On At By From For With Without To Over As "
    "How Why When If Whether Who Its It This These They There One Only Also What Which Where "
    "That Those Whoever"
)
STARTS = re.compile(
    r"(?:^|[.!?:;]\s+|\n\s*\n\s*|\n\s+\w+: )(?:[-*] +)?(Of|Those|What|Which|Whoever|That|Where)\b"
)
BANNED = re.compile(
    r"\b(whoever|nobody|by turns|hand(?:s|ed|ing)? in|such an?|so many|one's own"
    r"|the former|the latter|no number|(?:is|are) (?-i:none)|lies?|the same bits"
    r"|(?<!dot )(?<!Dot )products|it is not(?=[.,;]))\b",
    re.IGNORECASE,
)
ALONE = re.compile(r"(The same|The inverse|Likewise|As above|See above)\.?")


def sayings(text: str) -> Iterator[tuple[int, str]]:
    """Line in the text (from 0) and the words of each thing that the rules forbid."""
    text = re.sub(r"``.*?``|`[^`]*`", lambda code: "`" + "\n" * code[0].count("\n"), text)
    if ALONE.fullmatch(text.strip()):
        yield 0, text.strip()
    for pattern in (STARTS, BANNED):
        for hit in pattern.finditer(text):
            yield text.count("\n", 0, hit.start(1)), " ".join(text[hit.start(1) :].split()[:6])


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, comment and message."""
    tree, read = ast.parse(source), set()
    for node in ast.walk(tree):  # from the outside in: parts of what is read are not read again
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            read.add(node.value)
            yield node.lineno, str(node.value.value)
        elif isinstance(node, ast.JoinedStr):
            read.update(node.values)
            yield (
                node.lineno,
                "".join(x.value if isinstance(x, ast.Constant) else "x" for x in node.values),
            )
        elif isinstance(node, ast.Constant) and node not in read and " " in str(node.value):
            yield node.lineno, str(node.value)
    block: list[tokenize.TokenInfo] = []
    for token in (*tokenize.generate_tokens(io.StringIO(source).readline), None):
        if token is not None and token.type in (tokenize.NL, tokenize.NEWLINE):
            continue
        follows = token is not None and block and token.type == tokenize.COMMENT
        if not follows or token.start != (block[-1].start[0] + 1, block[-1].start[1]):
            if block:
                text = "\n".join(x.string.lstrip("# ") for x in block)
                yield block[0].start[0], text[:1].upper() + text[1:]
            block = []
        if token is not None and token.type == tokenize.COMMENT:
            block.append(token)


def verbless(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings of functions, other than properties, that do not begin with a verb."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("property" in ast.unparse(x) for x in node.decorator_list):
            continue
        text = ast.get_docstring(node) or ""
        if text.split(maxsplit=1)[:1] and text.split(maxsplit=1)[0].strip(",") in NO_VERB.split():
            yield node.lineno, f"{node.name}: no verb: " + " ".join(text.split()[:6])


def offences(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blank = re.compile(r"^(`{3,}).*?^\1`*$", re.DOTALL | re.MULTILINE)
        texts = [(1, blank.sub(lambda code: "\n" * code[0].count("\n"), source))]
        found = []
    else:
        texts, found = list(python_texts(source)), list(verbless(source))
    found += [(line + below, words) for line, text in texts for below, words in sayings(text)]
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path
    return [f"{name}:{line}: {words}" for line, words in sorted(set(found))]


def files(*places: str) -> list[Path]:
    found = (path for place in places for path in ((ROOT / place), *(ROOT / place).rglob("*")))
    return sorted({path for path in found if path.is_file() and path.suffix in (".py", ".md")})


@pytest.mark.parametrize("place", TEXTS)
def test_text_is_plain(place):
    found = [line for path in files(place) for line in offences(path)]
    assert not found, "\n" + "\n".join(found)


def test_the_rules_know_offenders_from_innocents():
    wrong = ("Of a message.", "Where none is given, it is read.", "It lies there.", "The same.")
    right = ("Bytes sent per message.", "Return the array whose axis is sharded.", "`lies`")
    assert all(list(sayings(text)) for text in wrong)
    assert not any(list(sayings(text)) for text in right)
    code = 'def f():\n    """{}"""\n    raise E("{}")  # {}\n'
    assert len([*verbless(code.format("The sum.", "a b c d", "e"))]) == 1
    assert not [*verbless(code.format("Return the sum.", "a b c d", "e"))]
    texts = [text for _, text in python_texts(code.format("Return x.", "No one at all", "of y"))]
    assert texts == ["Return x.", "No one at all", "Of y"]


if __name__ == "__main__":
    sys.exit("\n".join(line for path in files(*(sys.argv[1:] or TEXTS)) for line in offences(path)))

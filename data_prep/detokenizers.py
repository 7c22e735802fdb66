"""Detokenizers, which restore ordinary spelling in corpora that were published as separate tokens.

Wikitext (Merity et al., 2017), LM1B (Chelba et al., 2014), the Penn Treebank and the scientific papers of arXiv and
PubMed (Cohan et al., 2018) have spaces around punctuation, LAMBADA (Paperno et al., 2016) typographic quotes. Published
perplexities are measured on text without them (Radford et al., 2019; MDLM, arXiv 2406.07524). The substitutions are
those of the evaluations of Megatron-LM, SEDD, MDLM and Duo, in their order, mistakes included: a perplexity is
comparable only on the same characters. A detokenizer is a list of steps, each a function of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Step = Callable[[str], str]


def _replace(*pairs: tuple[str, str]) -> Step:
    """Return the step that replaces texts, pair by pair."""

    def step(text: str) -> str:
        for old, new in pairs:
            text = text.replace(old, new)
        return text

    return step


def _sub(pattern: str, replacement: str) -> Step:
    found = re.compile(pattern)
    return lambda text: found.sub(replacement, text)


def _strip_inside(opening: str, closing: str) -> Step:
    """Return the step that removes white space just inside of a pair of marks, up to the next closing one."""

    def step(text: str) -> str:
        parts, at = [], 0
        while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
            parts += [text[at : start + 1], text[start + 1 : end].strip(), closing]
            at = end + 1
        return "".join([*parts, text[at:]])

    return step


_WIKITEXT = (
    _replace(("s '", "s'")),
    _sub(r"/' [0-9]/", "/'[0-9]/"),  # as published: meant for the apostrophe in front of a year
    _replace((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    _replace(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    *(_strip_inside(*pair) for pair in ("()", "[]", "{}", '""', "''")),
    _replace(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    _replace((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)
_LM1B = (
    _replace(("http : / / ", "http://"), ("https : / / ", "https://")),
    _sub(r" '(\w+)", r"'\1"),
    _sub(r" (\w+) \. ", r" \1. "),
    _sub(r" (\w+) \.$", r" \1."),
    _replace((" ? ", "? ")),
    _sub(r" \?$", "?"),
    _replace((" ! ", "! ")),
    _sub(r" !$", "!"),
    _replace((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    _sub(r'" ([^"]+) "', r'"\1"'),
    _sub(r"' ([^']+) '", r"'\1'"),
    _sub(r"\( ([^()]+) \)", r"(\1)"),
    _sub(r"\[ ([^\[\]]+) \]", r"[\1]"),
    _replace(("$ ", "$"), ("£ ", "£")),
)
_NUMBERS = 10  # times that N is replaced, because one replacement leaves every second N of a row of them
_PTB = (
    str.strip,  # of each line, as it is read for the published evaluations
    _replace((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    _replace(*[(" N ", " 1 ")] * _NUMBERS),  # N stands for any number
    _replace(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
)
# A passage begins with a newline, as in the evaluations of GPT-2 and MDLM.
_LAMBADA = (_replace(("\u201c", '"'), ("\u201d", '"')), lambda text: "\n" + text.strip())


def _text(*steps: Step) -> Step:
    def detokenize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return detokenize


def _by_line(detokenize: Step, *, with_feed: bool) -> Step:
    """Return the detokenizer of a corpus of lines: it sees each line alone, as published evaluations read it.

    In a whole text, quotation marks of different lines would be paired. `with_feed`: a line includes its line feed.
    """

    def by_line(text: str) -> str:
        *lines, last = text.split("\n")
        if not with_feed:
            return "\n".join(map(detokenize, (*lines, last)))
        return "".join(map(detokenize, (*(f"{line}\n" for line in lines), last)))

    return by_line


DETOKENIZERS: Mapping[str, Step] = {
    "none": lambda text: text,
    "wikitext": _by_line(_text(*_WIKITEXT), with_feed=True),
    "lm1b": _by_line(_text(*_LM1B), with_feed=False),
    "ptb": _by_line(_text(*_PTB), with_feed=False),
    "lambada": _text(*_LAMBADA),
    "scientific_papers": _text(*_WIKITEXT, *_LM1B),
}

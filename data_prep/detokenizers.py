"""Detokenizers, which restore ordinary spelling in corpora that were published as separate tokens.

Wikitext (Merity et al., 2017), LM1B (Chelba et al., 2014), the Penn Treebank and the scientific papers of arXiv and
PubMed (Cohan et al., 2018) have spaces around punctuation, LAMBADA (Paperno et al., 2016) typographic quotes. Published
perplexities are measured on text without them (Radford et al., 2019; MDLM, arXiv 2406.07524). A detokenizer is a list
of substitutions, applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Replacement = str | Callable[[re.Match[str]], str]
Rules = Sequence[tuple[re.Pattern[str], Replacement]]


def _rules(*pairs: tuple[str, Replacement]) -> Rules:
    return [(re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in pairs]


_PAIRS = (
    (r"\( *([^()\n]*?) *\)", r"(\1)"),
    (r"\[ *([^\[\]\n]*?) *\]", r"[\1]"),
    (r'" +([^"\n]*?) +"', r'"\1"'),
)
_WIKITEXT = _rules(
    (r" @([-,.])@ ", r"\1"),  # inside a number or a compound
    (r"(?<=s) ' ?(?= )", "'"),
    (r" '(?=(?:s|t|d|m|re|ve|ll)\b)", "'"),
    (r" ([,.:;!?])(?= |$)", r"\1"),
    *_PAIRS,
    (r"\{ *([^{}\n]*?) *\}", r"{\1}"),
    (r"' +([^'\n]+?) +'(?=\W)", r"'\1'"),
    (r" ° ", "°"),
    (r"=(?: =)+", lambda found: found[0].replace(" ", "")),
    (r" $", ""),
    (r"^ ", ""),
)
_LM1B = _rules(
    (r"(https?) : / / ", r"\1://"),
    (r" '(?=\w)", "'"),
    (r" ([,.:;!?])(?= |$)", r"\1"),
    (r" / ", "/"),
    *_PAIRS,
    (r"([$£]) ", r"\1"),
)
_PTB = _rules(
    (r" (?='s|n't)", ""),
    (r"(?<=s) '(?= )", "'"),
    (r" \n ", "\n"),
    (r"\\/", "/"),
    (r"(?<= )N(?= )", "1"),  # N stands for any number
    (r"([$#]) (?=1)", r"\1"),
    (r"<unk>", "?"),
)
_LAMBADA = _rules(("[\u201c\u201d]", '"'))


def _apply(rules: Rules) -> Callable[[str], str]:
    def detokenize(text: str) -> str:
        for pattern, replacement in rules:
            text = pattern.sub(replacement, text)
        return text

    return detokenize


DETOKENIZERS: Mapping[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "wikitext": _apply(_WIKITEXT),
    "lm1b": _apply(_LM1B),
    "ptb": _apply(_PTB),
    # A passage begins with a newline, as in the evaluations of GPT-2 and MDLM.
    "lambada": lambda text: "\n" + _apply(_LAMBADA)(text).strip(),
    "scientific_papers": lambda text: _apply(_LM1B)(_apply(_WIKITEXT)(text)),
}

"""Chat templates of published tokenizers: conversations as ids.

A template is a Jinja program that writes a conversation as text, with the names of special tokens in it. The same
names in the text of a message are no tokens: they are replaced by stand-ins before the template runs, so that each name
in the result was placed by the template, and are put back when the text between the tokens is encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scmdm.data.tokenizers.base import ReservedSymbol, UnknownSymbol
from scmdm.system.untrusted import describe

ASSISTANT, USER = "assistant", "user"
LARGEST_TEMPLATE = 1 << 20  # characters
_LONGEST = 1 << 26  # characters of a conversation
# Code points that are reserved for use inside of a program.
_MARK, _OPEN, _CLOSE = "\ufdd1", "\ufdd2", "\ufdd3"


class UnusableChat(ValueError):
    """A template refuses a conversation, or writes it in a form whose answers cannot be found."""

    reason = "chat that the template refuses"


@dataclass(frozen=True)
class Turn:
    """A message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a conversation up to the end of its last answer."""

    ids: list[int]
    given: list[bool]  # whether each id is outside of the answers


class ChatTemplate:
    """Chat template of a tokenizer.

    Args:
        source: the Jinja program.
        added: special tokens of the tokenizer by id, those that a template can place.
        names: names of the beginning and end tokens, which programs read as `bos_token` and `eos_token`.
        encode: encoder of text in which the names of special tokens are ordinary text.
        mask_id: id that a template must not place.

    Raises:
        ValueError: the program is malformed.
    """

    def __init__(
        self,
        source: str,
        added: Mapping[int, tokenizers.AddedToken],
        names: Mapping[str, str],
        encode: Callable[[str], list[int]],
        mask_id: int,
    ) -> None:
        if len(source) > LARGEST_TEMPLATE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {LARGEST_TEMPLATE} are read")
        try:
            self._program = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is malformed: {describe(error)}") from error
        self.source, self._names, self._encode, self._mask_id = source, names, encode, mask_id
        # The longest name first, as the tokenizers library does.
        tokens = sorted(added.items(), key=lambda item: -len(item[1].content))
        self._spelled = [token.content for _, token in tokens]
        self._ids = {token.content: id_ for id_, token in tokens}
        self._placed = re.compile("|".join(map(_pattern, (token for _, token in tokens))) or r"(?!)")
        self._name = re.compile("|".join(map(re.escape, self._spelled)) or r"(?!)")
        self._stand_in = re.compile(f"{_MARK}(\\d+){_MARK}")
        self.end = self._end_of_answers()

    @property
    def end_id(self) -> int:
        """Id of the token that the template places after each answer."""
        return self._ids[self.end]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids of a conversation to be answered. Raises UnusableChat and UnknownSymbol."""
        return self.encode_text(self.render(turns))

    def encode(self, turns: Sequence[Turn]) -> EncodedChat:
        """Return the ids of a conversation up to the end of its last answer. Raises UnusableChat and UnknownSymbol.

        An answer begins where the same conversation, cut before it, would be continued by the model.
        """
        ids: list[int] = []
        given: list[bool] = []
        whole = self.render(turns, to_be_answered=False)
        at = 0
        for start, end in self._answers(turns, whole):
            for part, is_given in ((whole[at:start], True), (whole[start:end], False)):
                found = self.encode_text(part)
                ids += found
                given += [is_given] * len(found)
            at = end
        return EncodedChat(ids, given)

    def render(self, turns: Sequence[Turn], *, to_be_answered: bool = True) -> str:
        """Return a conversation as text for `encode_text`. Raises UnusableChat and UnknownSymbol."""
        messages = [asdict(Turn(turn.role, self._without_names(turn.content))) for turn in turns]
        found: list[str] = []
        size = 0
        try:
            for part in self._program.generate(
                messages=messages, add_generation_prompt=to_be_answered, **self._names, tools=None, documents=None
            ):
                found.append(part)
                size += len(part)
                if size > _LONGEST:
                    raise ValueError(f"it writes more than {_LONGEST} characters")
        except Exception as error:  # a program of a stranger raises anything
            raise UnusableChat(f"the chat template fails: {describe(error)}") from error
        return "".join(found)

    def marked(self, turns: Sequence[Turn], *, continued: bool = False) -> str:
        """Return a conversation to be answered, for programs that add other text to it; see `marked_parts`.

        `continued`: the last message is the beginning of the answer. Raises UnusableChat and UnknownSymbol.
        """
        if not continued:
            return f"{_OPEN}{self.render(turns)}{_CLOSE}"
        return f"{_OPEN}{self.render(turns[:-1])}{self._without_names(turns[-1].content)}{_CLOSE}"

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text of `render`. Raises UnknownSymbol."""
        ids: list[int] = []
        at = 0
        for match in self._placed.finditer(text):
            ids += self._encode_between(text[at : match.start()])
            ids.append(self._ids[match[0] if match[0] in self._ids else match[0].strip()])
            at = match.end()
        ids += self._encode_between(text[at:])
        if self._mask_id in ids:
            raise ReservedSymbol(f"the chat template places the mask (id {self._mask_id})")
        return ids

    def _encode_between(self, text: str) -> list[int]:
        plain = self._stand_in.sub(lambda match: self._spelled[int(match[1])], text)
        if _MARK in plain:
            raise UnusableChat("the chat template cuts a message inside of the name of a token")
        return self._encode(plain) if plain else []

    def _without_names(self, content: str) -> str:
        """Replace the names of tokens in the text of a message by stand-ins."""
        for mark in (_MARK, _OPEN, _CLOSE):
            if mark in content:
                raise UnknownSymbol(f"the code point U+{ord(mark):04X} is reserved for programs and is no symbol")
        return self._name.sub(lambda match: f"{_MARK}{self._spelled.index(match[0])}{_MARK}", content)

    def _answers(self, turns: Sequence[Turn], whole: str) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the answers in a rendered conversation, each up to its end token."""
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            before = self.render(turns[:number])
            if not whole.startswith(before):
                raise UnusableChat(f"message {number}: the template writes what precedes it in two forms")
            content = self._without_names(turn.content).strip()
            found = whole.find(content, len(before))
            end = whole.find(self.end, len(before) if found < 0 else found + len(content))
            if end < 0:
                raise UnusableChat(f"message {number}: {self.end!r} does not follow")
            yield len(before), end + len(self.end)

    def _end_of_answers(self) -> str:
        """Return the name of the token that follows every answer of a conversation of two questions.

        Raises ValueError when there is none.
        """
        try:
            whole = self.render(PROBE, to_be_answered=False)
        except UnusableChat as error:
            raise ValueError(str(error)) from error
        answers = [turn.content for turn in PROBE if turn.role == ASSISTANT]
        ends = []
        for answer in answers:
            following = self._placed.search(whole, whole.find(answer) + len(answer))
            ends.append(following[0].strip() if answer in whole and following else None)
        if ends[0] is None or set(ends) != {ends[0]}:
            raise ValueError("the chat template does not place one special token after every answer")
        return ends[0]


PROBE = (Turn(USER, "Which one?"), Turn(ASSISTANT, "The first."), Turn(USER, "Why?"), Turn(ASSISTANT, "It fits."))


def _pattern(token: tokenizers.AddedToken) -> str:
    """Pattern of a token, with the white space that it takes from the text beside it."""
    return r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip


class _Generation(Extension):
    """The block `{% generation %}`, which marks answers for other programs."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which no product or power is too large for memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [abs(value) if isinstance(value, int | float) else len(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > _LONGEST:
            raise jinja2.TemplateError(f"{operator} of {sizes[0]} and {sizes[1]} is not supported")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    """Make an environment like that of `transformers`, but without the time of day: data must not depend on it."""
    found = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _raise
    return found


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def marked_parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a text that holds results of `ChatTemplate.marked`, and whether each is one."""
    for number, part in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", text)):
        if part:
            yield part, number % 2 == 1


def turns_of(rows: Iterable[Sequence[str]]) -> list[Turn]:
    """Make turns of pairs of role and content."""
    return [Turn(role, content) for role, content in rows]

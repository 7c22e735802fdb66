"""Chat templates: the ids of `transformers`, special tokens only where a template places them, and the answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scmdm.data.tokenizers import HuggingFaceTokenizer, ReservedSymbol, UnknownSymbol, load_tokenizer
from scmdm.data.tokenizers.chat_template import ASSISTANT, USER, Turn, UnusableChat
from scmdm.errors import UserError
from tests.chat_tokenizers import KINDS, LLADA, write_chat_tokenizer

CONTENT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=12)
SPELLED = st.lists(st.sampled_from(sorted({name for names, *_ in KINDS.values() for name in names})) | CONTENT)


@pytest.fixture(scope="module", params=sorted(KINDS))
def both(request, tmp_path_factory):
    """A tokenizer of ours, and that of `transformers`."""
    folder = write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)
    return HuggingFaceTokenizer.from_files(folder, padded=True), AutoTokenizer.from_pretrained(folder)


def conversation(*contents, system=None):
    roles = (USER, ASSISTANT)
    turns = [Turn(roles[i % 2], content) for i, content in enumerate(contents)]
    return [Turn("system", system), *turns] if system is not None else turns


def published(library, turns, **options):
    return library.apply_chat_template([{"role": turn.role, "content": turn.content} for turn in turns], **options)


def answers(chat):
    """The ids of each answer."""
    found, open_ = [], False
    for id_, is_given in zip(chat.ids, chat.given, strict=True):
        if not is_given and not open_:
            found.append([])
        open_ = not is_given
        if open_:
            found[-1].append(id_)
    return found


@given(st.lists(CONTENT, min_size=2, max_size=4).filter(lambda found: len(found) % 2 == 0), st.none() | CONTENT)
def test_ids_of_the_library(both, contents, system):
    own, library = both
    turns = conversation(*contents, system=system)
    found = own.chat.encode(turns)
    assert published(library, turns)[: len(found.ids)] == found.ids
    assert published(library, turns[:-1], add_generation_prompt=True) == own.chat.encode_prompt(turns[:-1])
    assert len(found.given) == len(found.ids) and len(answers(found)) == len(contents) // 2
    for ids, content in zip(answers(found), contents[1::2], strict=True):
        assert ids[-1] == own.chat.end_id and own.chat.end_id not in ids[:-1]
        assert content.strip() in own.decode(ids[:-1])


@pytest.mark.parametrize("answer", ["hello", " hello", "\n\n\nhello"])
def test_an_answer_begins_where_generation_does(tmp_path, answer):
    """With a tokenizer that joins line breaks, also those on both sides of that place."""
    folder = write_chat_tokenizer(tmp_path, "qwen")
    content = json.loads((folder / "tokenizer.json").read_text())
    break_, vocabulary = "\u010a", content["model"]["vocab"]
    vocabulary[break_ * 2] = vocabulary.pop("\u0100")  # in place of the byte 0
    content["model"]["merges"] = [[break_, break_]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    own, library = HuggingFaceTokenizer.from_files(folder, padded=True), AutoTokenizer.from_pretrained(folder)
    turns = conversation("a", answer)
    chat, ids = own.chat.encode(turns), published(library, turns)
    asked = own.chat.encode_prompt(turns[:1])
    assert chat.ids[: len(asked)] == asked and sum(chat.given) == len(asked)
    assert own.decode(chat.ids[len(asked) :]) == answer
    assert (chat.ids == ids[: len(chat.ids)]) == (not answer.startswith("\n"))


@given(SPELLED, SPELLED)
def test_a_name_in_a_message_is_text(both, asked, said):
    own, _ = both
    asked, said = "?".join(["a", *asked]), "!".join(["b", *said, "c"])
    found = own.chat.encode(conversation(asked, said))
    empty = own.chat.encode(conversation("a", "b"))
    specials = {i for i, token in own._tokenizer.get_added_tokens_decoder().items() if token.special}
    assert [i for i in found.ids if i in specials] == [i for i in empty.ids if i in specials]
    (ids,) = answers(found)
    assert own._tokenizer.decode(ids[:-1], skip_special_tokens=False).endswith(said)


def test_a_prompt_is_what_precedes_an_answer(both):
    own, _ = both
    turns = conversation("one", "two", "three", "four")
    found = own.chat.encode(turns)
    at = max(i for i, is_given in enumerate(found.given) if is_given) + 1
    assert own.chat.encode_prompt(turns[:3]) == found.ids[:at]


def test_the_template_and_the_end_tokens_are_kept(both, tmp_path):
    own, _ = both
    again = load_tokenizer(own.save(tmp_path))
    turns = conversation("one", "two")
    assert again.chat.encode(turns) == own.chat.encode(turns) and again.end_ids == own.end_ids
    assert own.end_ids[0] == own.eos_id and own.chat.end_id in own.end_ids


def test_where_templates_and_end_tokens_are_found(tmp_path):
    folder = write_chat_tokenizer(tmp_path / "a", "qwen", in_file=True)
    one, other = (
        HuggingFaceTokenizer.from_files(path, padded=True)
        for path in (folder, write_chat_tokenizer(tmp_path / "b", "qwen"))
    )
    assert one.chat_template == other.chat_template
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": one.chat_template}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": several}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    found = HuggingFaceTokenizer.from_files(folder, padded=True)
    assert found.chat_template == one.chat_template
    assert found.end_ids == (258, 256) and one.end_ids == (258,), "<|im_end|> and <|endoftext|>"
    for wrong in (["<|im_end|>"], {"a": 1}, True, 1.5):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(UserError):
            HuggingFaceTokenizer.from_files(folder, padded=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # nothing ends an answer
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('of its own') }}",
        "{{ strftime_now('%d') }}" + LLADA,  # data would depend on the day
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 99999999999 }}",
        "{{ 99999 ** 99999999 }}",
        "{{ range(10 ** 9) | list }}",
        LLADA.replace("+ '<|eot_id|>'", "+ '<|mdm_mask|>'"),
    ],
)
def test_a_template_that_is_not_supported_costs_only_conversations(tmp_path, template):
    own = HuggingFaceTokenizer.from_files(write_chat_tokenizer(tmp_path, "llada", template=template), padded=True)
    assert own.end_ids == (own.eos_id,) and own.decode(own.encode("text")) == "text"
    with pytest.raises(UserError):
        _ = own.chat


def test_a_template_that_places_the_mask(tmp_path):
    hidden = "{% if messages[0].content == 'a' %}<|mdm_mask|>{% endif %}"
    own = HuggingFaceTokenizer.from_files(write_chat_tokenizer(tmp_path, template=hidden + LLADA), padded=True)
    assert own.mask_id not in own.chat.encode(conversation("b", "<|mdm_mask|>")).ids
    with pytest.raises(ReservedSymbol):
        own.chat.encode(conversation("a", "b"))


def test_tokens_that_take_white_space(tmp_path):
    for side in ("lstrip", "rstrip"):
        folder = write_chat_tokenizer(tmp_path / side, "llama", options={side: True})
        own, library = HuggingFaceTokenizer.from_files(folder, padded=True), AutoTokenizer.from_pretrained(folder)
        turns = conversation("a b ", " c\n\n", "d", "e")
        ids = own.chat.encode(turns).ids
        assert published(library, turns)[: len(ids)] == ids


def test_conversations_that_a_template_refuses(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLADA
    own = HuggingFaceTokenizer.from_files(write_chat_tokenizer(tmp_path / "a", template=template), padded=True)
    with pytest.raises(UnusableChat):
        own.chat.encode(conversation("a", "b", system="c"))
    with pytest.raises(UnknownSymbol):
        own.chat.encode(conversation("a", "b\ufdd1"))
    cutting = LLADA.replace("message['content']", "message['content'][:-1]")
    own = HuggingFaceTokenizer.from_files(write_chat_tokenizer(tmp_path / "b", template=cutting), padded=True)
    with pytest.raises((UnusableChat, UserError)):
        own.chat.encode(conversation("a<|eot_id|>", "b"))


def test_a_tokenizer_without_a_template(tmp_path):
    folder = write_chat_tokenizer(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = HuggingFaceTokenizer.from_files(folder, padded=True)
    with pytest.raises(UserError):
        _ = own.chat
    assert "chat_template" not in json.loads(own.save(tmp_path).read_text())

"""Tokenizers beside published models: folders of `transformers` 4 and 5, and the folders that exports write."""

import io
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scmdm.cli import main
from scmdm.data.tokenizers import load_tokenizer
from scmdm.models.model_files import read_spec
from tests.convert.published import VOCAB, WORDS, mdlm_weights, write_mdlm, write_tokenizer
from tests.convert.test_decoder_layouts import LLADA, write_published
from tests.convert.test_published_configs import change, run, write_theirs

TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m['content'] }}{% endfor %}"
NEW = len(WORDS)  # id of the first token that is added


def write_settings(folder, template=None, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def with_tokens(folder, *names):
    """Add special tokens to the end of the vocabulary."""
    path = folder / "tokenizer.json"
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))
    loaded.add_special_tokens({"additional_special_tokens": list(names)})
    loaded.backend_tokenizer.save(str(path))
    return folder


def test_a_folder_of_version_5(tmp_path, capsys):
    """Its class is unknown to version 4, and so is a list of further special tokens."""
    source = with_tokens(write_theirs(tmp_path / "there"), "<s>")
    write_settings(
        source,
        TEMPLATE,
        backend="tokenizers",
        tokenizer_class="TokenizersBackend",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token={"content": "<|endoftext|>", "special": True},
        extra_special_tokens=["a"],
    )
    change(source, vocab_size=len(WORDS))
    code, said = run(source, tmp_path / "no", capsys)  # `<s>` has no row of the embedding
    assert code == 1 and "tokenizer=" in said
    source = write_published_llada(tmp_path / "llada", source)
    code, said = run(source, tmp_path / "out", capsys)
    assert code == 0, said
    assert "'<s>'" in said and "'<|endoftext|>'" in said
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (len(WORDS), 0, 0)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.encode("abc") == [1, 2, 3]


def write_published_llada(directory, tokenizer, **changes):
    """A LLaDA with the files of another folder's tokenizer."""
    write_published(directory, "llada", {**LLADA, "mask_token_id": VOCAB + 1, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            (directory / name).write_bytes((tokenizer / name).read_bytes())
    return directory


def test_a_mask_that_only_the_settings_name(tmp_path, capsys):
    source = write_mdlm(tmp_path / "there", vocab_size=VOCAB)
    write_settings(source, tokenizer_class="TokenizersBackend", eos_token="<|endoftext|>", mask_token="<|mask|>")
    assert run(source, tmp_path / "out", capsys)[0] == 0
    assert read_spec(tmp_path / "out").mask_id == len(WORDS)
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").tokens([len(WORDS)]) == ["<|mask|>"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokenizer_class": "TokenizersBackend", "bos_token": 3}, "tokenizer="),
        ({"tokenizer_class": "TokenizersBackend", "mask_token": ["x"]}, "tokenizer="),
        ({"tokenizer_class": 7}, None),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": 3}, "tokenizer="),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": 3}, "tokenizer_config.json"),
        ([], "tokenizer_config.json"),
        ("x", "tokenizer_config.json"),
    ],
)
def test_odd_settings_end_in_one_line(tmp_path, capsys, settings, named):
    source = write_mdlm(tmp_path / "there")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    code, said = run(source, tmp_path / "out", capsys)
    assert code == (0 if named is None else 1) and (named or "mask ") in said


@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize(
    ("stated", "honoured"),
    [
        ({"<|endoftext|>": 0, "<|mask|>": NEW}, True),
        ({"<|endoftext|>": 0, "<|mask|>": NEW, "a": 1}, True),  # a token of the vocabulary, too
        ({"<|endoftext|>": 0, "<|mask|>": NEW + 2}, False),
        ({"<|endoftext|>": 0, "<|mask|>": NEW, "a": NEW + 1}, False),
        ({"<|endoftext|>": 0, "<s>": NEW + 1, "<|mask|>": NEW}, False),
    ],
    ids=str,
)
def test_added_tokens_have_the_ids_that_the_file_states(tmp_path, capsys, kind, stated, honoured):
    """The library numbers those behind a gap, or in another order, anew."""
    source = write_mdlm(tmp_path / "there", mdlm_weights(rows=VOCAB + 2))
    content = json.loads((source / "tokenizer.json").read_text())
    token = content["added_tokens"][0]
    content["added_tokens"] = [{**token, "content": name, "id": id_} for name, id_ in stated.items()]
    (source / "tokenizer.json").write_text(json.dumps(content))
    if kind is not None:
        write_settings(source, tokenizer_class=kind, eos_token="<|endoftext|>", mask_token="<|mask|>")
    code, said = run(source, tmp_path / "out", capsys)
    assert code == (0 if honoured else 1), said
    if honoured:
        assert read_spec(tmp_path / "out").mask_id == NEW
    else:
        assert "tokenizer.json" in said and any(f"{name!r} has the id {id_}" in said for name, id_ in stated.items())


def test_added_tokens_have_the_ids_that_the_settings_state(tmp_path, capsys):
    source = write_mdlm(tmp_path / "there", mdlm_weights(rows=VOCAB + 2))
    for id_, expected in ((NEW + 2, 1), (NEW, 0)):
        write_settings(
            source,
            tokenizer_class="PreTrainedTokenizerFast",
            eos_token="<|endoftext|>",
            mask_token="<|mask|>",
            added_tokens_decoder={"0": {"content": "<|endoftext|>"}, str(id_): {"content": "<|mask|>"}},
        )
        code, said = run(source, tmp_path / "out", capsys)
        assert code == expected, said
        assert code == 0 or ("tokenizer_config.json" in said and f"'<|mask|>' has the id {id_}" in said)
    assert read_spec(tmp_path / "out").mask_id == NEW


def test_end_tokens_outside_of_the_vocabulary_are_left_out_with_a_warning(tmp_path, capsys, caplog):
    """5 is a token of text; GPT-2's class names 50256 whatever the vocabulary."""
    source = write_mdlm(tmp_path / "there")
    for ends, named in (([0, 5], ()), (-1, ()), (None, ()), ([0, 9999], ("9999",)), (50256, ("50256",))):
        caplog.clear()
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert run(source, tmp_path / f"out-{ends}", capsys)[0] == 0
        assert all(f"eos_token_id={id_}" in caplog.text for id_ in named) and bool(named) == ("eos" in caplog.text)


@pytest.mark.parametrize("ends", ["</s>", [0, -2], [True], 1.0], ids=str)
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, capsys, ends):
    source = write_mdlm(tmp_path / "there")
    for content in ({"eos_token_id": ends}, [ends]):
        (source / "generation_config.json").write_text(json.dumps(content))
        code, said = run(source, tmp_path / "no", capsys)
        assert code == 1 and "generation_config.json" in said


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (None, "default"),
        ([{"name": "rag", "template": "x"}], "default"),
        ("{% for m in messages %}", "malformed"),
    ],
    ids=str,
)
def test_chats_need_a_chat_template(tmp_path, capsys, template, named):
    source = write_mdlm(tmp_path / "there")
    write_settings(source, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>", chat_template=template)
    code, said = run(source, tmp_path / "no", capsys, "framing=chats")
    assert code == 1 and "framing=chats" in said and named in said
    assert run(source, tmp_path / "out", capsys)[0] == 0


def test_a_tokenizer_with_code_of_its_own(tmp_path, capsys):
    """As Dream's: without a tokenizer.json it needs its code, which is not run."""
    source = write_mdlm(tmp_path / "there")
    auto = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    write_settings(source, tokenizer_class="DreamTokenizer", auto_map=auto, eos_token="<|endoftext|>")
    (source / "tokenization_dream.py").write_text("raise SystemExit('this ran')")
    assert run(source, tmp_path / "out", capsys)[0] == 0
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("")
    code, said = run(source, tmp_path / "no", capsys)
    assert code == 1 and "DreamTokenizer" in said


def test_a_tokenizer_without_a_beginning_token(tmp_path, capsys):
    """As Qwen2's: samples begin with what the model's configuration names if it is a special token, or with [EOS]."""
    source = with_tokens(write_published_folder(tmp_path / "plain"), "<|im_end|>")
    write_settings(source, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", bos_token=None)
    end = len(WORDS)
    for number, (begins, expected) in enumerate([(0, 0), (5, end), (None, end), (-1, end)]):
        model = write_published_llada(tmp_path / f"there{number}", source, bos_token_id=begins, eos_token_id=end)
        code, said = run(model, tmp_path / f"out{number}", capsys)
        name = {0: "<|endoftext|>", end: "<|im_end|>"}[expected]
        assert code == 0 and f"begins with '{name}'" in said
        tokenizer = load_tokenizer(tmp_path / f"out{number}" / "tokenizer.json")
        assert (tokenizer.bos_id, tokenizer.eos_id) == (expected, end)
    assert run(tmp_path / "there0", tmp_path / "given", capsys, "bos_id=3")[0] == 0
    assert load_tokenizer(tmp_path / "given" / "tokenizer.json").bos_id == 3
    code, said = run(tmp_path / "there0", tmp_path / "no", capsys, "bos_id=1000")
    assert code == 1 and "bos_id=1000" in said


def write_published_folder(folder):
    folder.mkdir()
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("layout", ["llama", "qwen2", "llada", "mdlm"])
def test_an_export_keeps_the_tokenizer(tmp_path, capsys, layout):
    """Specials, further special tokens, the template, all end tokens; as `AutoTokenizer` reads them."""
    plain = with_tokens(write_published_folder(tmp_path / "plain"), "<s>", "<|eot|>")
    write_settings(
        plain,
        TEMPLATE,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|eot|>"],
    )
    eot = len(WORDS) + 1
    source = tmp_path / "there"
    if layout == "llada":
        write_published_llada(source, plain, eos_token_id=[0, eot], residual_dropout=0.2)
    elif layout == "mdlm":
        write_mdlm(source, mdlm_weights(rows=VOCAB + 2), mask_token_id=VOCAB + 1, eos_token_id=[0, eot])
    else:
        write_theirs(source, layout, mask_token_id=None, eos_token_id=[0, eot])
    if layout in ("llama", "qwen2"):
        grow(source, layout)
    keys = [f"tokenizer={plain}"]
    assert run(source, tmp_path / "ours", capsys, *keys)[0] == 0
    ours = load_tokenizer(tmp_path / "ours" / "tokenizer.json")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "ours"), str(out), f"format={layout}"]) == 0
    theirs, before = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(plain)
    assert (
        theirs.special_tokens_map.items()
        >= {
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        }.items()
    )
    assert theirs.convert_tokens_to_ids("<|eot|>") == eot and "<|eot|>" in theirs.all_special_tokens
    assert theirs.mask_token_id == ours.mask_id
    assert theirs("abc<|eot|>k").input_ids == before("abc<|eot|>k").input_ids
    chat = [{"role": "user", "content": "abc"}]
    assert theirs.apply_chat_template(chat) == before.apply_chat_template(chat)
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (len(WORDS), [0, eot], 0)
    assert written["mask_token_id"] == ours.mask_id
    dropout = {"llada": "residual_dropout", "mdlm": "dropout"}.get(layout)
    assert dropout is None or written[dropout] == {"llada": 0.2, "mdlm": 0.1}[layout]
    (out / "scmdm").rename(tmp_path / "aside")
    assert main(["import", str(out), str(tmp_path / "again")]) == 0
    again = load_tokenizer(tmp_path / "again" / "tokenizer.json")
    for name in ("bos_id", "eos_id", "pad_id", "mask_id", "vocab_size", "end_ids", "chat_template"):
        assert getattr(again, name) == getattr(ours, name), name
    assert read_spec(tmp_path / "again") == read_spec(tmp_path / "ours")


def grow(source, kind):
    """Give a model of `transformers` rows for two more tokens."""
    from tests.convert.test_decoder_layouts import LlamaForCausalLM, Qwen2ForCausalLM

    theirs = (LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM).from_pretrained(source)
    theirs.resize_token_embeddings(len(WORDS) + 2)
    content = json.loads((source / "config.json").read_text())
    theirs.save_pretrained(source)
    (source / "config.json").write_text(json.dumps({**content, "vocab_size": len(WORDS) + 2}))


def test_all_original_fields_of_llada_are_written(tmp_path, capsys):
    """The defaults of its code are those of another network, with dropout and other ids."""
    write_published(tmp_path / "there", "llada")
    assert run(tmp_path / "there", tmp_path / "ours", capsys)[0] == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "format=llada"]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    published = {**LLADA, "vocab_size": LLADA["embedding_size"]}
    assert published.items() <= written.items()
    assert {"attention_dropout", "embedding_dropout", "residual_dropout", "eos_token_id", "pad_token_id"} <= set(
        written
    )


def test_a_mask_far_behind_the_vocabulary_gets_no_name(tmp_path, capsys):
    source = write_mdlm(tmp_path / "padded", mdlm_weights(rows=VOCAB + 5))
    assert run(source, tmp_path / "ours", capsys, f"mask_id={VOCAB + 2}")[0] == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "format=mdlm"]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.mask_token is None and len(theirs) == len(WORDS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mask_token_id"] == VOCAB + 2


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = [
    "tokenizer_class",
    "bos_token",
    "eos_token",
    "mask_token",
    "unk_token",
    "chat_template",
    "auto_map",
    "backend",
]
_FIELDS += ["extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "model_max_length", "new"]


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory):
    return write_mdlm(tmp_path_factory.mktemp("mdlm") / "there")


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["TokenizersBackend", "PreTrainedTokenizerFast", "Unknown"]),
    changes=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=2),
)
def test_no_setting_of_a_tokenizer_ends_in_a_traceback(mdlm, kind, changes):
    content = {"tokenizer_class": kind, "eos_token": "<|endoftext|>", **changes}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "there")
        source.mkdir()
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            (source / name).symlink_to(mdlm / name)
        write_settings(source, **content)
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main(["import", str(source), str(Path(folder, "out"))])
        lines = [line for line in said.getvalue().splitlines() if line.startswith("scmdm: error: ")]
        assert (code, len(lines)) in ((0, 0), (1, 1)) and "Traceback" not in said.getvalue()

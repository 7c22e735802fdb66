"""Damaged and malicious files are refused with a reason, and nothing in them runs."""

import json
import os
import pickle
import random
import resource
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from scmdm.cli import main
from scmdm.convert.lightning import checkpoint_weights, hyper_parameters, read_checkpoint
from scmdm.errors import UserError
from tests.convert.published import LAYERS, VOCAB, WIDTH, mdlm_weights, write_lightning, write_mdlm, write_tokenizer
from tests.models.test_decoder import their_model
from tests.models.test_strange_models import BAD


class Payload:
    """Runs a function when it is unpickled by a loader that lets it."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def refuse(source, out, capsys, *keys):
    """The one line that import ends with."""
    assert main(["import", str(source), str(out), *keys]) == 1
    assert not out.exists()
    captured = capsys.readouterr().err
    assert captured.startswith("scmdm: error: ") and captured.count("\n") == 1
    return captured


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, "touch {mark}", "posix.system"),
        (subprocess.check_call, "touch {mark}", "commands.check_call"),
        (eval, "open('{mark}', 'w')", "builtins.eval"),
    ],
)
@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict"])
def test_a_payload_does_not_run(tmp_path, capsys, function, arguments, name, where):
    mark = tmp_path / "mark"
    payload = Payload(function, arguments.format(mark=mark))
    checkpoint = write_lightning(tmp_path / "last.ckpt", **{where: {"config": payload}})
    control = Payload(os.system, f"touch {tmp_path / 'control'}")
    pickle.loads(pickle.dumps(control))
    assert (tmp_path / "control").exists(), "the payload works where a loader runs it"
    message = refuse(checkpoint, tmp_path / "out", capsys)
    assert not mark.exists()
    assert f"would call {name} when loaded" in message


def test_unknown_classes_are_inert(tmp_path):
    """A class whose construction and state would leave a mark leaves none."""
    mark = tmp_path / "mark"
    checkpoint = write_lightning(tmp_path / "last.ckpt", callbacks=Loud(str(mark)))
    mark.unlink()
    assert main(["import", str(checkpoint), str(tmp_path / "out")]) == 0
    assert not mark.exists()


class Loud:
    def __init__(self, path):
        self.path = path
        open(path, "w").close()

    def __reduce__(self):
        return Loud, (self.path,)


def test_other_pickles_are_refused(tmp_path, capsys):
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    assert "plain.ckpt" in refuse(tmp_path / "plain.ckpt", tmp_path / "out", capsys)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.ckpt")
    assert "script.ckpt" in refuse(tmp_path / "script.ckpt", tmp_path / "out", capsys)
    torch.save([1], tmp_path / "list.ckpt")
    assert "has no `state_dict`" in refuse(tmp_path / "list.ckpt", tmp_path / "out", capsys)
    whole = write_lightning(tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "cut.ckpt", tmp_path / "out", capsys)
    assert "does not exist" in refuse(tmp_path / "absent.ckpt", tmp_path / "out", capsys)
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"nonsense")
    refuse(tmp_path / "zip.ckpt", tmp_path / "out", capsys)


def test_flipped_bits_of_a_checkpoint_are_found_or_harmless(tmp_path):
    """torch alone reads most of them, as other weights."""
    path, dice = write_lightning(tmp_path / "last.ckpt"), random.Random(0)
    whole = path.read_bytes()
    before = checkpoint_weights(path, read_checkpoint(path), "ema")
    refusals = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            content = read_checkpoint(path)
            found = checkpoint_weights(path, content, "ema")
            hyper_parameters(path, content)
        except UserError:
            refusals += 1
            continue
        assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert refusals > 75


def bomb(tmp_path, instructions, protocol=b"\x80\x02"):
    """A checkpoint whose pickle consists of these instructions."""
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", protocol + instructions + b".")
        archive.writestr("archive/version", b"3\n")
    return path


NESTED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))  # each a pair of the one before


@pytest.mark.parametrize(
    "instructions",
    [
        b"}" + b"(" + NESTED.replace(b"q\x00h\x00", b"K\x01q\x00h\x00", 1) + b"K\x01u",
        b"}" + b")" + b"\x85" * 100_000 + b"K\x01s",
        b"]q\x00h\x00a",
        b"\x8b" + (10**9).to_bytes(4, "little"),
        b"\x8e" + (2**60).to_bytes(8, "little"),
        b"r\xff\xff\xff\x7f",
        b"c__builtin__\nbytearray\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R",
        b"ctorch\nFloatTensor\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R",
        b"ctorch.storage\nUntypedStorage\n\x8a\x06" + (10**13).to_bytes(6, "little") + b"\x85R",
        b"a",
        b"u",
        b"h\x05",
        b"K\x01K\x02R",
        b"",
    ],
)
def test_pickles_that_take_memory_or_time(tmp_path, instructions):
    with pytest.raises(UserError, match=r"bomb\.ckpt"):
        read_checkpoint(bomb(tmp_path, instructions))


def test_archives_that_torch_does_not_write(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10**6))
    with pytest.raises(UserError, match=r"x\.ckpt"):
        read_checkpoint(path)
    os.mkfifo(tmp_path / "fifo.ckpt")
    with pytest.raises(UserError, match=r"fifo\.ckpt"):
        read_checkpoint(tmp_path / "fifo.ckpt")


@pytest.mark.parametrize("make", BAD)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_numbers_that_are_no_weights(tmp_path, capsys, make, kind):
    weights, name = mdlm_weights(), "backbone.blocks.1.attn_out.weight"
    weights[name] = make(weights[name])
    if kind == "ckpt":
        source = write_lightning(tmp_path / "last.ckpt", state_dict=weights, ema=None)
    else:
        source = write_mdlm(tmp_path / "mdlm", weights)
    message = refuse(source, tmp_path / "out", capsys)
    assert name in message or "torch.storage.UntypedStorage" in message  # which only dtypes without numbers have


def test_tensors_that_would_be_left_out(tmp_path, capsys):
    """A table of other rotary frequencies; a parameter that also stands under scmdm's own name."""
    weights, out = mdlm_weights(), tmp_path / "out"
    table = "backbone.rotary_emb.inv_freq"
    source = write_mdlm(tmp_path / "mdlm", {**weights, table: weights[table] * 2})
    assert table in refuse(source, out, capsys)
    save_file({**weights, "blocks.1.norm1.weight": torch.ones(WIDTH)}, source / "model.safetensors")
    assert "blocks.1.norm1.weight" in refuse(source, out, capsys)


def test_a_head_that_the_configuration_ties_to_the_embedding(tmp_path, capsys):
    theirs = their_model("llama", True, 10_000.0, 1e-6)
    theirs.save_pretrained(tmp_path / "there")
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    file, out = tmp_path / "there" / "model.safetensors", tmp_path / "out"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "same"), "length=16"]) == 0
    capsys.readouterr()
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file)
    assert "lm_head.weight" in refuse(tmp_path / "there", out, capsys, "length=16")


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(tmp_path):
    """There each file is a link into the folder `blobs`."""
    hub, weights = tmp_path / "models--a--b", mdlm_weights()
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    source = write_mdlm(hub / "snapshots" / "abc")
    (source / "model.safetensors").unlink()
    names = list(weights)
    for number, part in enumerate((names[:9], names[9:])):
        save_file({n: weights[n] for n in part}, hub / "blobs" / str(number))
        (source / f"{number}.safetensors").symlink_to(f"../../blobs/{number}")
    index = {"weight_map": {n: f"{int(i > 8)}.safetensors" for i, n in enumerate(names)}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["import", str(source), str(tmp_path / "out")]) == 0


def test_averages_must_fit(tmp_path, capsys):
    few = {"shadow_params": [torch.zeros(1)]}
    assert "1 averaged tensors for" in refuse(write_lightning(tmp_path / "a.ckpt", ema=few), tmp_path / "out", capsys)
    wrong = {"shadow_params": [torch.zeros(1) for name in mdlm_weights() if "inv_freq" not in name]}
    assert "has shape (1,), its parameter" in refuse(
        write_lightning(tmp_path / "b.ckpt", ema=wrong), tmp_path / "out", capsys
    )


def test_absurd_sizes(tmp_path, capsys):
    """A tensor of one number that says that it is a million million of them; a header that says so."""
    weights = mdlm_weights()
    weights["backbone.vocab_embed.embedding"] = torch.zeros(1, 1).expand(10**6, 10**6)
    checkpoint = write_lightning(tmp_path / "last.ckpt", state_dict=weights)
    assert "exceeds its storage" in refuse(checkpoint, tmp_path / "out", capsys, "weights=raw")
    source = write_mdlm(tmp_path / "mdlm")
    file = source / "model.safetensors"
    content = file.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].replace(b"[13,32]", b"[13,99999999999]")
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + len(header) :])
    assert "model.safetensors" in refuse(source, tmp_path / "out", capsys)
    file.write_bytes((2**60).to_bytes(8, "little") + content[8:])
    assert "model.safetensors" in refuse(source, tmp_path / "out", capsys)


def test_damaged_weights(tmp_path, capsys):
    source = write_mdlm(tmp_path / "mdlm")
    file, out = source / "model.safetensors", tmp_path / "out"
    # Copies: a file that is mapped must not be written.
    content, weights = file.read_bytes(), {name: weight.clone() for name, weight in load_file(file).items()}
    file.write_bytes(content[:-100])
    assert "model.safetensors" in refuse(source, out, capsys)
    name = "backbone.blocks.1.attn_out.weight"
    save_file({n: w for n, w in weights.items() if n != name}, file)
    assert "lacks blocks.1.attn_out.weight" in refuse(source, out, capsys)
    save_file({**weights, "backbone.surprise": torch.zeros(2)}, file)
    assert "has backbone.surprise" in refuse(source, out, capsys)
    save_file({**weights, name: torch.zeros(WIDTH, WIDTH + 1)}, file)
    assert "blocks.1.attn_out.weight has shape (32, 33)" in refuse(source, out, capsys)
    save_file({**weights, "backbone.cond_map.embedding_table.weight": torch.zeros(2, 2)}, file)
    assert "conditioned on classes" in refuse(source, out, capsys)
    save_file({n: w for n, w in weights.items() if "sigma_map" not in n}, file)
    assert "causal" in refuse(source, out, capsys)
    save_file({n.replace("blocks.1", "blocks.7"): w for n, w in weights.items()}, file)
    assert "no blocks numbered" in refuse(source, out, capsys)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_heads", 7), ("n_heads", 10**12), ("n_heads", "4"), ("dropout", 3), ("time_conditioning", "yes")],
)
def test_a_configuration_that_cannot_be(tmp_path, capsys, key, value):
    source = write_mdlm(tmp_path / "mdlm", **{key: value})
    assert f"{key}=" in refuse(source, tmp_path / "out", capsys)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", 3, "x.bin"])
def test_an_index_stays_in_its_directory(tmp_path, capsys, file):
    source = write_mdlm(tmp_path / "mdlm")
    save_file(mdlm_weights(), tmp_path / "outside.safetensors")
    (source / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(mdlm_weights(), file)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refuse(source, tmp_path / "out", capsys)
    assert "model.safetensors.index.json" in message and repr(file)[1:-1] in message


def test_an_index_that_is_wrong(tmp_path, capsys):
    source, weights = write_mdlm(tmp_path / "mdlm"), mdlm_weights()
    index, out = source / "model.safetensors.index.json", tmp_path / "out"
    for content in ("[]", "{", "{}", '{"weight_map": []}', "[" * 100_000):
        index.write_text(content)
        refuse(source, out, capsys)
    names = list(weights)
    save_file({n: weights[n] for n in names[:9]}, source / "a.safetensors")
    save_file({n: weights[n] for n in names[9:]}, source / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {n: "ab"[i > 9] + ".safetensors" for i, n in enumerate(names)}}))
    assert f"says that {names[9]} is in a.safetensors" in refuse(source, out, capsys)
    save_file(weights, source / "b.safetensors")
    assert "remove one of the files" in refuse(source, out, capsys)


def test_what_lies_beside_an_export_is_not_trusted(tmp_path, capsys):
    assert main(["import", str(write_mdlm(tmp_path / "mdlm")), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "there"), "format=mdlm"]) == 0
    beside, out = tmp_path / "there" / "scmdm", tmp_path / "out"
    manifest, model = (json.loads((beside / name).read_text()) for name in ("manifest.json", "model.json"))
    whole, manifest["tokenizer"]["file"] = (beside / "manifest.json").read_text(), "../../../escaped.json"
    (beside / "manifest.json").write_text(json.dumps(manifest))
    assert str(beside / "manifest.json") in refuse(tmp_path / "there", out, capsys)
    (beside / "manifest.json").write_text(whole)
    for changes in ({"layers": 10**9}, {"width": WIDTH * 2}, {"layers": LAYERS + 1}, {"kind": "llama"}):
        (beside / "model.json").write_text(json.dumps({**model, "model": {**model["model"], **changes}}))
        refuse(tmp_path / "there", out, capsys)
    (beside / "model.json").write_text(json.dumps({**model, "vocab_size": VOCAB + 1}))
    assert f"vocab_size={VOCAB + 1}" in refuse(tmp_path / "there", out, capsys)


def test_another_models_tokenizer(tmp_path, capsys):
    source = write_mdlm(tmp_path / "mdlm", mdlm_weights(rows=VOCAB - 4))
    assert f"has {VOCAB - 4} rows" in refuse(source, tmp_path / "out", capsys)
    assert "tokenizer=" in refuse(source, tmp_path / "out", capsys, f"tokenizer={tmp_path / 'none.json'}")


def test_a_disk_that_fills_up_during_an_export_ends_in_one_line(base, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))  # the weights are larger
    try:
        assert main(["export", str(base), str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("scmdm: error: ") == 1 and not list(tmp_path.iterdir())

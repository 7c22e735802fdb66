"""Model directories of strangers: refused in one line that names the file, before memory is taken, or read right."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scmdm.checkpoint.seal import SEAL, seal
from scmdm.cli import main
from scmdm.errors import UserError
from scmdm.models.model_files import read_model
from scmdm.models.safetensors_headers import read_header
from scmdm.models.tensor_files import tensor_shapes
from tests.convert.published import write_mdlm
from tests.weights import weights_of

WEIGHTS, NAME = "weights.safetensors", "blocks.1.attn_out.weight"
BAD = [
    lambda w: w.to(torch.int8),
    lambda w: w > 0,
    lambda w: w.to(torch.complex64),
    lambda w: w.to(torch.float8_e4m3fn),
    lambda w: w.index_fill(0, torch.tensor([3]), float("nan")),
    lambda w: w.index_fill(0, torch.tensor([3]), float("-inf")),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    assert main(["import", str(write_mdlm(place / "mdlm")), str(place / "ours")]) == 0
    return place / "ours"


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def refused(model):
    with pytest.raises(UserError) as error:
        read_model(model)
    assert "\n" not in str(error.value) and str(model) in str(error.value)
    return str(error.value)


def change(path, **keys):
    content = json.loads(path.read_text())
    for name, value in keys.items():
        *sections, last = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__layers", 10**9),
        ("model__layers", 1024),
        ("model__width", 10**12),
        ("model__width", 65536),
        ("model__heads", 0),
        ("model__heads", 3),
        ("model__dropout", "0.1"),
        ("model__labels", 1),
        ("model__labels", True),
        ("model__surprise", 1),
        ("model__kind", "llama3"),
        ("model__kind", ["dit"]),
        ("model__llama", 7),
        ("model__lora_rank", 60_000),
        ("model__lora_targets", "attn_qkv"),
        ("model__estimate_top_k", 2**31),
        ("model__conditioner", "none"),
        ("model", None),
        ("diffusion__eps", -1),
        ("diffusion__schedule", "none"),
        ("diffusion__surprise", 1),
        ("vocab_size", 2**62),
        ("vocab_size", -1),
        ("vocab_size", 13.0),
        ("mask_id", 2**40),
        ("mask_id", 0),
        ("length", 2**62),
        ("length", 13),
        ("step", -1),
        ("classes", 2**31),
        ("classes", True),
        ("format", 2),
        ("format", None),
        ("surprise", {}),
    ],
)
def test_a_description_that_is_not_that_of_the_weights(model, key, value):
    change(model / "model.json", **{key: value})
    refused(model)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 1, "format": 1}', "[" * 10**5, '{"format": 1}'])
def test_a_description_that_is_none(model, text):
    (model / "model.json").write_text(text)
    assert "model.json" in refused(model)


def test_a_tokenizer_whose_hash_is_another(model):
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace(": 1,", ":  1,", 1) + "\n")
    assert "tokenizer.json" in refused(model)


@pytest.mark.parametrize("make", BAD)
def test_numbers_that_are_no_weights(model, make, tmp_path, capsys):
    weights = load_file(model / WEIGHTS)
    save_file({**weights, NAME: make(weights[NAME])}, model / WEIGHTS)
    assert NAME in refused(model)
    (model / SEAL).unlink()
    seal(model)
    assert main(["export", str(model), str(tmp_path / "out"), "format=mdlm"]) == 1
    assert NAME in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tensors_that_stand_twice_or_are_surplus(model):
    save_file({NAME: torch.zeros(2)}, model / "other.safetensors")
    message = refused(model)
    assert NAME in message and WEIGHTS in message and "other.safetensors" in message
    save_file({"surprise": torch.zeros(2)}, model / "other.safetensors")
    assert "surprise" in refused(model)


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": {**ENTRY, "shape": [2]}},
        {"a": {**ENTRY, "shape": [2**62, 2**62]}},
        {"a": {**ENTRY, "shape": [-1]}},
        {"a": {**ENTRY, "data_offsets": [4, 8]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {**ENTRY, "more": 1}},
        {"a": {**ENTRY, "dtype": "F4"}},
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY, "__metadata__": {"x": 1}},
        {},
        b'{"a": 1, "a": 1}',
        b"{}" + b" " * 10 + b"x",
        b"\xff\xff",
    ],
)
def test_headers_that_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    header_file(path, header, bytes(4))
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_header(path)


def test_many_names_take_linear_time(model):
    """100,000 empty tensors, of which these are a part, took minutes."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header_file(model / "other.safetensors", {f"n{i}": empty for i in range(20_000)})
    assert "n0" in refused(model)


@pytest.mark.parametrize(
    "offsets", [[[0], [0]], [[0], [1]], [[0], [3]], [[-1], [1]], [[0], [2**62]], [[0, 0], [2, 0]], [0, "a"]]
)
def test_shards_that_do_not_make_up_a_tensor(tmp_path, offsets):
    for number, offset in enumerate(offsets):
        placed = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": offset}})}
        save_file({"a": torch.zeros(2)}, tmp_path / f"{number}.safetensors", placed)
    with pytest.raises(UserError, match=str(tmp_path)):
        tensor_shapes(tmp_path)
    for number in range(2):
        placed = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [2 * number]}})}
        save_file({"a": torch.zeros(2)}, tmp_path / f"{number}.safetensors", placed)
    assert tensor_shapes(tmp_path)["a"].shape == (4,)


@pytest.mark.parametrize("name", ["model.json", "manifest.json", "tokenizer.json", WEIGHTS])
def test_flipped_bits_are_found_or_harmless(model, original, name):
    """Without the seal, which finds all of them: 60 flips of each file, in the header of the weights."""
    path, before = model / name, weights_of(original)
    whole, dice = path.read_bytes(), random.Random(name)
    end = 8 + int.from_bytes(whole[:8], "little") if name == WEIGHTS else len(whole)
    for _ in range(60):
        place, damaged = dice.randrange(end), bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_model(model)
        except UserError:
            continue
        read = dict(found.model.named_parameters())
        assert all(torch.equal(read[n], value) for n, value in before.items())


def test_the_command_refuses_a_model_sealed_again(model, capsys):
    change(model / "model.json", model__layers=10**9)
    (model / SEAL).unlink()
    seal(model)
    assert main(["sample", str(model), "num=1", "sampler.steps=1", "device=cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "model.json" in error and "layers=1000000000" in error

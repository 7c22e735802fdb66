"""Data sets of strangers, and damaged ones: whatever is in their files is refused in one line, and harms nothing."""

import http.server
import json
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from scmdm.cli import main
from scmdm.config.data import DataConfig
from scmdm.data import remote as remote_module
from scmdm.data.dataset_files import check_dataset
from scmdm.data.loader import build_loader, read_columns, read_split
from scmdm.data.manifest import Manifest, mark_as_cache, remote_of
from scmdm.data.mixture import DataMixture, open_data
from scmdm.data.preparation.framing import FramedSequence
from scmdm.data.preparation.shard_writer import Description, join_pieces, write_dataset, write_piece
from scmdm.data.shard_index import read_index
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.errors import UserError
from tests.conftest import ROOT, TINY, scmdm
from tests.data.sets import write_texts


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """40 training samples in two shards."""
    return write_texts(tmp_path_factory.mktemp("sets") / "texts", 40, shard_bytes=600)


@pytest.fixture
def data(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _no_hang():
    """End a test that waits for ever for a FIFO."""

    def end(*_):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def loader(root, **options):
    keys = {"batch_size": 8, "shuffle": False, "seed": 0, "drop_last": False, **options}
    return build_loader(DataMixture.at(root), "train", **keys)


def refusal(read, *arguments):
    """The one line that reading ends with; None when it succeeds."""
    try:
        read(*arguments)
    except UserError as error:
        return str(error).replace("\n", " NEWLINE ")
    return None


def flips(path, step):
    """Write every `step`-th single-bit flip of a file, one after the other; at last the file itself."""
    content = path.read_bytes()
    damaged = bytearray(content)
    for bit in range(0, 8 * len(content), step):
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield bit
        damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def change(root, *keys, to):
    """Change a value of a manifest, which loses its fingerprint, as in data sets of earlier versions."""
    content = json.loads((root / "manifest.json").read_text())
    content.pop("fingerprint", None)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    (root / "manifest.json").write_text(json.dumps(content))


every_flip = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 29])


@every_flip
def test_every_flip_of_a_manifest_is_found(data, step):
    manifest = replace(Manifest.read(data), splits={"test": Manifest.read(data).splits["test"]}, counts={}, source={})
    manifest.write(data)
    for bit in flips(data / "manifest.json", step):
        message = refusal(Manifest.read, data)
        assert message is None or "NEWLINE" not in message
        if message is None:
            assert Manifest.read(data) == manifest, bit


@every_flip
def test_every_flip_of_the_mark_of_a_cache_is_found(tmp_path, step):
    mark_as_cache(tmp_path, "s3://bucket/x")
    for bit in flips(tmp_path / "remote.json", step):
        if refusal(remote_of, tmp_path) is None:
            assert remote_of(tmp_path) == "s3://bucket/x", bit
    (tmp_path / "remote.json").write_text('{"remote": "s3://bucket/x"}')  # of an earlier version
    assert remote_of(tmp_path) == "s3://bucket/x"


@every_flip
def test_every_flip_of_an_index_or_tokenizer_is_found(data, step):
    manifest = Manifest.read(data)
    for _ in flips(data / "test/index.json", step):
        assert "test/index.json" in refusal(read_index, data, "test", manifest)
    for _ in flips(data / "tokenizer.json", step):
        assert "tokenizer.json" in refusal(check_dataset, data)


@every_flip
@pytest.mark.parametrize("framing", ["records", "packed", "prompts"])
def test_every_flip_of_a_shard_reads_as_possible_values_or_is_named(tmp_path, framing, step):
    root, samples = tmp_path / "data", 5
    join(root, *write_piece_of(tmp_path / "piece", samples, framing))
    manifest, dataset = Manifest.read(root), loader(root).dataset
    good = dataset.collate([dataset[at] for at in range(samples)])
    refused = 0
    for _ in flips(root / "train/shard.00000.mds", step):
        found = []
        message = refusal(lambda: found.append(dataset.collate([dataset[at] for at in range(samples)])))  # noqa: B023
        if message is not None:
            assert "train/shard.00000.mds" in message and f"prepare --verify {root}" in message
            refused += 1
            continue
        (batch,) = found
        assert batch.keys() == good.keys()
        assert batch["tokens"].max() < manifest.vocab_size and not (batch["tokens"] == manifest.mask_id).any()
        assert all(batch[name].max() <= manifest.length for name in batch.keys() - {"tokens", "index"})
    assert refused > 0


def write_piece_of(piece, samples, framing):
    """Few samples with the columns of a framing."""
    more = {"packed": {"documents": [0, 0, 1, 1]}, "prompts": {"given": 2}}.get(framing, {})
    sequences = [(split, FramedSequence([1, 4, 5, 2], **more)) for split in ("train", "test") for _ in range(samples)]
    tokenizer, description = CharacterTokenizer("abc"), Description("x", 6, "loss", "given", {}, framing=framing)
    write_piece(piece, sequences, tokenizer, description, 1 << 20)
    return piece, tokenizer, description


def join(root, piece, tokenizer, description):
    join_pieces(root, [piece], ["train", "test"], tokenizer, description)


def test_training_names_file_and_sample_as_verify_does(data, tmp_path, empty_yaml, capsys):
    shard = data / "train/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-15] = 200  # of the last sample, an id
    shard.write_bytes(content)
    assert main(["prepare", "--verify", str(data)]) == 1
    assert str(shard) in capsys.readouterr().out
    keys = [f"run_dir={tmp_path / 'run'}", f"data.path={data}", "train.steps=9", *TINY, "train.global_batch_size=32"]
    for workers in (0, 1):
        assert main(["train", str(empty_yaml), *keys, f"data.num_workers={workers}"]) == 1
        error = capsys.readouterr().err
        assert str(shard) in error and "sample " in error and error.count("\n") == 1
    for read in (read_split, lambda root, split: read_columns(root, split, range(40))):
        assert "train" in refusal(read, data, "train")


def test_the_mask_as_data_is_named_with_its_sample(tmp_path, capsys):
    texts = {name: [[1, 4, 2], [1, 5, 2], [1, 3, 2]] for name in ("train", "validation")}
    write_dataset(
        tmp_path / "d", CharacterTokenizer("abc"), texts, Description("x", 4, "loss", "given", {}), shard_bytes=9**5
    )
    assert main(["prepare", "--verify", str(tmp_path / "d")]) == 1
    assert "mask id 3" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"sample 2 .*mask id 3"):
        list(loader(tmp_path / "d"))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("version",), 3),
        (("version",), True),
        (("mask_id",), -1),
        (("mask_id",), 12),
        (("pad_id",), 1.5),
        (("bos_id",), "1"),
        (("eos_id",), 2**70),
        (("vocab_size",), 0),
        (("vocab_size",), 10**30),
        (("length",), -4),
        (("length",), 2**40),
        (("dtype",), "float64"),
        (("dtype",), "object"),
        (("pad_policy",), "igmore"),
        (("bos_policy",), "givan"),
        (("framing",), "record"),
        (("labels",), [1]),
        (("labels",), "ab"),
        (("counts",), {"read": -1}),
        (("counts",), None),
        (("source",), []),
        (("name",), None),
        (("surprise",), 1),
        (("fingerprint",), None),
        (("fingerprint",), "0" * 64),
        (("splits",), []),
        (("splits", "train"), None),
        (("splits", "train", "samples"), -1),
        (("splits", "train", "samples"), True),
        (("splits", "train", "tokens"), 1e3),
        (("splits", "train", "files"), {}),
        (("splits", "train", "files", 0, "bytes"), 2**63),
        (("splits", "train", "files", 0, "sha256"), "xyz"),
        (("splits", "train", "files", 0, "sha256"), "A" * 64),
        (("splits", "train", "files", 0, "sha256"), "a" * 64 + "\n"),
        (("tokenizer", "sha256"), ""),
        (("tokenizer", "kind"), None),
        (("tokenizer",), "tokenizer.json"),
    ],
)
def test_impossible_values_of_a_manifest(data, keys, value):
    change(data, *keys, to=value)
    message = refusal(Manifest.read, data)
    assert str(data / "manifest.json") in message and str(keys[-1]) in message


OUTSIDE = [
    "../victim.txt",
    "{victim}",
    "train/../../victim.txt",
    "train/..\\x",
    "train",
    "train//x",
    "./train/x",
    "",
    "train/\n",
]


@pytest.mark.parametrize(
    "name",
    [*OUTSIDE, "manifest.json", "test/index.json", "link/victim.txt", "train/" + "x" * 400, "train/" + "é" * 150],
)
def test_a_name_in_a_manifest_reaches_no_other_file(data, tmp_path, capsys, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (data / "link").symlink_to(tmp_path)
    change(data, "splits", "train", "files", 0, "file", to=name.format(victim=victim))
    mark_as_cache(data, str(tmp_path / "data"))
    before = sorted(path.name for path in data.rglob("*"))
    for read in (check_dataset, lambda root: open_data(DataConfig(path=str(tmp_path / "c"), remote=str(root)))):
        assert "manifest.json" in refusal(read, data)
    assert main(["prepare", "--verify", str(data)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert victim.read_text() == "mine" and sorted(path.name for path in data.rglob("*")) == before


def test_a_split_that_a_link_takes_outside(data, tmp_path):
    """Fetching would write there, and removing damaged shards would remove there."""
    shutil.move(data / "train", tmp_path / "theirs")
    (data / "train").symlink_to(tmp_path / "theirs")
    victim = tmp_path / "theirs/shard.00000.mds"
    os.truncate(victim, 10)
    mark_as_cache(data, "/nowhere")
    assert "manifest.json" in refusal(check_dataset, data)
    assert victim.stat().st_size == 10


@pytest.mark.parametrize("split", ["..", "a/b", "", "{victim}", "a\\b", ".", "\x00"])
def test_a_split_is_the_name_of_a_directory(data, tmp_path, split):
    change(data, "splits", to={split.format(victim=tmp_path): {"samples": 1, "tokens": 1, "files": []}})
    assert "manifest.json" in refusal(Manifest.read, data)


@pytest.mark.parametrize(
    "name", ["../.bashrc", "/etc/passwd", "model.json", "weights.safetensors", "tokenizer.json/x", ""]
)
def test_a_tokenizer_is_copied_under_no_other_name(molecules, base, tmp_path, empty_yaml, capsys, name):
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(molecules, data)
    shutil.copytree(base, model, symlinks=True)
    (tmp_path / ".bashrc").write_text("mine")
    for manifest in [data / "manifest.json", *model.rglob("manifest.json")]:
        change(manifest.parent, "tokenizer", "file", to=name)
    runs = [
        ["train", str(empty_yaml), f"run_dir={tmp_path / 'run'}", f"data.path={data}", "train.steps=1", *TINY],
        ["export", str(model), str(tmp_path / "export")],
        ["evaluate", str(model), f"data={data}"],
    ]
    for arguments in runs:
        assert main(arguments) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / ".bashrc").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {".bashrc", "data", "model"}


def put_fifo(path):
    os.mkfifo(path)


def put_loop(path):
    path.symlink_to(path.name)


def put_device(path):
    path.symlink_to("/dev/zero")


def put_absent(path):
    path.symlink_to("nowhere")


NAMES = ["manifest.json", "tokenizer.json", "train/index.json", "train/shard.00000.mds"]


@pytest.mark.parametrize(
    ("name", "put"),
    [
        (name, put)
        for name in (*NAMES, "train", "remote.json")
        for put in (os.mkdir, put_fifo, put_loop, put_device, put_absent)
        if (name, put) != ("train", os.mkdir)  # it should be a folder
    ],
)
def test_what_is_no_file_is_named_at_once(data, capsys, put, name):
    path = data / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    put(path)
    if name == "remote.json" and put is put_absent:
        return  # as if there were none
    assert name in refusal(loader, data)
    assert main(["prepare", "--verify", str(data)]) == 1
    found = capsys.readouterr()
    assert name in found.out + found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_terabytes_is_refused_by_its_size(data, name):
    os.truncate(data / name, 2**42)
    message = refusal(loader, data)
    assert name in message and str(2**42) in message


@pytest.mark.parametrize("put", [put_fifo, put_loop, os.mkdir, put_device])
def test_a_shard_that_is_replaced_while_it_is_read(data, put):
    reader = loader(data)
    (data / "train/shard.00001.mds").unlink()
    put(data / "train/shard.00001.mds")
    with pytest.raises(UserError, match=r"shard\.00001\.mds"):
        list(reader)


def test_orders_that_the_samples_do_not_allow(data):
    with pytest.raises(UserError, match=r"data\.num_canonical_nodes=41 .*40"):
        loader(data, num_canonical_nodes=41)
    for nodes, block in ((40, 1), (7, 2**40), (1, 2**40)):
        seen = np.concatenate(
            [batch["index"] for batch in loader(data, num_canonical_nodes=nodes, shuffle_block=block, shuffle=True)]
        )
        assert set(seen.tolist()) == set(range(40))


def test_manifests_of_earlier_versions_are_read_and_verify_says_so(data, capsys):
    fingerprint = Manifest.read(data).fingerprint()
    content = json.loads((data / "manifest.json").read_text())
    for key in ("fingerprint", "labels", "framing"):
        content.pop(key)
    (data / "manifest.json").write_text(json.dumps(content))
    assert Manifest.read(data).fingerprint() == fingerprint
    assert main(["prepare", "--verify", str(data)]) == 0
    assert f"{data / 'manifest.json'} has no fingerprint" in capsys.readouterr().out
    Manifest.read(data).write(data)
    assert main(["prepare", "--verify", str(data)]) == 0
    assert "no fingerprint" not in capsys.readouterr().out


FINGERPRINTS = {
    "genomes/base-model": "c4ba242708e0d681c48d6affd2c7b0f36577d9f1379da6bde2eb1ae0569c59fb",
    "qm9/base-model": "849cc87bbfa4eb0c563eac28c316746ad2c5777b3ece88ffea6f48a2209aba3e",
    "text/base-model": "c6f88b3c221c75de5af1ea99188bab7ec11250f205a39ce0aa581c11fdf8f870",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_stay(name):
    """Checkpoints hold them: a run continues only on the data that it was started with."""
    assert Manifest.read(ROOT / "configs" / name).fingerprint() == FINGERPRINTS[name]


class Endless(http.server.BaseHTTPRequestHandler):
    """An object store whose objects never end."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.send_header("ETag", '"x"')
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(2**40))
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" " * 2**16)
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def endless():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ended(root):
    """Whether no download goes on, and none has left anything."""
    running = [thread for thread in threading.enumerate() if thread.name.startswith("download of")]
    return not running and not [path for path in root.rglob(".*") if path.is_dir()]


def test_an_endless_manifest_is_cut_off(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "LARGEST_TEXT", 2**20)
    with endless() as url:
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        message = refusal(open_data, DataConfig(path=str(tmp_path / "cache"), remote="s3://bucket/x"))
    assert "s3://bucket/x/manifest.json" in message and str(2**20) in message and ended(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train/index.json"])
def test_an_endless_file_of_a_remote_directory_is_cut_off(data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(remote_module, "LARGEST_TEXT", 2**16)
    (data / name).unlink()
    put_device(data / name)
    config = DataConfig(path=str(tmp_path / "cache"), remote=str(data))
    assert f"{data}/{name}" in refusal(open_data, config) and ended(tmp_path)


def test_an_endless_shard_is_cut_off(data, tmp_path):
    config = DataConfig(path=str(tmp_path / "cache"), remote=str(data))
    reader = build_loader(open_data(config), "train", batch_size=8, shuffle=False, seed=0, drop_last=False)
    (data / "train/shard.00000.mds").unlink()
    put_device(data / "train/shard.00000.mds")
    assert "train/shard.00000.mds" in refusal(list, reader) and ended(tmp_path)


def test_remains_of_killed_downloads_are_removed_when_they_are_old(whole, tmp_path):
    config = DataConfig(path=str(tmp_path / "cache"), remote=str(whole))
    open_data(config)
    old, new = tmp_path / "cache/train/.fetch.old", tmp_path / "cache/train/.fetch.new"
    for path in (old, new):
        path.mkdir()
        (path / "shard").write_text("half")
    os.utime(old, (1, 1))
    open_data(config)
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("file", ["piece.json", "train/index.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-4],
        lambda text: text.replace("shard.00000.mds", "../../victim.txt"),
        lambda text: text.replace('"samples": 3', '"samples": -3'),
        lambda text: "[]",
        lambda text: '{"..": null}',
    ],
)
def test_a_damaged_piece_of_a_preparation_is_named(tmp_path, file, damage):
    """An interrupted preparation continues from these."""
    (tmp_path / "victim.txt").write_text("mine")
    piece = write_piece_of(tmp_path / "work/encode-00000", 3, "records")
    path = piece[0] / file
    path.write_text(damage(path.read_text()))
    assert file.rpartition("/")[2] in refusal(join, tmp_path / "data", *piece)
    assert not (tmp_path / "data").exists() and (tmp_path / "victim.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_run_leaves_no_lock_files(data, tmp_path, empty_yaml, monkeypatch):
    keys = [f"run_dir={tmp_path / 'run'}", f"data.path={data}", "train.steps=3", *TINY, "train.global_batch_size=32"]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = scmdm("train", empty_yaml, *keys, cwd=tmp_path)
    output = process.communicate(timeout=50)
    assert process.returncode == 0, output
    assert not list((tmp_path / "temporary").glob("*_filelock"))


def test_files_that_the_manifest_does_not_list_are_found(data, capsys):
    shutil.copy(data / "train/shard.00000.mds", data / "train/shard.00009.mds")
    assert main(["prepare", "--verify", str(data)]) == 1
    found = capsys.readouterr()
    assert "shard.00009.mds" in found.out + found.err


def test_the_kind_of_the_tokenizer_is_that_of_its_file(data):
    manifest = Manifest.read(data)
    replace(manifest, tokenizer=replace(manifest.tokenizer, kind="bytes")).write(data)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        check_dataset(data)

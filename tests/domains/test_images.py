"""Distances of pictures against closed forms and other programs; the classifier; copies; grids."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from scmdm.data.loader import read_labels, read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.framing import FramedSequence
from scmdm.data.preparation.shard_writer import Description, join_pieces, write_piece
from scmdm.data.tokenizers import CharacterTokenizer, GridLayout, LevelTokenizer
from scmdm.domains.frechet import Moments, frechet_distance
from scmdm.domains.images import classifier
from scmdm.domains.images.classifier import ClassifierKey, classify, train_classifier, trained_classifier
from scmdm.domains.images.figures import image_grid
from scmdm.domains.images.inception import activations, check_inception, load_inception
from scmdm.domains.images.metrics import (
    ImageReference,
    InceptionReference,
    measure_images,
    nearest_distances,
)
from scmdm.errors import UserError
from scmdm.evaluation.significance import deviations

POSITIVE = st.lists(st.floats(0.0, 9.0), min_size=3, max_size=3)
MEANS = st.lists(st.floats(-9.0, 9.0), min_size=3, max_size=3)


def moments(mean, covariance):
    """Those of two samples that have this mean and this covariance."""
    return Moments(2, 2 * mean, covariance + 2 * np.outer(mean, mean))


@given(MEANS, MEANS, POSITIVE, POSITIVE)
def test_frechet_distance_of_diagonal_gaussians(mean_a, mean_b, std_a, std_b):
    """|m_a - m_b|^2 + |s_a - s_b|^2, with the standard deviations s; in any rotated coordinates."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    a, b = (
        moments(rotation @ np.array(mean), rotation @ np.diag(np.square(std)) @ rotation.T)
        for mean, std in ((mean_a, std_a), (mean_b, std_b))
    )
    expected = np.square(np.subtract(mean_a, mean_b)).sum() + np.square(np.subtract(std_a, std_b)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-5)


def random_moments(seed, samples=40, features=12):
    dice = np.random.default_rng(seed)
    return Moments.of(dice.normal(size=(samples, features)) @ dice.normal(size=(features, features)) + seed)


def test_frechet_distance_is_that_of_other_programs():
    a, b = random_moments(0), random_moments(1)
    root = scipy.linalg.sqrtm(a.covariance_FF @ b.covariance_FF).real
    gap = np.square(a.mean_F - b.mean_F).sum()
    expected = gap + np.trace(a.covariance_FF + b.covariance_FF - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    sides = [{"mu": m.mean_F, "sigma": m.covariance_FF} for m in (a, b)]
    found = metric.fid_statistics_to_metric(*sides, verbose=False)
    assert frechet_distance(a, b) == pytest.approx(found["frechet_inception_distance"], rel=1e-9)


def test_frechet_distance_of_few_samples_is_finite_and_zero_on_itself():
    """Singular covariances: fewer samples than features."""
    a, b = random_moments(0, samples=5), random_moments(1, samples=4)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(a, b) > 1


LAYOUT = GridLayout(8, 8, 1, 4)
TOKENIZER = LevelTokenizer(LAYOUT)


def bars(number, seed):
    """Horizontal and vertical bars with noise: ids (N, 65) and labels (N,)."""
    dice = np.random.default_rng(seed)
    labels_N = dice.integers(0, 2, number)
    values_NHW = dice.integers(0, 2, (number, 8, 8))
    for values_HW, label, place in zip(values_NHW, labels_N, dice.integers(0, 8, number), strict=True):
        (values_HW if label else values_HW.T)[place] = 3
    ids_NL = np.concatenate([np.ones((number, 1), int), values_NHW.reshape(number, -1) + 4], axis=1)
    return ids_NL, labels_N


def write_bars(root, *, labels=("standing", "lying"), flips=False):
    """A data set of 600 bars, of which 100 are held out for each other split."""
    sets = {"train": bars(400, 0), "validation": bars(100, 1), "test": bars(100, 2)}
    source = {"options": {"flips": True}} if flips else {}
    description = Description("bars", LAYOUT.length, "loss", "given", source, labels=labels)

    def rows():
        for split, (ids_NL, labels_N) in sets.items():
            for ids, label in zip(ids_NL.tolist(), labels_N.tolist(), strict=True):
                yield split, FramedSequence(ids, label if labels else None)

    write_piece(root.parent / "piece", rows(), TOKENIZER, description, 1 << 20)
    join_pieces(root, [root.parent / "piece"], list(sets), TOKENIZER, description)
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("bars") / "data")


@pytest.fixture(scope="module")
def reference(dataset):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "_STEPS", 100)
        return ImageReference.make(dataset, "test", work=dataset.parent / "work")


def test_new_pictures_of_the_same_kind_are_near_and_noise_is_far(reference):
    ids_NL, _ = bars(200, 3)
    found = measure_images(ids_NL, reference).metrics
    assert found["classifier_accuracy"] > 0.95
    assert (found["num_samples"], found["num_framed"], found["num_distinct"], found["num_copies"]) == (200, 200, 200, 0)
    assert found["num_memorised"] == 0 and found["class_distance"] < 0.15
    assert found["nearest_distance"] == pytest.approx(found["nearest_distance_held_out"], rel=0.05)
    noise_NL = np.concatenate([ids_NL[:, :1], np.random.default_rng(0).integers(4, 8, (200, 64))], axis=1)
    far = measure_images(noise_NL, reference).metrics
    assert far["frechet_classifier"] > 20 * max(found["frechet_classifier"], found["frechet_classifier_floor"])
    assert far["nearest_distance"] > 1.2 * far["nearest_distance_held_out"]
    assert found["fid"] is None and found["fid_note"] is None
    assert json.loads(json.dumps(found))["framed"] == 1.0


def test_one_class_alone_is_seen(reference):
    ids_NL, labels_N = bars(400, 3)
    found = measure_images(ids_NL[labels_N == 1], reference).metrics
    shares = reference.features.classes_K
    assert found["class_distance"] == pytest.approx(shares[0], abs=0.05)


def test_copies_are_counted(dataset, reference):
    train_NL = read_split(dataset, "train").astype(int)
    new_NL, _ = bars(30, 3)
    near_NL = train_NL[50:60].copy()
    near_NL[:, 9] = np.where(near_NL[:, 9] == 4, 5, near_NL[:, 9] - 1)
    found = measure_images(np.concatenate([train_NL[:20], train_NL[:5], new_NL, near_NL]), reference).metrics
    assert (found["num_samples"], found["num_distinct"], found["num_copies"]) == (65, 60, 25)
    assert found["num_memorised"] == 35, "also those with one other value, by one level"
    assert found["copies"] == 25 / 65


def test_the_floor_is_the_distance_of_training_pictures(dataset, reference):
    train_NL = read_split(dataset, "train").astype(int)
    found = measure_images(train_NL, reference).metrics
    assert found["frechet_classifier"] == pytest.approx(found["frechet_classifier_floor"], rel=1e-6)
    assert 0 < found["frechet_classifier"] < 1
    assert reference.features.floor(1000) == reference.features.floor(400) < reference.features.floor(40)


def test_what_is_not_framed_is_counted(reference):
    ids_NL, _ = bars(40, 3)
    ids_NL[:4, 30], ids_NL[4:6, 0], ids_NL[6, 64] = TOKENIZER.mask_id, 4, TOKENIZER.eos_id
    assert measure_images(ids_NL, reference).metrics["num_framed"] == 33
    for wrong in (ids_NL[:1], ids_NL[:, :64]):
        with pytest.raises(UserError, match=r"num=1|length=64"):
            measure_images(wrong, reference)


def test_two_samples_have_a_distance_and_no_interval(reference):
    measured = measure_images(bars(2, 3)[0], reference)
    assert measured.metrics["frechet_classifier"] > 0
    values = measured.values["frechet_classifier"]
    assert np.isnan(values.array).all() and deviations(values) is None
    assert math.isnan(frechet_distance(random_moments(0, samples=1), random_moments(1)))


def test_without_labels_there_is_no_classifier(tmp_path):
    root = write_bars(tmp_path / "data", labels=())
    found = measure_images(bars(40, 3)[0], ImageReference.make(root, "test", work=tmp_path / "work")).metrics
    assert found["frechet_classifier"] is None and found["classifier_accuracy"] is None and found["num_framed"] == 40
    assert not (tmp_path / "work").exists()
    with pytest.raises(UserError, match="has no labels"):
        read_labels(root, "train")


def test_mirror_images_are_no_reference(tmp_path):
    root = write_bars(tmp_path / "data", labels=(), flips=True)
    reference = ImageReference.make(root, "test", work=tmp_path)
    assert len(reference.train_NHWC) == 400 and len(reference.originals_NHWC) == 200
    assert (reference.originals_NHWC[1] == reference.train_NHWC[2]).all()


def test_text_is_no_picture(tmp_path):
    tokenizer = CharacterTokenizer("ab")
    description = Description("text", 4, "loss", "given", {})
    write_piece(tmp_path / "piece", [("train", FramedSequence([1, 4, 2]))], tokenizer, description, 1 << 20)
    join_pieces(tmp_path / "data", [tmp_path / "piece"], ["train"], tokenizer, description)
    with pytest.raises(UserError, match="has the tokenizer characters, not levels"):
        ImageReference.make(tmp_path / "data", "train", work=tmp_path)


def test_the_classifier_is_kept_and_depends_on_its_seed_alone(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 5)
    monkeypatch.setattr(classifier, "_EPOCHS", 0)
    pictures_NHWC, labels_N = TOKENIZER.pictures(read_split(dataset, "train")), read_labels(dataset, "train")
    key = ClassifierKey(Manifest.read(dataset).fingerprint(), 1, 2, seed=0)
    torch.manual_seed(7)
    first = trained_classifier(pictures_NHWC, labels_N, key, tmp_path)
    torch.manual_seed(8)
    again = train_classifier(pictures_NHWC, labels_N, key)
    other = train_classifier(pictures_NHWC, labels_N, ClassifierKey(key.fingerprint, 1, 2, seed=1))
    monkeypatch.setattr(classifier, "train_classifier", None)
    kept = trained_classifier(pictures_NHWC, labels_N, key, tmp_path)
    features = [classify(found, pictures_NHWC[:9])[0] for found in (first, again, kept, other)]
    assert (features[0] == features[1]).all() and (features[0] == features[2]).all()
    assert not np.allclose(features[0], features[3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:50]), r"classifier-.*\.safetensors"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), r"classifier-.*\.safetensors"),
        (lambda path: save_file({"a": torch.zeros(1)}, path, {"key": "{}"}), r"classifier-.*\.safetensors"),
    ],
)
def test_a_damaged_classifier_is_refused(dataset, tmp_path, monkeypatch, damage, message):
    monkeypatch.setattr(classifier, "_STEPS", 1)
    monkeypatch.setattr(classifier, "_EPOCHS", 0)
    ids_NL, labels_N = bars(10, 0)
    key = ClassifierKey("f" * 64, 1, 2, seed=0)
    trained_classifier(TOKENIZER.pictures(ids_NL), labels_N, key, tmp_path)
    damage(key.file(tmp_path))
    with pytest.raises(UserError, match=message):
        trained_classifier(TOKENIZER.pictures(ids_NL), labels_N, key, tmp_path)
    key.file(tmp_path).unlink()
    trained_classifier(TOKENIZER.pictures(ids_NL), labels_N, key, tmp_path)
    with pytest.raises(UserError, match="another data set"):
        trained_classifier(TOKENIZER.pictures(ids_NL), labels_N, ClassifierKey("f" * 12, 1, 2, 0), tmp_path)


def test_nearest_distances_by_hand():
    black, grey, white = (np.full((1, 2, 2, 1), value, np.uint8) for value in (0, 51, 255))
    found = nearest_distances(np.concatenate([black, grey]), np.concatenate([white, grey]))
    assert found == pytest.approx(np.array([[0.2, 1.0], [0.0, 0.8]]), abs=1e-6)
    assert nearest_distances(black, white).tolist() == [[1.0, float("inf")]]


def test_near_pictures_are_told_from_copies():
    """Matrix products in float32 would find a distance of about 0 for both."""
    many = np.random.default_rng(0).integers(0, 255, (300, 16, 16, 3), np.uint8)
    near = many[:1].copy()
    near[0, 0, 0, 0] += 1
    assert nearest_distances(many[:1], many)[0, 0] == 0.0
    assert nearest_distances(near, many)[0, 0] == pytest.approx(1 / 255 / np.sqrt(768), rel=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels):
    pictures = np.zeros((7, 8, 8, channels), np.uint8)
    pictures[1], pictures[6, 0, 0] = 255, 255
    assert image_grid(pictures, tmp_path / "grid.png", columns=4, rows=2) == 7
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert grid.shape == (2 * 66 + 2, 4 * 66 + 2)
    assert (grid[2:66, 2:66] == 0).all() and (grid[2:66, 68:132] == 255).all()
    assert grid[68, 2 * 66 + 2] == 255 and grid[68, 2 * 66 + 2 + 8] == 0
    assert image_grid(pictures, tmp_path / "one.png", columns=2, rows=1) == 2


def test_inception_files_that_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(UserError, match=r"none\.pth does not exist.*weights-inception"):
        check_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(print, tmp_path / "code.pth")  # an object by name: unpickling it is refused
    for name in ("text", "other", "list", "code"):
        with pytest.raises(UserError, match=r"metrics\.inception="):
            load_inception(tmp_path / f"{name}.pth")


def test_inception_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scmdm\[images\]"):
        check_inception(tmp_path / "weights.pth")


class Pictures(torch.utils.data.Dataset):
    """As torch-fidelity wants them: (C, H, W) each."""

    def __init__(self, pictures_NHWC):
        self.pictures_NCHW = torch.from_numpy(pictures_NHWC).movedim(3, 1)

    def __len__(self):
        return len(self.pictures_NCHW)

    def __getitem__(self, at):
        return self.pictures_NCHW[at]


@pytest.mark.slow
@pytest.mark.long
def test_fid_and_inception_score_with_random_weights(tmp_path, monkeypatch):
    """Against torch-fidelity's own figures; its published weights are not here."""
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"], str(path)).state_dict(), path)
    dice = np.random.default_rng(0)
    a, b = dice.integers(0, 256, (12, 8, 8, 3), np.uint8), dice.integers(60, 200, (14, 8, 8, 3), np.uint8)
    network = load_inception(path)
    expected = fidelity.calculate_metrics(
        input1=Pictures(a),
        input2=Pictures(b),
        fid=True,
        isc=True,
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(path),
    )
    found = InceptionReference(network, activations(network, b).moments, 14).measure(a)
    # The covariances of few samples are singular: torch-fidelity's roots of zero eigenvalues are not exact.
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-2)
    assert found["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert found["fid_note"].startswith("12 samples against 14 training") and "not comparable" in found["fid_note"]

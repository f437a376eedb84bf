"""FID and its relatives: torch-fidelity's numbers, the same from every kind of file; refusals."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from heptapod_fast.data import Logograms, Pairs
from heptapod_fast.evaluation import MetricContext, fidelity, make_metrics
from heptapod_fast.evaluation import small as small_module
from heptapod_fast.evaluation.extractors import Features, Inception, load_torch_fidelity
from heptapod_fast.evaluation.fidelity import (
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)
from heptapod_fast.evaluation.image_sets import TrainingImages, open_images_at
from heptapod_fast.tokenizers import Patch, PatchVQ, to_uint8, to_unit

ALL = ("fid", "sfid", "kid", "is", "precision", "recall")
SIDE = 24
LOGOGRAMS = Logograms(SIDE, 400)
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """(file of random weights, how its hash begins)."""
    load_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(3)
    for name, value in network.state_dict().items():
        if value.dim() > 1:
            spread = (2.0 / value[0].numel()) ** 0.5
            value.copy_(spread * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.fill_(1.0)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def write_pngs(pixels, folder):
    folder.mkdir()
    for number, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number:04}.png")
    return folder


def write_npz(pixels, path, **others):
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy(), **others)
    return path


def pictures(first, count):
    return LOGOGRAMS.images(torch.arange(first, first + count))


def measured(pixels, names, **context):
    (metric,) = make_metrics(names, MetricContext(LOGOGRAMS, image_size=SIDE, **context))
    for part in pixels.split(7):
        metric.update(part, torch.zeros(len(part), dtype=torch.int64))
    return metric.compute()


def test_torch_fidelitys_own_numbers_of_two_folders(inception, tmp_path):
    """Its command on two folders, against ours on the samples in memory and the second folder."""
    path, sha256 = inception
    samples, real = pictures(0, 6), pictures(6, 7)
    folders = write_pngs(samples, tmp_path / "a"), write_pngs(real, tmp_path / "b")
    expected = load_torch_fidelity().calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        cuda=False,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=6,
        isc_splits=6,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=path,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=7,
    )
    found = measured(
        samples,
        ALL,
        reference=str(folders[1]),
        inception=path,
        inception_sha256=sha256,
    )
    # The batches of its network differ from ours, and with them the last bits of features.
    same = lambda ours, theirs: found[ours] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-6)
    assert same("fid", "frechet_inception_distance")
    assert same("kid", "kernel_inception_distance_mean")
    assert same("inception_score", "inception_score_mean")
    assert same("inception_score_deviation", "inception_score_std")
    assert found["precision"] == pytest.approx(expected["precision"])
    assert found["recall"] == pytest.approx(expected["recall"])
    assert found["reference_images"] == 7 and found["extractor"] == "inception-v3-compat"
    assert found["extractor_sha256"].startswith(sha256) and "6 samples" in found["warning"]


def test_its_functions_on_the_same_features_give_the_same_bits():
    load_torch_fidelity()
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 40, generator=generator) + 5 for n in (2500, 1300))
    theirs = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(x) for x in (a, b)), verbose=False
    )
    ours = frechet_distance(mean_and_covariance(a), mean_and_covariance(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    for x in (a, b):
        mean, covariance = mean_and_covariance(x)
        expected = metric_fid.fid_features_to_statistics(x)
        assert np.array_equal(mean, expected["mu"])
        np.testing.assert_allclose(covariance, expected["sigma"], rtol=1e-9, atol=1e-12)
    kid = metric_kid.kid_features_to_metric(a, b, kid_subset_size=1000, verbose=False)
    assert kernel_distance(a, b)["kid"] == kid["kernel_inception_distance_mean"]
    assert (
        inception_score(a)["inception_score"]
        == (metric_isc.isc_features_to_metric(a)["inception_score_mean"])
    )
    full = metric_prc.calculate_precision_recall_full(a, b)
    both = precision_recall(a, b)
    assert (both["precision"], both["recall"]) == pytest.approx(full, abs=2e-3)


def test_the_spatial_features_are_adms(inception):
    """The first 7 channels of the 17 x 17 map of mixed_6's first branch, place by place."""
    path, sha256 = inception
    extractor = Inception(path, CPU, sha256)
    pixels = pictures(0, 2)
    features = extractor(pixels)
    assert features.pooled.shape == (2, 2048) and features.logits.shape == (2, 1008)
    assert features.spatial.shape == (2, 17 * 17 * 7)
    seen = []
    hook = extractor._network.Mixed_6d.register_forward_hook(lambda m, i, o: seen.append(o))
    extractor(pixels)
    hook.remove()
    # The branch is the first to be concatenated.
    by_hand = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.equal(features.spatial, by_hand)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Context of a small extractor, trained for a few steps."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_module, "STEPS", 30)
        patch.setattr(small_module, "BATCH", 16)
        yield dict(extractor="small", folder=str(folder))


def test_the_same_numbers_from_memory_npz_and_pngs(small, tmp_path):
    samples, real = pictures(0, 60), pictures(60, 70)
    npz = write_npz(samples, tmp_path / "samples.npz")
    pngs = write_pngs(samples, tmp_path / "samples")
    references = [
        str(write_npz(real, tmp_path / "real.npz")),
        str(write_pngs(real, tmp_path / "real")),
    ]
    results = []
    for reference in references:
        for path in (None, npz, pngs):
            pixels = samples
            if path is not None:
                pixels = torch.cat(list(open_images_at(str(path), SIDE, "--samples").batches()))
            found = measured(pixels, ALL, reference=reference, **small)
            results.append({name: found[name] for name in found if "reference" not in name})
    assert all(result == results[0] for result in results)
    assert results[0]["fid"] > 0 and results[0]["extractor"] == "small"


def test_a_set_against_itself(small, tmp_path):
    samples = pictures(0, 80)
    reference = str(write_npz(samples, tmp_path / "a.npz"))
    found = measured(samples, ALL, reference=reference, **small)
    scale = measured(255 - samples, ("fid", "sfid", "kid"), reference=reference, **small)
    assert abs(found["fid"]) < 1e-4 * scale["fid"] and abs(found["sfid"]) < 1e-4 * scale["sfid"]
    assert found["precision"] == 1 and found["recall"] == 1
    assert abs(found["kid"]) < 0.02 * scale["kid"]


def test_halves_of_real_images_are_near_and_others_far(small):
    """The training images are the reference where no other is named."""
    near = measured(pictures(0, 200), ("fid", "kid", "precision"), **small)
    blurred = pictures(0, 200).float().mean(-1, keepdim=True).expand(-1, -1, -1, SIDE)
    far = measured(blurred.to(torch.uint8), ("fid", "kid", "precision"), **small)
    assert near["reference_images"] == 400 and near["reference_sha256"] == LOGOGRAMS.fingerprint
    assert far["fid"] > 20 * near["fid"] and far["kid"] > near["kid"]
    assert far["precision"] < near["precision"]


def test_the_small_extractor_is_trained_once_and_for_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr(small_module, "STEPS", 100)
    monkeypatch.setattr(small_module, "BATCH", 32)
    first = small_module.small_extractor(LOGOGRAMS, tmp_path, CPU)
    assert first.accuracy > 0.35  # of five classes
    monkeypatch.setattr(small_module, "_train", None)
    again = small_module.small_extractor(LOGOGRAMS, tmp_path, CPU)
    assert (again.sha256, again.accuracy) == (first.sha256, pytest.approx(first.accuracy, abs=1e-4))
    pixels = pictures(0, 3)
    assert torch.equal(again(pixels).pooled, first(pixels).pooled)
    assert first(pixels).spatial.shape == (3, 4 * 4 * 7)
    with pytest.raises(TypeError):  # other images: another one is trained
        small_module.small_extractor(Logograms(SIDE, 200), tmp_path, CPU)


def test_the_small_extractor_depends_on_its_data_alone(tmp_path, monkeypatch):
    """Whatever was drawn before; and a file that is damaged is made anew."""
    monkeypatch.setattr(small_module, "STEPS", 3)
    monkeypatch.setattr(small_module, "BATCH", 8)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        found.append(small_module.small_extractor(LOGOGRAMS, folder, CPU).sha256)
    path = tmp_path / "1" / small_module.FILE
    path.write_bytes(path.read_bytes()[:1000])
    found.append(small_module.small_extractor(LOGOGRAMS, tmp_path / "1", CPU).sha256)
    assert found == [found[0]] * 3


def test_some_training_images_are_of_all_classes():
    """Where labels repeat, every fifth image would be of one class."""
    pairs = Pairs(24, 2000)
    some = TrainingImages(pairs, most=400)
    assert len(some) == 400 and some.labels.bincount().min() > 50
    again = TrainingImages(pairs, most=400)
    assert torch.equal(torch.cat(list(some.batches())), torch.cat(list(again.batches())))
    part = some.part(some.labels == 2, "twos")
    assert part.name == "twos" and part.labels.unique().tolist() == [2]
    whole = TrainingImages(pairs)
    assert torch.equal(whole.labels, pairs.labels) and len(whole) == 2000


def test_the_package_is_asked_for_before_anything_is_sampled(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install 'heptapod_fast"):
        make_metrics(["fid"], MetricContext(LOGOGRAMS, image_size=SIDE, **small))


def floor(reference=None, tokenizer=None, **more):
    """What rfid says; it is given no samples."""
    (metric,) = make_metrics(
        ["rfid"],
        MetricContext(LOGOGRAMS, image_size=SIDE, reference=reference, tokenizer=tokenizer, **more),
    )
    assert not metric.needs_samples
    return metric.compute()


def test_rfid_is_the_fid_of_what_the_tokenizer_gives_back(small, tmp_path, monkeypatch):
    """By hand: as samples against the reference. A finer codebook costs less, exact tokens
    nothing, and a reference is the same from every kind of file."""
    real = pictures(0, 100)
    coarse = PatchVQ.fit(LOGOGRAMS, SIDE, 4, codes=8)
    reference = str(write_npz(real, tmp_path / "real.npz"))
    found = floor(reference, coarse, **small)
    again = to_uint8(coarse.decode(coarse.encode(to_unit(real))))
    by_hand = measured(again, ("fid",), reference=reference, **small)
    assert found["rfid"] == pytest.approx(by_hand["fid"], rel=1e-6) and found["rfid"] > 0
    assert found["rfid_images"] == found["reference_images"] == 100
    assert found["extractor"] == "small" and "warning" not in found and "fid" not in found
    fine = PatchVQ.fit(LOGOGRAMS, SIDE, 4, codes=64)
    assert floor(reference, fine, **small)["rfid"] < 0.7 * found["rfid"]
    exact = floor(reference, Patch(SIDE, 4), **small)["rfid"]
    assert abs(exact) < 1e-4 * found["rfid"]
    folder = str(write_pngs(real, tmp_path / "real"))
    assert floor(folder, coarse, **small)["rfid"] == found["rfid"]
    whole = floor(None, coarse, **small)
    assert whole["rfid_images"] == 400 and whole["reference"] == "the training images"


def test_rfid_is_of_images_whatever_statistics_stand_beside_them(tmp_path, monkeypatch):
    """Also beside the fid of samples, which takes the statistics."""
    monkeypatch.setattr(fidelity, "extractor_of", lambda context: Means())
    real = pictures(0, 30)
    statistics = dict(mu=np.zeros(3, np.float32), sigma=np.eye(3))
    both = str(write_npz(real, tmp_path / "both.npz", **statistics))
    alone = str(write_npz(real, tmp_path / "alone.npz"))
    tokenizer = PatchVQ.fit(LOGOGRAMS, SIDE, 4, codes=8)
    found = measured(pictures(30, 20), ("fid", "rfid"), reference=both, tokenizer=tokenizer)
    assert found["rfid"] == floor(alone, tokenizer)["rfid"] == floor(both, tokenizer)["rfid"]
    assert found["fid"] > 10 * found["rfid"] and found["reference_statistics"] == "as published"
    assert "20 samples" in found["warning"]


def test_rfid_is_measured_once(monkeypatch):
    """No sample changes it."""
    monkeypatch.setattr(fidelity, "extractor_of", lambda context: Means())
    calls = []
    monkeypatch.setattr(fidelity, "through", lambda t, images: calls.append(1) or images)
    context = MetricContext(LOGOGRAMS, tokenizer=Patch(SIDE, 4), image_size=SIDE)
    (metric,) = make_metrics(["rfid"], context)
    first = metric.compute()
    count = len(calls)
    metric.restart(None)
    assert metric.compute() == first and len(calls) == count > 0


@pytest.mark.parametrize("room", [1, 20, 64, 130, 131, 1000])
def test_features_are_kept_however_many_were_expected(room):
    kept = fidelity.Kept(Means(), {"pooled", "logits"}, room)
    for first, count in ((0, 1), (1, 63), (64, 66), (130, 1)):
        kept.add(pictures(first, count))
    features = Means()(pictures(0, 131))
    assert kept.count == 131
    assert torch.equal(kept.of("pooled"), features.pooled)
    assert torch.equal(kept.of("logits"), features.logits)


class Means:
    """An extractor of simple features, for which published statistics may stand."""

    name = "means"
    sha256 = "0"
    knows_statistics = True

    def __init__(self):
        self.images = 0

    def __call__(self, pixels):
        self.images += len(pixels)
        values = pixels.float()
        pooled = values.mean((2, 3)) + values.amax((2, 3))
        return Features(pooled, values[:, :, ::12, ::12].flatten(1), pooled)


def test_published_statistics_are_taken_as_they_are(tmp_path, monkeypatch):
    """They stand for the images, which then are not looked at."""
    extractor = Means()
    monkeypatch.setattr(fidelity, "extractor_of", lambda context: extractor)
    real, samples = pictures(0, 30), pictures(30, 20)
    features = extractor(real)
    named = {}
    for end, values in (("", features.pooled), ("_s", features.spatial)):
        named[f"mu{end}"], named[f"sigma{end}"] = mean_and_covariance(values)
    np.savez(tmp_path / "statistics.npz", **named)
    both = write_npz(255 - real, tmp_path / "both.npz", **named)
    images = write_npz(real, tmp_path / "images.npz")
    found = {}
    for path in (tmp_path / "statistics.npz", both, images):
        extractor.images = 0
        found[path.stem] = measured(samples, ("fid", "sfid"), reference=str(path))
        assert extractor.images == 20 + (30 if path == images else 0)
    for name in ("fid", "sfid"):
        assert found["statistics"][name] == pytest.approx(found["images"][name], rel=1e-4)
        assert found["both"][name] == found["statistics"][name]
    assert found["statistics"]["reference_images"] == "statistics alone"
    assert found["both"]["reference_images"] == 30
    # Neighbours are looked for among the images, statistics or not.
    assert measured(samples, ("fid", "recall"), reference=str(both))["recall"] == 0


def test_precision_is_of_samples_and_recall_of_the_reference(tmp_path, monkeypatch):
    """Samples that are one real image, nearly: all of them are real, and most are missing."""
    monkeypatch.setattr(fidelity, "extractor_of", lambda context: Means())
    reference = str(write_npz(pictures(0, 200), tmp_path / "a.npz"))
    samples = pictures(0, 1).repeat(12, 1, 1, 1)
    samples[:, :, 0, 0] = torch.arange(12, dtype=torch.uint8)[:, None]
    found = measured(samples, ("precision", "recall"), reference=reference)
    assert found["precision"] == 1 and found["recall"] < 0.5


def test_statistics_of_another_network_are_passed_over(small, tmp_path):
    """A file of images and of Inception's statistics: the small extractor looks at the images."""
    statistics = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(9), sigma_s=np.eye(9))
    real, samples = pictures(0, 30), pictures(30, 20)
    found = [
        measured(samples, ("fid", "sfid"), reference=str(path), **small)
        for path in (
            write_npz(real, tmp_path / "images.npz"),
            write_npz(real, tmp_path / "both.npz", **statistics),
        )
    ]
    for name in ("fid", "sfid"):
        assert found[0][name] == found[1][name]
    assert "reference_statistics" not in found[1]


@pytest.mark.parametrize(
    "arrays, text",
    [
        (dict(arr_0=np.zeros((3, SIDE, SIDE, 3), np.float32)), "round to whole numbers first"),
        (dict(arr_0=np.zeros((3, 3, SIDE, SIDE), np.uint8)), "channels come last"),
        (dict(arr_0=np.zeros((3, SIDE, SIDE), np.uint8)), "grey images have to be made RGB"),
        (dict(arr_0=np.zeros((3, SIDE, SIDE, 1), np.uint8)), "grey images have to be made RGB"),
        (dict(arr_0=np.zeros((3, 32, 32, 3), np.uint8)), "arr_0 is uint8 (3, 32, 32, 3)"),
        (dict(arr_0=np.zeros((0, SIDE, SIDE, 3), np.uint8)), "expected uint8 RGB images"),
        (dict(images=np.zeros(3)), "holds images; expected arr_0"),
        (dict(arr_0=np.zeros((2, SIDE, SIDE, 3), np.uint8), labels=np.zeros(3)), "labels are (3,)"),
    ],
)
def test_files_that_are_refused(tmp_path, arrays, text):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError) as raised:
        open_images_at(str(tmp_path / "a.npz"), SIDE, "--reference")
    assert text in str(raised.value) and f"--reference {tmp_path / 'a.npz'}" in str(raised.value)


def test_places_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("none")
    write_pngs(torch.zeros(1, 3, 32, 16, dtype=torch.uint8), tmp_path / "wide")
    for name, text in (
        ("empty", "no pictures"),
        ("text.npz", "not an .npz file"),
        ("gone", "no such file"),
        ("wide", "has 16 x 32 pixels, expected 24 x 24"),
    ):
        with pytest.raises(ValueError, match=text):
            open_images_at(str(tmp_path / name), SIDE, "--reference")


def test_what_a_metric_lacks_is_said_before_anything_is_sampled(inception, small, tmp_path):
    path, sha256 = inception
    weights = dict(inception=path, inception_sha256=sha256)
    statistics = str(tmp_path / "s.npz")
    np.savez(statistics, mu=np.zeros(4), sigma=np.eye(4))

    def refusal(names, source=LOGOGRAMS, **context):
        with pytest.raises(ValueError) as raised:
            make_metrics(names, MetricContext(source, image_size=SIDE, **context))
        return str(raised.value)

    assert "--inception is missing" in refusal(["fid"])
    assert "or --extractor small" in refusal(["fid"])
    assert "no such file" in refusal(["fid"], inception=str(tmp_path / "gone.pth"))
    assert "expected 6726825d..." in refusal(["fid"], inception=path)
    assert "have statistics" not in refusal(["kid"], reference=statistics, **weights)
    assert "look at its images one by one" in refusal(["kid"], reference=statistics, **weights)
    rfid = dict(reference=statistics, tokenizer=Patch(SIDE, 4), **weights)
    assert "look at its images one by one" in refusal(["rfid"], **rfid)
    assert "this run has none" in refusal(["rfid"], **weights)
    assert "neither images nor mu_s" in refusal(["sfid"], reference=statistics, **weights)
    assert "cannot be compared with" in refusal(["fid"], reference=statistics, **small)
    assert "--reference is missing" in refusal(["fid"], source=None, **weights)
    assert "this run has none" in refusal(["fid"], source=None, **small)
    one = Logograms(SIDE, 8, num_classes=1)
    assert "are of one class" in refusal(["fid"], source=one, **small)
    found = make_metrics(
        ["fid"], MetricContext(LOGOGRAMS, image_size=SIDE, reference=statistics, **weights)
    )
    found[0].update(pictures(0, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="has statistics of 4 features"):
        found[0].compute()


def test_weights_that_are_a_program_are_not_run(tmp_path):
    import pickle

    class Program:
        def __reduce__(self):
            return (pytest.fail, ("it was run",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Program(), protocol=2))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="expected tensors saved by PyTorch"):
        Inception(str(path), CPU, sha256)
    torch.save({"a": torch.zeros(2)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="not the weights of torch-fidelity's Inception"):
        Inception(str(path), CPU, sha256)

"""Facts of the target kmeans: centres, codes, logits, its sample, and its folder."""

from __future__ import annotations

import importlib
import shutil

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from stages import targets
from stages.cost.rehearsal import Rehearsal
from stages.kit import keyed
from stages.kit.nets import encoders
from stages.kit.nets.target import EncoderTarget, Frozen, Target
from stages.targets import hog, kmeans, pixels
from tests import tiny
from tests.conftest import tiny_content, write_params
from workflow.plan import load

SPEC, images = tiny.spec(), tiny.images
CONFIG = kmeans.Config(codes=8, vectors=256, min_usage=0.0)


class Raw(Target):
    """Features of a patch: its mean colour."""

    def __init__(self):
        super().__init__()
        self.spec, self.sizes = SPEC, {"patch": 3}

    def look(self, images, wanted, norm, layers):
        return {"patch": images.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(2).mT}


def fitted(config=CONFIG, upstream=None, seed: int = 0, **spec):
    target = kmeans.Target(config, tiny.spec(**spec), upstream or Frozen(Raw()))
    target.fit(iter([images(16), images(16, seed=1)]), seed)
    return target


def clusters(centres: torch.Tensor, each: int = 50) -> torch.Tensor:
    noise = torch.randn(len(centres) * each, centres.shape[1], generator=keyed.generator(0))
    return centres.repeat_interleave(each, 0) + 0.05 * noise


def test_centres_are_those_of_scikit_learn_and_codes_are_its_predictions():
    centres = torch.tensor([[0.0, 0, 5], [0, 4, 0], [3, 0, 0], [-2, -2, -2]])
    x = clusters(centres)
    config = kmeans.Config(codes=4, normalise=False, starts=3)
    found = kmeans.cluster(x, config, seed=7)
    model = MiniBatchKMeans(
        4, max_iter=config.passes, batch_size=config.step_vectors, n_init=3, random_state=7
    ).fit(x.numpy())
    assert np.array_equal(found.numpy(), model.cluster_centers_)
    assert torch.cdist(centres, found).amin(1).max() < 0.05
    assert kmeans.assign(x, found).tolist() == model.predict(x.numpy()).tolist()
    assert torch.equal(kmeans.assign(x, found), torch.cdist(x, found).argmin(1))


def test_no_code_of_the_sample_is_empty_and_spare_codes_are_never_used():
    centres = torch.randn(6, 5, generator=keyed.generator(1)) * 9
    x = torch.cat([clusters(centres), centres + 100])
    found = kmeans.cluster(x, kmeans.Config(codes=40, step_vectors=16, passes=1), seed=0)
    assert (torch.bincount(kmeans.assign(x, found), minlength=40) > 0).all()
    few = kmeans.cluster(x[:5], kmeans.Config(codes=8), seed=0)
    assert few.shape == (8, 5) and sorted(set(kmeans.assign(x[:5], few).tolist())) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_logits_are_minus_the_squared_distance_but_for_a_constant_of_the_patch():
    for normalise in (True, False):
        target = fitted(kmeans.Config(codes=8, vectors=256, normalise=normalise))
        found = target(images(seed=3), "ids", "logits")
        x = target.features(images(seed=3))
        assert torch.allclose(x.norm(dim=-1), torch.ones(4, 16)) == normalise
        distance = torch.cdist(x, target.centres.expand(4, -1, -1)).square()
        differ = found["logits"] + distance
        torch.testing.assert_close(differ, x.square().sum(-1, True).expand_as(differ))
        assert torch.equal(found["ids"], found["logits"].argmax(-1))


def test_codes_are_the_same_under_autocast_and_alone():
    target, x = fitted(), images(seed=4)
    ids = target(x, "ids")["ids"]
    with torch.autocast("cpu", torch.bfloat16):
        found = target(x, "ids", "logits")
    assert found["logits"].dtype == torch.float32 and torch.equal(found["ids"], ids)
    assert torch.equal(torch.cat([target(one[None], "ids")["ids"] for one in x]), ids)


def test_the_fit_is_a_function_of_seed_and_images_whatever_the_threads():
    threads = torch.get_num_threads()
    try:
        one = fitted()
        torch.set_num_threads(3)
        again = fitted()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), again.buffers(), strict=True))
    assert not torch.equal(one.centres, fitted(seed=1).centres)
    assert 0 < float(one.explained) < 1


def test_the_sample_is_bounded_and_takes_no_more_images_than_it_needs(monkeypatch):
    taken, sizes = [], []
    monkeypatch.setattr(
        kmeans, "cluster", lambda x, config, seed: sizes.append(len(x)) or x[: config.codes]
    )

    def stream():
        for seed in range(8):  # 64 images, as SPEC says
            taken.append(seed)
            yield images(8, seed=seed)

    for vectors, batches, size in ((64, 1, 64), (200, 4, 200), (10**5, 8, 64 * 16)):
        taken.clear()
        config = kmeans.Config(codes=8, vectors=vectors)
        kmeans.Target(config, SPEC, Frozen(Raw())).fit(stream(), 0)
        assert (len(taken), sizes[-1]) == (batches, size)


def test_features_that_are_not_finite_are_an_error():
    class Broken(Raw):
        def look(self, images, wanted, norm, layers):
            return {"patch": super().look(images, wanted, norm, layers)["patch"] / 0}

    with pytest.raises(ValueError, match="^upstream: found features that are not finite"):
        fitted(upstream=Frozen(Broken()), config=kmeans.Config(codes=8, normalise=False))


@pytest.mark.parametrize("change", [{"codes": 1}, {"vectors": 100}, {"passes": 0}, {"crop_min": 0}])
def test_bad_config_names_the_key(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: found"):
        kmeans.Config(**change)


# ---------------------------------------------------------------------------- folders, lineage


def test_a_folder_needs_nothing_else_even_where_one_looks_through_another(tmp_path):
    """kmeans of the logits' neighbours: pixels below kmeans, and a run's encoder below kmeans."""
    x = images(seed=5)
    targets.save(
        pixels.Target(pixels.Config(), SPEC), tmp_path / "pixels", "pixels", pixels.Config(), SPEC
    )
    torch.manual_seed(0)
    encoders.save(encoders.create(SPEC, "timm"), tmp_path / "run" / "encoder", SPEC)
    above = {
        "pixels": Frozen(targets.load(tmp_path / "pixels")),
        "run": Frozen(EncoderTarget.load(tmp_path / "run" / "encoder", SPEC)),
    }
    for name, upstream in above.items():
        target, folder = fitted(upstream=upstream), tmp_path / f"kmeans-{name}"
        wanted = target(x, "ids", "logits")
        targets.save(target, folder, "kmeans", CONFIG, SPEC, tmp_path / name)
        shutil.rmtree(tmp_path / name)
        found = targets.load(folder)(x, "ids", "logits")
        assert torch.equal(found["ids"], wanted["ids"])
        assert torch.equal(found["logits"], wanted["logits"])
        assert set(targets.load(folder).state_dict()) == {"centres", "explained"}
        # one that looks through this one, as a later kind might
        targets._copy(folder, tmp_path / "copy")
        assert torch.equal(targets.load(tmp_path / "copy")(x, "ids")["ids"], wanted["ids"])
        shutil.rmtree(folder / "upstream")
        with pytest.raises(FileNotFoundError, match=r"upstream: not a target"):
            targets.load(folder)
        shutil.rmtree(tmp_path / "copy")


def test_what_it_looks_through_moves_along():
    encoder = EncoderTarget(encoders.create(SPEC, "timm"), SPEC)
    fitted(upstream=Frozen(encoder)).double()
    assert {p.dtype for p in encoder.parameters()} == {torch.float64}


def test_hog_gives_codes_without_a_gradient():
    target = fitted(upstream=Frozen(hog.Target(hog.Config(), SPEC)))
    assert target(images(), "ids")["ids"].unique().numel() > 1


def test_labels_of_its_upstream_are_inherited(tmp_path):
    def labelled(**targets) -> list[str]:
        runs = {"beitv2": {"method": "beitv2", "target": "codes"}, "mae": {"method": "mae"}}
        runs["supervised"] = {"method": "supervised"}
        content = tiny_content(targets=None, grid__runs=None)
        content |= {"targets": targets, "grid": {"seeds": [0], "runs": runs}}
        plan = load(write_params(tmp_path, content), tmp_path / "results")
        return plan.jobs["report"].params["runs"]["beitv2-s0"]["label_targets"]

    assert labelled(codes={"kind": "kmeans", "upstream": "run:mae"}) == []
    assert labelled(codes={"kind": "kmeans", "upstream": "h"}, h={"kind": "hog"}) == []
    codes = {"kind": "kmeans", "upstream": "run:supervised"}
    assert labelled(codes=codes) == ["supervised"]
    teacher = {"kind": "pretrained"}
    assert labelled(codes={"kind": "kmeans", "upstream": "t"}, t=teacher) == ["t"]


# ------------------------------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan with codes of hog and of an untrained encoder, of which all jobs have run."""
    folder = tmp_path_factory.mktemp("codes")
    codes = {"kind": "kmeans", "codes": 8, "vectors": 512}
    content = tiny_content(targets=None, grid__runs=None)
    content["targets"] = {
        "hog": {},
        "of-hog": codes | {"upstream": "hog"},
        "of-run": codes | {"upstream": "run:random"},
    }
    runs = {name: {"method": "beitv2", "target": name} for name in ("of-hog", "of-run")}
    content["grid"] = {"seeds": [0], "runs": runs | {"random": {"method": "random"}}}
    content["tasks"] = {"knn": {"k": [3]}}
    made = load(write_params(folder, content), folder / "results")
    for job in made.jobs.values():
        again(made, job)
    return made


def again(plan, job) -> dict[str, str]:
    """Runs a job; the hashes of what it wrote."""
    stage = importlib.import_module(f"stages.{job.stage}")
    places = ["--params", str(plan.params_file), "--results", str(plan.results)]
    assert stage.main([*job.command.split()[3:], *places]) == 0
    return plan.manifest(job.id).outputs


@pytest.mark.parametrize("name", ["of-hog", "of-run"])
def test_the_stage_writes_the_same_bytes_twice(plan, name):
    job = plan.jobs[f"target/{name}"]
    before = plan.manifest(job.id).outputs
    above = {"of-hog": "target.json", "of-run": "encoder/model.safetensors"}[name]
    assert {f"upstream/{above}", "target.safetensors", "pictures/code_map.png"} <= set(before)
    assert again(plan, job) == before
    assert float(targets.load(job.output).explained) > 0


def test_the_page_shows_its_codes(plan):
    text = (plan.results / "report/index.html").read_text()
    assert text.count("codes of two crops agree") == 2 and "of the untrained encoder" in text


@pytest.mark.parametrize("name", ["of-hog", "of-run"])
def test_its_cost_can_be_rehearsed(plan, name, tmp_path):
    made = {id: job.output for id, job in plan.jobs.items()} | {f"target/{name}": tmp_path / "made"}
    found = Rehearsal(plan, plan.jobs[f"target/{name}"], made, tmp_path).cost()
    assert found.seconds > 0 and found.images == 48 + 16 + 16 and not found.missing

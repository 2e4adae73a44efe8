"""`synthpi explain`: what it writes, what each target means, how it samples, and how it refuses.
UMAP is replaced by two columns of the features: it has its own tests."""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import synthpi.cli.explain
import synthpi.cli.doctor
import synthpi.studies.explanation as room
import synthpi.studies.explanation_images as images_room
import synthpi.studies.explanation_page as page_room
import synthpi.studies.runs as runs_room
from synthpi.volumes.bodies import write_bodies
from synthpi.evaluate.features import extract_features
from synthpi.explain.saliency import Similarity, guided_gradcam
from synthpi.studies.explanation import explain_run
from synthpi.studies.explanation_settings import ExplainSettings
from synthpi.studies.runs import open_runs
from synthpi.explain.maps import load_map, map_scores
from synthpi.models.files import load_encoder, save_encoder
from synthpi.models.encoders import make_encoder
from synthpi.cli.app import app
from synthpi.volumes.scans import prepare_volumes

CLASSES = ["tumour", "stroma"]


@pytest.fixture(autouse=True)
def quick_map(monkeypatch):
    def fake(h, seed=0, labels=None, groups=None):
        return {
            "coords": np.asarray(h, np.float32)[:, :2],
            **map_scores(h, h[:, :2], labels, groups, 5),
            "params": {"seed": seed},
            "versions": {},
        }
    monkeypatch.setattr(page_room, "embedding_map", fake)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 tiles of two classes and four patients in train and test; two runs of a study, and a lone
    encoder"""
    folder, rng, lines = (
        tmp_path_factory.mktemp("explain"),
        np.random.default_rng(0),
        ["path,label,patient_id,split"],
    )
    (folder/"tiles").mkdir()
    for i in range(28):
        kind, patient = i % 2, i % 7
        Image.fromarray((rng.uniform(0, 160, (24, 24, 3)) + 90 * kind).astype(np.uint8)).save(
            folder / "tiles" / f"{i}.png"
        )
        lines.append(f"{i}.png,{CLASSES[kind]},p{patient},{'train' if patient > 3 else 'test'}")
    (folder/"tiles"/"tiles.csv").write_text("\n".join(lines))
    for k in range(2):
        torch.manual_seed(k)
        run = folder/f"study/runs/arm{k}-weak-seed0"
        encoder = make_encoder("resnet10_narrow")
        save_encoder(
            encoder, run / "encoder.safetensors", arm=f"arm{k}", classes=CLASSES[::-1], size=24
        )
        np.savez(
            run / "predictions.npz",
            probe_weight=rng.normal(size=(2, 128)).astype(np.float32),
            probe_bias=np.zeros(2, np.float32),
        )
    (folder/"lone").mkdir()
    (folder / "lone" / "encoder.safetensors").write_bytes(
        (folder / "study/runs/arm0-weak-seed0/encoder.safetensors").read_bytes()
    )
    return folder


CALL = ("device", "overwrite", "command", "progress")


def explain(encoders, images, out, **more):
    "An explanation with the arguments of the call beside those of the settings."
    call = {k: more.pop(k) for k in CALL if k in more}
    if "batch_size" in more: more["batch"] = more.pop("batch_size")
    return explain_run(ExplainSettings(encoders, images, **more), out, **call)


def runs(folder): return [folder/f"study/runs/arm{k}-weak-seed0" for k in range(2)]


def page(out): return (out/"report.html").read_text()


def test_two_runs_of_a_study(folder, tmp_path):
    found = explain(
        runs(folder),
        folder / "tiles",
        tmp_path / "o",
        checked=4,
        progress=False,
        command="synthpi explain ...",
    )
    assert (
        json.loads((tmp_path / "o" / "results.json").read_text())["target"]
        == found["target"]
        == "the score of the predicted class"
    )
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "figures",
        "maps.npz",
        "report.html",
        "results.json",
        "study.json",
    ]
    assert (
        found["data"]["split"] == "test"
        and found["data"]["images"] == 16
        and found["data"]["of"] == 28
    )
    assert found["coverage"].keys() == found["sanity"].keys() == found["maps"].keys() == {
        "arm0",
        "arm1",
    } and all(r["guided"] for r in found["coverage"]["arm0"])
    assert found["sanity"]["arm0"]["passes"].keys() == {
        "guided_gradcam",
        "gradcam",
        "guided_backprop",
        "gradient",
    }
    assert (
        found["maps"]["arm1"]["alignment"]["onto"] == "arm0"
        and "other_patients" in found["maps"]["arm0"]["classes"]["map"]
    )
    maps, columns = load_map(tmp_path/"o"/"maps.npz")
    assert (
        list(maps) == ["arm0", "arm1"]
        and set(columns["group"]) == {"p0", "p1", "p2", "p3"}
        and set(columns["label"]) == {0, 1}
    )
    html = page(tmp_path/"o")
    for said in (
        "What is guided",
        "Where they look",
        "Do the maps depend on what was learnt?",
        "How they arrange the images",
        "What this does not show",
        "arm0",
        "synthpi explain ...",
    ):
        assert said in html
    assert (
        (tmp_path / "o" / "figures" / "saliency.png").exists()
        and (tmp_path / "o" / "figures" / "map_groups.png").exists()
        and "http://" not in re.sub(r"http://www.w3.org\S*", "", html)
    )
    again = explain(runs(folder), folder/"tiles", tmp_path/"o", checked=4, progress=False)
    assert (
        again["maps"]["arm0"] == found["maps"]["arm0"]
        and again["sanity"]["arm1"]["curve"] == found["sanity"]["arm1"]["curve"]
    )
    with pytest.raises(ValueError, match="another study"):
        explain(runs(folder), folder / "tiles", tmp_path / "o", seed=1, progress=False)


def spy(monkeypatch):
    "What was explained: models, images, targets"
    seen, true = [], page_room.guided_gradcam
    def see(model, images, *target, batch_size=32):
        # and not the trial, which asks for nothing
        if target: seen.append((model, images, *target))
        return true(model, images, *target, batch_size=batch_size)
    monkeypatch.setattr(page_room, "guided_gradcam", see)
    return seen


def test_targets(folder, tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    explain(runs(folder)[:1], folder/"tiles", tmp_path/"class", checked=0, progress=False)
    model, images, target = seen.pop()
    assert target is None and isinstance(model[1], nn.Linear) and len(images) == 2
    with np.load(runs(folder)[0] / "predictions.npz") as arrays:
        assert np.array_equal(model[1].weight, arrays["probe_weight"])

    found = explain([folder/"lone"], folder/"tiles", tmp_path/"lone", checked=0, progress=False)
    model, images, target = seen.pop()
    assert (
        isinstance(target, Similarity)
        and target.reference.shape == (2, 128)
        and "mean of the other images" in found["target"]
        and not isinstance(model, nn.Sequential)
    )
    settings = ExplainSettings([folder/"lone"], folder/"tiles")
    sample = images_room.sample_images(open_runs([folder/"lone"]), settings)
    h = extract_features(
        load_encoder(folder / "lone" / "encoder.safetensors"), iter(sample.x.split(32))
    )
    for image, reference in zip(images, target.reference):
        i = next(i for i in range(len(h)) if torch.equal(sample.x[i], image))
        others = [j for j in range(len(h)) if sample.labels[j] == sample.labels[i] and j != i]
        assert np.allclose(reference, h[others].mean(0), atol=1e-5)

    explain(
        runs(folder)[:1],
        folder / "tiles",
        tmp_path / "component",
        target="component:2",
        checked=0,
        progress=False,
    )
    model, images, target = seen.pop()
    z = torch.from_numpy(h)
    expected = (h - h.mean(0)) @ np.linalg.svd(h - h.mean(0), full_matrices=False)[2][1]
    assert np.allclose(target(z), expected, atol=1e-4)

    explain(
        [folder / "lone"],
        folder / "tiles",
        tmp_path / "reference",
        reference=folder / "tiles" / "5.png",
        checked=3,
        progress=False,
    )
    model, images, target = seen.pop()
    alone = (
        torch.from_numpy(np.asarray(Image.open(folder / "tiles" / "5.png"))).permute(2, 0, 1)[None]
        / 255
    )
    assert torch.allclose(
        target.reference, load_encoder(folder / "lone" / "encoder.safetensors")(alone)[0], atol=1e-4
    )
    explain(
        [folder / "lone"],
        folder / "tiles",
        tmp_path / "dimension",
        target="dimension:127",
        split="train",
        checked=0,
        progress=False,
    )
    assert (
        seen.pop()[2].index == 127
        and json.loads((tmp_path / "dimension" / "results.json").read_text())["data"]["images"]
        == 12
    )


def test_images_without_classes(folder, tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    for i in range(9):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{i}.png").write_bytes((folder / "tiles" / f"{i}.png").read_bytes())
    found = explain(
        [folder / "lone"], tmp_path / "plain", tmp_path / "o", shown=3, checked=0, progress=False
    )
    assert (
        found["target"] == "principal component 1 of the embeddings of these images"
        and len(seen[0][1]) == 3
        and "classes" not in found["maps"]["lone" if "lone" in found["maps"] else "arm0"]
    )
    assert found["data"]["split"] is None
    # a probe needs no labels
    found = explain(
        runs(folder)[:1], tmp_path / "plain", tmp_path / "p", shown=2, checked=0, progress=False
    )
    assert found["target"] == "the score of the predicted class"


def test_an_encoder_that_cannot_be_guided_gets_no_map(folder, tmp_path, monkeypatch):
    class Smooth(nn.Module):
        width = 128
        def __init__(self):
            super().__init__()
            self.net, self.act, self.spec, self.about = (
                make_encoder("resnet10_narrow"),
                nn.GELU(),
                {"name": "x", "in_channels": 3, "spatial_dims": 2},
                {"arm": "smooth", "size": 24},
            )
        def forward(self, x): return self.act(self.net(x))
    true = runs_room.load_encoder
    monkeypatch.setattr(
        runs_room, "load_encoder", lambda path: Smooth().eval() if "lone" in str(path) else true(path)
    )
    seen = spy(monkeypatch)
    found = explain(
        [folder / "lone", runs(folder)[0]],
        folder / "tiles",
        tmp_path / "o",
        checked=0,
        progress=False,
    )
    assert (
        len(seen) == 1
        and found["coverage"]["smooth"][-1]["operation"] == "gelu"
        and found["maps"].keys() == {"smooth", "arm0"}
    )
    found = explain([folder/"lone"], folder/"tiles", tmp_path/"p", progress=False)
    assert (
        "target" not in found
        and len(seen) == 1
        and "None of these encoders can be guided" in page(tmp_path / "p")
        and "gelu in act" in page(tmp_path / "p")
    )


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    write_bodies(folder/"bodies", 4, "mri", (36, 28, 36), 12., test_share=.5)
    prepare_volumes(folder/"bodies", folder/"store")
    torch.manual_seed(0)
    save_encoder(
        make_encoder("resnet10_narrow", 1, 3),
        folder / "run" / "encoder.safetensors",
        arm="isimed",
        size=10,
        frame="mm_centered",
        spacing_mm=[12.0, 12.0, 12.0],
    )
    save_encoder(
        make_encoder("resnet10_narrow", 1, 3),
        folder / "coarse.safetensors",
        size=10,
        spacing_mm=[6.0, 6.0, 6.0],
    )
    return folder


def test_crops_of_prepared_volumes(volumes, tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    found = explain(
        [volumes / "run"],
        volumes / "store",
        tmp_path / "o",
        n=30,
        shown=2,
        checked=2,
        progress=False,
    )
    assert (
        seen[0][1].shape == (2, 1, 10, 10, 10)
        and found["data"]["images"] == 30
        and found["data"]["split"] == "test"
        and found["data"]["frame"] == "mm_centered"
    )
    assert (
        found["target"].startswith("principal component 1")
        and found["maps"]["isimed"]["patients"]["map"]["chance"] > 0.4
    )
    assert {p.name for p in (tmp_path / "o" / "figures").iterdir()} >= {
        "saliency_1.png",
        "saliency_2.png",
        "sanity_1.png",
        "map_position.png",
        "map_groups.png",
    }
    for kwargs, said in (
        (dict(target="similarity"), "encoders of volumes"),
        (dict(target="class"), "no predictions.npz"),
        (dict(reference=volumes / "x.png"), "for an encoder of volumes"),
    ):
        with pytest.raises(ValueError, match=said):
            explain(
                [volumes / "run"], volumes / "store", tmp_path / "p", progress=False, **kwargs
            )
    with pytest.raises(ValueError, match="no folder of prepared volumes"):
        explain([volumes / "run"], volumes / "bodies", tmp_path / "p", progress=False)
    with pytest.raises(ValueError, match="trained on voxels of"):
        explain(
            [volumes / "coarse.safetensors"], volumes / "store", tmp_path / "p", progress=False
        )
    assert not (tmp_path/"p").exists()


def ask(*args):
    said = CliRunner().invoke(app, ["explain", *map(str, args)])
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    return said


def test_from_the_command_line(folder, tmp_path):
    said = ask(
        "--encoder",
        runs(folder)[0],
        "--encoder",
        folder / "lone",
        "--images",
        folder / "tiles",
        "--out",
        tmp_path / "o",
        "--target",
        "dimension:3",
        "--checked",
        2,
    )
    assert said.exit_code == 0, said.output
    assert (
        "activations guided, 0 missed" in said.output
        and "Explained: dimension 3 of the embedding" in said.output
        and str(tmp_path / "o" / "report.html") in said.output
        and "gradient" in said.output
    )


def test_refusals(folder, volumes, tmp_path):
    lone, tiles, new = folder/"lone", folder/"tiles", tmp_path/"new"
    few = tmp_path / "few"
    few.mkdir()
    for i in range(3): (few/f"{i}.png").write_bytes((tiles/f"{i}.png").read_bytes())
    other = tmp_path/"other"
    for c in ("cat", "dog"):
        (other / c).mkdir(parents=True)
        [
            (other / c / f"{i}.png").write_bytes(
                (tiles / f"{i + 10 * (c == 'dog')}.png").read_bytes()
            )
            for i in range(5)
        ]
    untold = tmp_path / "untold.safetensors"
    save_encoder(make_encoder("resnet10_narrow"), untold)
    gray = tmp_path / "gray.safetensors"
    save_encoder(make_encoder("resnet10_narrow", 1), gray, size=24)
    wrong = tmp_path / "wrong"
    save_encoder(
        make_encoder("resnet10_narrow"), wrong / "encoder.safetensors", size=24, classes=CLASSES
    )
    np.savez(wrong / "predictions.npz", probe_weight=np.zeros((2, 5)), probe_bias=np.zeros(2))
    for args, said in (
        ((lone / "nowhere", tiles), "no encoder file at"),
        ((folder / "study", tiles), "for example .*study/runs/arm0-weak-seed0"),
        ((folder, tiles), "holds no encoder.safetensors"),
        ((lone, tmp_path / "none"), "no such file or folder"),
        ((lone, tiles, "--target", "class"), "no predictions.npz"),
        ((lone, tiles, "--target", "component:0"), "components 1 to"),
        ((lone, tiles, "--target", "component:99"), "components 1 to 15"),
        ((lone, tiles, "--target", "dimension:128"), "dimensions 0 to 127"),
        ((lone, tiles, "--target", "attention"), "'attention'"),
        ((lone, tiles, "--split", "val"), "in the split 'val'"),
        ((lone, few), "3 images were found"),
        ((runs(folder)[0], other), "cat, dog, the probe knows stroma, tumour"),
        ((untold, tiles), "--size"),
        ((gray, tiles), "encoders of 1 channels"),
        ((wrong, tiles), r"shape \(2, 5\)"),
        ((lone, tiles, "--reference", tmp_path / "no.png"), "no reference image"),
        (
            (lone, tiles, "--reference", tiles / "1.png", "--target", "dimension:1"),
            "with target dimension:1",
        ),
        ((lone, few, "--target", "similarity", "--n", 9), "3 images"),
        ((volumes / "run", tiles), "no folder of prepared volumes"),
        ((lone, tiles, "--device", "tpu"), "'tpu'"),
        ((lone, tiles, "--checked", 1), "checked=1"),
    ):
        encoder, images, *rest = args
        result = ask("--encoder", encoder, "--images", images, "--out", new, *rest)
        assert (
            result.exit_code == 2
            and re.search(said, result.output)
            and "Traceback" not in result.output
        ), (args, result.output)
        assert not new.exists()
    mixed = ask("--encoder", lone, "--encoder", volumes/"run", "--images", tiles, "--out", new)
    assert mixed.exit_code == 2 and "images and of volumes" in mixed.output
    inside = ask("--encoder", lone, "--images", tiles, "--out", tiles/"out")
    assert inside.exit_code == 2 and "lies in the input folder" in inside.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert (
        "holds 1 files or folders"
        in ask("--encoder", lone, "--images", tiles, "--out", tmp_path / "full").output
        and (tmp_path / "full" / "mine.txt").exists()
    )


def copied(run, to, **arrays):
    "A run with another probe"
    to.mkdir(parents=True)
    (to/"encoder.safetensors").write_bytes((run/"encoder.safetensors").read_bytes())
    np.savez(to/"predictions.npz", **arrays)
    return to


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_encoders_with_and_without_a_probe_are_asked_the_same(folder, tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    found = explain(
        [runs(folder)[1], folder / "lone"],
        folder / "tiles",
        tmp_path / "o",
        checked=0,
        progress=False,
    )
    assert (
        "mean of the other images" in found["target"]
        and [isinstance(t, Similarity) for *_, t in seen[-2:]] == [True] * 2
        and found["target"] in page(tmp_path / "o")
    )
    found = explain(
        [folder / "lone", runs(folder)[0]],
        folder / "tiles",
        tmp_path / "r",
        reference=folder / "tiles" / "5.png",
        checked=0,
        progress=False,
    )
    assert (
        found["target"].endswith("5.png")
        and [isinstance(t, Similarity) for *_, t in seen[-2:]] == [True] * 2
    )
    for i in range(9):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{i}.png").write_bytes((folder / "tiles" / f"{i}.png").read_bytes())
    found = explain(
        [folder / "lone", runs(folder)[0]],
        tmp_path / "plain",
        tmp_path / "p",
        shown=2,
        checked=0,
        progress=False,
    )
    assert found["target"].startswith("principal component 1") and not any(
        isinstance(m, nn.Sequential) for m, *_ in seen[-2:]
    )


def test_damaged_probes(folder, tmp_path):
    run, w, b = runs(folder)[0], np.ones((2, 128), np.float32), np.zeros(2, np.float32)
    for k, (arrays, said) in enumerate(
        (
            (dict(probe_weight=w * np.nan, probe_bias=b), "not all finite"),
            (dict(probe_weight=w, probe_bias=b + np.inf), "not all finite"),
            (dict(probe_weight=np.ones((5, 128)), probe_bias=np.ones(5)), "and 2 classes"),
            (dict(probe_weight=w, probe_bias=np.zeros(3)), "with 3 biases"),
            (dict(probe_weight=w[0], probe_bias=b), r"shape \(128,\)"),
            (dict(probe_weight=w), "damaged.*repeat the run"),
            (dict(probe_weight=np.array(["x"]), probe_bias=b), "damaged.*repeat the run"),
        )
    ):
        with pytest.raises(ValueError, match=said):
            open_runs([copied(run, tmp_path / str(k), **arrays)])
    whole = (run/"predictions.npz").read_bytes()
    for k, data in enumerate(
        (b"", whole[:200], whole[:-40], b"text", whole[:300] + bytes(200) + whole[500:])
    ):
        broken = copied(run, tmp_path / f"broken{k}")
        (broken / "predictions.npz").write_bytes(data)
        with pytest.raises(ValueError, match="predictions.npz is damaged .*: repeat the run"):
            open_runs([broken])
    np.savez(tmp_path/"broken0"/"predictions.npz", test=b)
    assert open_runs([tmp_path/"broken0"])[0].probe is None


def test_what_fails_leaves_the_old_report(folder, tmp_path, monkeypatch):
    out, args = tmp_path/"o", dict(checked=0, progress=False)
    explain([folder/"lone"], folder/"tiles", out, **args)
    before, read = content(out), []
    true = room.extract_features
    monkeypatch.setattr(room, "extract_features", lambda *a: read.append(1) or true(*a))
    with pytest.raises(ValueError, match="size=2"):
        explain([folder / "lone"], folder / "tiles", out, size=2, overwrite=True, **args)
    with pytest.raises(ValueError, match="batch=0"):
        explain([folder / "lone"], folder / "tiles", out, batch_size=0, overwrite=True, **args)
    with pytest.raises(ValueError, match="another study"):
        explain([folder / "lone"], folder / "tiles", out, seed=3, **args)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds 1 files"):
        explain([folder / "lone"], folder / "tiles", tmp_path / "full", **args)
    with pytest.raises(ValueError, match="lies in the input folder"):
        explain([folder / "lone"], folder / "tiles", folder / "tiles" / "new", **args)
    with pytest.raises(ValueError, match="is a file"):
        explain([folder / "lone"], folder / "tiles", tmp_path / "full" / "mine.txt", **args)
    assert not read and content(out) == before
    # whatever happens late
    monkeypatch.setattr(page_room, "embedding_map", lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError):
        explain([folder / "lone"], folder / "tiles", out, seed=3, overwrite=True, **args)
    with pytest.raises(ZeroDivisionError):
        explain([folder / "lone"], folder / "tiles", tmp_path / "new", **args)
    assert read and content(out) == before and not (tmp_path/"new").exists()


def test_a_study_of_another_kind_is_never_replaced(folder, tmp_path):
    for k, text in enumerate(
        ('{"synthpi": "0", "arms": ["lone"]}', '{"kind": "volumes"}', "[]", "{")
    ):
        study = tmp_path / str(k)
        study.mkdir()
        (study / "study.json").write_text(text)
        (study / "report.html").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="study of another kind"):
                explain(
                    [folder / "lone"],
                    folder / "tiles",
                    study,
                    checked=0,
                    overwrite=overwrite,
                    progress=False,
                )
        assert (
            content(study).keys() == {"study.json", "report.html"}
            and (study / "study.json").read_text() == text
        )


def test_the_report_knows_its_images(folder, tmp_path):
    (tmp_path/"tiles").mkdir()
    for p in (folder/"tiles").iterdir(): (tmp_path/"tiles"/p.name).write_bytes(p.read_bytes())
    def again(**kwargs):
        return explain(
            runs(folder)[:1],
            tmp_path / "tiles",
            tmp_path / "o",
            checked=0,
            progress=False,
            **kwargs,
        )
    again()
    (tmp_path/"o"/"figures"/"old.png").write_bytes(b"x")
    again()
    assert (tmp_path / "o" / "figures" / "saliency.png").exists() and not (
        tmp_path / "o" / "figures" / "old.png"
    ).exists()
    image, manifest = (
        (tmp_path / "tiles" / "0.png").read_bytes(),
        (tmp_path / "tiles" / "tiles.csv").read_text(),
    )
    Image.fromarray(255 - np.asarray(Image.open(tmp_path / "tiles" / "0.png"))).save(
        tmp_path / "tiles" / "0.png"
    )
    with pytest.raises(ValueError, match="another study.*images was"): again()
    (tmp_path/"tiles"/"0.png").write_bytes(image)
    (tmp_path/"tiles"/"tiles.csv").write_text(manifest.replace(",p0,", ",p9,"))
    with pytest.raises(ValueError, match="another study.*images was"): again()
    assert again(overwrite=True)["data"]["images"] == 16


def test_ctrl_c_promises_nothing(folder, tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(page_room, "align_maps", stop)
    said = ask(
        "--encoder",
        folder / "lone",
        "--images",
        folder / "tiles",
        "--out",
        tmp_path / "o",
        "--checked",
        0,
    )
    assert (
        said.exit_code == 130
        and "Nothing is kept; the same command begins anew" in said.output
        and "goes on" not in said.output
        and not (tmp_path / "o").exists()
    )


def test_maps_that_cannot_be_judged(folder, tmp_path, monkeypatch):
    import synthpi.explain.sanity
    true = synthpi.explain.sanity.map_similarity
    # Grad-CAM's maps, of one channel, vanish
    monkeypatch.setattr(
        synthpi.explain.sanity,
        "map_similarity",
        lambda a, b: true(a, b) if len(a) == 3 or np.array_equal(a, b) else (np.nan, np.nan),
    )
    said = ask(
        "--encoder",
        runs(folder)[0],
        "--images",
        folder / "tiles",
        "--out",
        tmp_path / "o",
        "--checked",
        3,
    )
    assert said.exit_code == 0 and re.search(
        r"gradcam cannot be judged, guided_backprop (passes|does not pass)", said.output
    ), said.output
    check = json.loads((tmp_path/"o"/"results.json").read_text())["sanity"]["arm0"]
    assert (
        check["passes"]["gradcam"] is None
        and check["left"]["gradcam"] is None
        and check["passes"]["gradient"] in (True, False)
        and "gradcam cannot be judged" in page(tmp_path / "o")
    )


def test_an_image_that_is_alone_in_its_class_is_left_out_and_told(folder, tmp_path):
    tiles = folder/"tiles"
    single = tmp_path / "single"
    single.mkdir()
    (single / "tiles.csv").write_text(
        "\n".join(["path,label"] + [f"{tiles}/{i}.png,{'one' if i else 'two'}" for i in range(9)])
    )
    with pytest.warns(UserWarning, match=r"1 images are the only image of their class in the sample \(two\)"):
        result = ask("--encoder", folder/"lone", "--images", single, "--out", tmp_path/"out", "--checked", 0)
    assert result.exit_code == 0, result.output

"""Embeddings of volumes: each row is the encoder's answer at its place, the file is whole or
absent, the encoder untouched; probes of them and of other features."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from synthpi.volumes.bodies import write_bodies
from synthpi.volumes.crops import crops_at, grid_crops
from synthpi.evaluate.features import extract_features
from synthpi.core.files import fingerprint
from synthpi.models.encoders import make_encoder
from synthpi.models.files import save_encoder
from synthpi.evaluate.crossval import auc_intervals, cross_validate
from synthpi.studies.embeddings import embed_run, embed_volumes
from synthpi.studies.embeddings_settings import EmbedSettings
from synthpi.studies.features import Embeddings, read_embeddings, read_features
from synthpi.studies.probe import probe_table
from synthpi.evaluate.regression import position_probe
from synthpi.volumes.store import FRAMES, VolumeStore
from synthpi.volumes.scans import prepare_volumes

class Means(nn.Module):
    "Means of the octants of a crop: where the crop is known, so are its features"
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        if self.training: self.seen += len(x)
        return nn.functional.adaptive_avg_pool3d(x, 2).flatten(1)

class Failing(Means):
    def __init__(self, after, error):
        super().__init__()
        self.after, self.error, self.done = after, error, 0
    def forward(self, x):
        self.done += len(x)
        if self.done > self.after: raise self.error
        return super().forward(x)

class Stop(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.after = after
    def forward(self, h):
        self.after -= len(h)
        if self.after < 0: raise OSError("full")
        return h

@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    return write_bodies(
        tmp_path_factory.mktemp("bodies"),
        n_subjects=6,
        shape=(40, 30, 36),
        spacing_mm=11.0,
        seed=4,
        test_share=0.5,
    )

@pytest.fixture(scope="module")
def store(bodies, tmp_path_factory):
    return prepare_volumes(bodies, tmp_path_factory.mktemp("store") / "s")

def embed(store, out, encoder=None, size=8, **kw):
    return embed_volumes(encoder or Means(), store, out, size, **{"progress": False, **kw})

# ---- what is written

@pytest.mark.parametrize(
    "size, stride, tissue",
    [(8, None, 0.0), ((6, 7, 8), 5, 0.3), (9, (9, 4, 6), 0.0), (40, 20, 0.0)],
)
def test_each_row_is_the_crop_at_its_place(store, tmp_path, size, stride, tissue):
    found = read_embeddings(
        embed(
            store,
            tmp_path / "e.parquet",
            size=size,
            stride=stride,
            tissue=tissue,
            batch=17,
            labels=("any", "center"),
        )
    )
    sides, row = np.broadcast_to(size, 3), 0
    for i, name in enumerate(store.names):
        grid = [
            {k: v.numpy() for k, v in b.items()}
            for b in grid_crops(store, i, size, stride, tissue=tissue, labels=True)
        ]
        for b in grid:
            n = len(b["crop"])
            here = slice(row, row + n)
            assert (
                np.allclose(found.h[here], Means()(torch.from_numpy(b["crop"])), atol=1e-6)
                and np.allclose(found.center[here], b["center_mm"], atol=1e-3)
                and np.array_equal(found.table.tissue[here], b["tissue"])
            )
            assert (
                (found.volume[here] == name).all()
                and (found.subject[here] == store.subjects[i]).all()
                and (found.split[here] == store.splits[i]).all()
            )
            assert np.array_equal(
                found.labels.label_center[here],
                b["label"][:, sides[0] // 2, sides[1] // 2, sides[2] // 2],
            )
            for r in found.facts["values"]:
                assert np.array_equal(
                    found.labels[f"label_{r}"][here], (b["label"] == r).sum((1, 2, 3))
                )
            row += n
        assert np.allclose(
            store.position(i, found.start[found.volume == name] + (sides - 1) / 2),
            found.center[found.volume == name],
        )
    assert row == len(found)
    k = (
        np.random.default_rng(0).choice(len(found), 12, replace=False)
        if len(found) > 12
        else range(len(found))
    )
    for j in k:
        i = store.names.index(found.volume[j])
        crop = crops_at(store, i, found.center[[j]], size)
        assert np.allclose(found.h[j], Means()(crop["crop"])[0], atol=1e-6)
        x, y, z = found.start[j]
        if min(x, y, z) >= 0 and (found.start[j] + sides <= store.items[i]["shape"]).all():
            assert np.allclose(
                crop["crop"][0, 0],
                store.array(i)[x : x + sides[0], y : y + sides[1], z : z + sides[2]] * store.scale,
                atol=1e-6,
            )

def test_it_agrees_with_extract_features(store, tmp_path):
    "Which takes an iterable of batches of crops as well, and no batch size changes an embedding"
    torch.manual_seed(0)
    encoder = make_encoder("resnet10_narrow", 1, 3)
    a = read_embeddings(embed(store, tmp_path/"a.parquet", encoder, 12, volumes=[4], batch=64))
    b = read_embeddings(embed(store, tmp_path/"b.parquet", encoder, 12, volumes=[4], batch=5))
    h = extract_features(encoder, (x["crop"] for x in grid_crops(store, 4, 12, batch=20)))
    assert (
        a.h.shape == (len(h), 128)
        and a.h.dtype == np.float32
        and np.allclose(a.h, h, atol=1e-5)
        and np.allclose(a.h, b.h, atol=1e-5)
        and a.h.std(0).max() > 1e-3
    )

@pytest.mark.parametrize("frame", FRAMES)
def test_frames(store, tmp_path, frame):
    found = read_embeddings(embed(store, tmp_path/"e.parquet", frame=frame, volumes=[1, 3]))
    assert (
        found.axes == ([f"{a}_mm" for a in "xyz"] if "mm" in frame else list("xyz"))
        and found.facts["frame"] == frame
    )
    expected = np.concatenate(
        [
            store.position(i, found.start[found.volume == store.names[i]] + 3.5, frame)
            for i in (1, 3)
        ]
    )
    assert np.array_equal(found.center, expected)
    pd.testing.assert_frame_equal(
        found.labels, pd.DataFrame(index=range(len(found))), check_column_type=False
    )

@pytest.mark.parametrize(
    "labels, columns",
    [
        (None, []),
        ("center", ["label_center"]),
        ("any", [f"label_{r}" for r in range(1, 14)]),
        (["any", "center"], ["label_center", *(f"label_{r}" for r in range(1, 14))]),
    ],
)
def test_labels_that_were_asked_for(store, tmp_path, labels, columns):
    found = read_embeddings(embed(store, tmp_path/"e.parquet", volumes=[2], labels=labels))
    assert list(found.labels) == columns

def test_what_the_file_says(store, tmp_path):
    encoder = make_encoder("resnet10_narrow", 1, 3)
    path = embed(store, tmp_path/"e.parquet", encoder, 12, stride=9, volumes=[5, 0], labels="any")
    facts = read_embeddings(path).facts
    assert (
        facts["encoder"] == fingerprint(encoder)
        and facts["architecture"] == encoder.spec
        and facts["size"] == [12] * 3
        and facts["stride"] == [9] * 3
        and facts["format"] == "synthpi-embeddings-1"
    )
    assert (
        facts["volumes"] == {store.names[i]: store.items[i]["key"] for i in (0, 5)}
        and facts["preparation"] == json.loads(json.dumps(store.settings))
        and len(facts["store"]) == 64
    )
    schema = pq.read_schema(path)
    assert (
        schema.field("embedding").type == pa.list_(pa.float32(), 128)
        and list(schema.metadata) == [b"synthpi"]
        and str(store.folder) not in schema.metadata[b"synthpi"].decode()
    )
    assert pq.ParquetFile(path).num_row_groups == 2 and [
        pq.ParquetFile(path).read_row_group(k)["volume"].unique().to_pylist() for k in (0, 1)
    ] == [[store.names[5]], [store.names[0]]]
    other = read_embeddings(
        embed(store, tmp_path / "o.parquet", make_encoder("resnet10_narrow", 1, 3), 12, volumes=[0])
    ).facts
    assert other["encoder"] != facts["encoder"] and other["store"] != facts["store"]

def test_the_same_run_gives_the_same_bytes(store, tmp_path):
    assert (
        embed(store, tmp_path / "a.parquet", labels="any").read_bytes()
        == embed(store, tmp_path / "b.parquet", labels="any").read_bytes()
    )

@pytest.mark.parametrize("frame, size", [(None, None), ("mm_centered", 9)])
def test_from_files_what_is_left_open_is_that_of_training(store, tmp_path, frame, size):
    net = make_encoder("resnet10_narrow", 1, 3)
    about = {"size": [8, 8, 8], "frame": "mm_local", "spacing_mm": [11., 11, 11]}
    save_encoder(net, tmp_path/"e.safetensors", **about)
    asked = EmbedSettings(tmp_path/"e.safetensors", store.folder, size, split="test", frame=frame)
    found = read_embeddings(embed_run(asked, tmp_path/"e.parquet", progress=False))
    used = {"size": size or 8, "frame": frame or "mm_local", "volumes": store.indices("test")}
    same = read_embeddings(embed(store, tmp_path/"s.parquet", net.eval(), **used))
    assert np.array_equal(found.h, same.h) and found.facts == same.facts

def test_from_files_crops_and_voxels_have_to_be_known(store, tmp_path):
    save_encoder(make_encoder("resnet10_narrow", 1, 3), tmp_path/"e.safetensors")
    asked = EmbedSettings(tmp_path/"e.safetensors", store.folder)
    with pytest.raises(ValueError, match="how large the crops .* were: give --size"):
        embed_run(asked, tmp_path/"e.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]

# ---- whole or not there, encoder untouched

@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 30, 120])
def test_a_run_that_fails_leaves_nothing_or_what_was_there(store, tmp_path, error, after):
    with pytest.raises(type(error)):
        embed(store, tmp_path / "e.parquet", Failing(after, error), batch=8)
    assert not list(tmp_path.iterdir())
    old = embed(store, tmp_path/"e.parquet").read_bytes()
    with pytest.raises(type(error)):
        embed(store, tmp_path / "e.parquet", Failing(after, error), batch=8, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["e.parquet"] and (
        tmp_path / "e.parquet"
    ).read_bytes() == old

def test_a_damaged_store_is_not_embedded(store, tmp_path):
    damaged = Path(shutil.copytree(store.folder, tmp_path/"store"))
    array = next(iter(sorted((damaged/"items").iterdir())))/"image.npy"
    content = bytearray(array.read_bytes())
    content[-7] ^= 1
    array.write_bytes(content)
    with pytest.raises(ValueError, match="1 volumes are damaged"):
        embed(VolumeStore(damaged), tmp_path/"e.parquet")
    embed(VolumeStore(damaged), tmp_path/"e.parquet", volumes=[1])      # the others can be used

@pytest.mark.parametrize("fails", [False, True])
def test_the_encoder_is_left_as_it_was(store, tmp_path, fails):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv3d(1, 4, 3),
        nn.BatchNorm3d(4),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        *([Stop(40)] if fails else []),
    )
    encoder[2].eval()
    encoder[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in encoder.modules()]
    if fails:
        with pytest.raises(OSError): embed(store, tmp_path/"e.parquet", encoder, batch=16)
    else: embed(store, tmp_path/"e.parquet", encoder, batch=16)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()) and flags == [
        (m.training, [p.requires_grad for p in m.parameters()]) for m in encoder.modules()
    ]

def test_a_training_mode_encoder_embeds_in_evaluation_mode(store, tmp_path):
    encoder = nn.Sequential(nn.BatchNorm3d(1), nn.Dropout(.9), Means()).train()
    found = read_embeddings(embed(store, tmp_path/"e.parquet", encoder, volumes=[0]))
    assert (
        np.allclose(
            found.h, read_embeddings(embed(store, tmp_path / "f.parquet", volumes=[0])).h, atol=1e-4
        )
        and encoder[2].seen == 0
    )

@pytest.mark.parametrize(
    "encoder, message",
    [
        (nn.Flatten(0), r"gave shape \(\d+,\)"),
        (nn.Flatten(2), r"gave shape \(\d+, 1, 512\)"),
        (
            nn.Sequential(nn.Flatten(), nn.LogSigmoid(), nn.Threshold(0.0, float("nan"))),
            "embeddings of body_000 are not finite",
        ),
    ],
)
def test_encoders_that_give_no_embeddings(store, tmp_path, encoder, message):
    with pytest.raises(ValueError, match=message): embed(store, tmp_path/"e.parquet", encoder)
    assert not list(tmp_path.iterdir())

def test_volumes_without_crops_are_told(store, tmp_path):
    with pytest.raises(
        ValueError, match="no crop of body_000, .*body_005 has a share"
    ):
        embed(store, tmp_path / "e.parquet", tissue=1.0)
    assert not list(tmp_path.iterdir())
    most = [max(float(b["tissue"].max()) for b in grid_crops(store, i, 14)) for i in range(6)]
    with pytest.warns(
        UserWarning, match=r"1 of 6 volumes have no crop.*" + store.names[int(np.argmin(most))]
    ):
        path = embed(store, tmp_path / "e.parquet", size=14, tissue=min(most))
    assert set(read_embeddings(path).volume) == set(store.names) - {
        store.names[int(np.argmin(most))]
    }

@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"encoder": "encoder.safetensors"}, TypeError, "open a file with load_encoder"),
        ({"encoder": make_encoder("resnet10_narrow")}, ValueError, "3 channels in 2 dimensions"),
        ({"out": "e.csv"}, ValueError, "ends in .parquet"),
        ({"size": 0}, ValueError, "size=0"),
        ({"stride": 0}, ValueError, "size=0"),
        ({"volumes": []}, ValueError, "one at least"),
        ({"volumes": [1, 1]}, ValueError, "each once"),
        ({"volumes": [6]}, IndexError, "volume 6 of 6"),
        ({"volumes": [-1]}, IndexError, "volume -1"),
        ({"frame": "mm"}, ValueError, "frame 'mm'"),
        ({"labels": "all"}, ValueError, "labels='all'"),
        ({"labels": ["center", "some"]}, ValueError, "some"),
        ({"device": "tpu"}, ValueError, "device 'tpu'"),
        ({"batch": 0}, ValueError, "batch=0"),
    ],
)
def test_wrong_arguments(store, tmp_path, wrong, error, message):
    args = {
        "encoder": Failing(0, AssertionError("computed")),
        "store": store,
        "out": "e.parquet",
        "size": 8,
        "progress": False,
        **wrong,
    }
    with pytest.raises(error, match=message): embed_volumes(**{**args, "out": tmp_path/args["out"]})
    assert not list(tmp_path.iterdir())

def test_a_file_that_is_there_and_volumes_without_labels(bodies, store, tmp_path):
    path = embed(store, tmp_path/"e.parquet", volumes=[0])
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        embed(store, path, Failing(0, AssertionError("computed")))
    assert len(set(read_embeddings(embed(store, path, volumes=[0, 1], overwrite=True)).volume)) == 2
    bare = prepare_volumes(
        [
            {"name": "body_000", "image": "body_000.nii.gz"},
            {"name": "body_001", "image": "body_001.nii.gz", "label": "body_001_label.nii.gz"},
        ],
        tmp_path / "s",
        root=bodies,
    )
    with pytest.raises(ValueError, match="labels='center' and body_000 have none"):
        embed(bare, tmp_path / "f.parquet", labels="center")
    assert read_embeddings(embed(bare, tmp_path/"f.parquet")).split.tolist()[0] == ""
    assert embed(bare, tmp_path/"g.parquet", volumes=[1], labels="center").exists()

# ---- reading

def test_some_volumes(store, tmp_path):
    path = embed(store, tmp_path/"e.parquet", labels="center")
    whole = read_embeddings(path)
    some = read_embeddings(path, [store.names[4], store.names[1]])
    rows = np.isin(whole.volume, [store.names[4], store.names[1]])
    assert (
        np.array_equal(some.h, whole.h[rows])
        and np.array_equal(some.center, whole.center[rows])
        and np.array_equal(some.labels, whole.labels[rows])
        and np.array_equal(some.start, whole.start[rows])
    )
    assert np.array_equal(
        read_embeddings(str(path), store.names[4]).h, whole.h[whole.volume == store.names[4]]
    ) and "x_mm" in repr(some)
    with pytest.raises(ValueError, match="has no crops of nobody; it was made of body_000"):
        read_embeddings(path, ["body_001", "nobody"])
    with pytest.raises(ValueError, match=r"volumes=\[\]"): read_embeddings(path, [])

def test_damaged_files(store, tmp_path):
    "Four bytes changed anywhere: refused, or without consequence, such as in a statistic of a page"
    path = embed(store, tmp_path/"e.parquet", labels="any")
    raw, good, refused = path.read_bytes(), read_embeddings(path), 0
    for at in np.random.default_rng(0).integers(0, len(raw) - 4, 60):
        path.write_bytes(raw[:at] + bytes(b ^ 0x5a for b in raw[at:at + 4]) + raw[at + 4:])
        try:
            found = read_embeddings(path)
        except ValueError as error:
            assert re.search(
                "no Parquet file, or a damaged one|was not written by embed_volumes", str(error)
            )
            refused += 1
        else:
            assert (
                np.array_equal(found.h, good.h)
                and found.table.equals(good.table)
                and found.facts == good.facts
            )
    assert refused > 45

def test_files_that_are_cut_or_others(store, tmp_path):
    path = embed(store, tmp_path/"e.parquet")
    (tmp_path/"cut.parquet").write_bytes(path.read_bytes()[:-100])
    (tmp_path/"text.parquet").write_text("hello")
    pd.DataFrame({"embedding": [[1., 2], [3, 4]]}).to_parquet(tmp_path/"own.parquet")
    for name, message in (
        ("cut", "damaged"),
        ("text", "damaged"),
        ("own", "was not written by embed_volumes.*read_features reads features of your own"),
    ):
        with pytest.raises(ValueError, match=message):
            read_embeddings(tmp_path / f"{name}.parquet")
    with pytest.raises(FileNotFoundError, match="no file"): read_embeddings(tmp_path/"none.parquet")
    assert (
        read_features(tmp_path / "own.parquet").h.tolist() == [[1, 2], [3, 4]]
        and read_features(tmp_path / "own.parquet").facts == {}
        and read_features(path).facts["size"] == [8, 8, 8]
    )

@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.int32()),
        "csv",
    ],
)
def test_features_of_others(tmp_path, kind):
    h = np.random.default_rng(0).integers(-9, 9, (7, 3))
    columns = {
        "patient": ["01", "1", "2", "2", "3", "3", "4"],
        "x": np.arange(7.0),
        "y": np.arange(7.0) * 2,
        "label": list("ababbab"),
    }
    if kind == "csv":
        path = tmp_path/"f.csv"
        pd.DataFrame({**columns, "embedding": [json.dumps(r.tolist()) for r in h]}).to_csv(
            path, index=False
        )
    else:
        path = tmp_path/"f.parquet"
        pq.write_table(pa.table({**columns, "embedding": pa.array(h.tolist(), kind)}), path)
    found = read_features(path)
    assert (
        np.array_equal(found.h, h)
        and found.h.dtype == np.float32
        and len(found) == 7
        and np.array_equal(found.center, np.stack([columns["x"], columns["y"]], 1))
    )
    assert (
        found.column("patient").tolist() == columns["patient"]
        and found.column("label").tolist() == columns["label"]
    )

@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n", "no column embedding; it has a, b"),
        ('embedding,y\n"[1, 2]",0\n"[1]",1\n', "lists of the lengths"),
        ("embedding\nabc\n", "is not lists of numbers"),
        ('embedding\n"[""a""]"\n', "expected lists of numbers"),
        ("embedding,y\n", "0 rows"),
        ("embedding\n1.5\n", "lists of numbers"),
        ('embedding\n"[1, null]"\n', "missing values"),
    ],
)
def test_tables_that_are_no_features(tmp_path, text, message):
    (tmp_path/"f.csv").write_text(text)
    with pytest.raises(ValueError, match=message): read_features(tmp_path/"f.csv")

def test_columns_that_are_no_features(tmp_path):
    for k, (column, message) in enumerate(
        (
            (pa.array([[1.0, 2], None]), "missing values"),
            (pa.array([[1.0, 2], [1.0]]), "lengths"),
            (pa.array([1.0, 2]), "of type double"),
            (pa.array([["a"], ["b"]]), "of type list"),
            (pa.array([[], []], pa.list_(pa.float32())), "lengths"),
        )
    ):
        pq.write_table(pa.table({"embedding": column, "z": [1, 2]}), tmp_path / f"{k}.parquet")
        with pytest.raises(ValueError, match=message):
            read_features(tmp_path / f"{k}.parquet")
    pq.write_table(pa.table({"z": [1, 2]}), tmp_path/"z.parquet")
    with pytest.raises(ValueError, match="no column embedding; it has z"):
        read_features(tmp_path / "z.parquet")
    for name in ("n.parquet", "n.csv"):
        with pytest.raises(FileNotFoundError, match="no file"): read_features(tmp_path/name)

# ---- probes

@pytest.fixture(scope="module")
def embedded(store, tmp_path_factory):
    return embed(
        store, tmp_path_factory.mktemp("probe") / "e.parquet", labels=("center", "any"), tissue=0.1
    )

def with_columns(found, **columns):
    return Embeddings(found.h, found.table.assign(**columns), found.facts)

def test_position_is_probed_from_train_to_test(embedded):
    found, table = read_embeddings(embedded), probe_table(embedded)
    train, test = found.split == "train", found.split == "test"
    probe = position_probe(
        found.h[train],
        found.center[train],
        found.subject[train],
        found.h[test],
        found.center[test],
        found.subject[test],
    )
    assert table.metric.tolist() == ["R2", "mean absolute error, mm"] and table[
        ["mean", "low", "high"]
    ].to_numpy().tolist() == [[s["mean"], *s["ci"]] for s in (probe.r2, probe.mae_mm)]
    assert (
        table["mean"][0] > 0.1
        and table.rows.tolist() == [test.sum()] * 2
        and table.groups.tolist() == [3, 3]
        and table.how[0] == "fitted on train, scored on test"
    )
    assert probe_table(found, "position").equals(table)

@pytest.mark.parametrize("splits", [[""]*6, ["test"]*6, ["a", "b"]*3])
def test_without_splits_the_subjects_are_halved(embedded, splits):
    found = read_embeddings(embedded)
    found = with_columns(
        found, split=np.array(splits)[np.unique(found.volume, return_inverse=True)[1]]
    )
    tables = [probe_table(found, seed=s) for s in range(6)]
    assert (
        all(
            t.how[0] == "fitted on half of the groups, scored on the others" and t.groups[0] == 3
            for t in tables
        )
        and len({t.rows[0] for t in tables}) > 1
        and tables[0].equals(probe_table(found, seed=0))
    )

def test_regions_are_probed_on_the_test_split(embedded):
    found, table = read_embeddings(embedded), probe_table(embedded, "labels")
    test = found.split == "test"
    assert (
        table.target.tolist() == [f"centre in {r}" for r in range(1, 14)]
        and (table.rows == test.sum()).all()
        and table.how[2].startswith("3 of 3 folds of the split test")
    )
    y = found.labels.label_center.to_numpy()[test, None] == [2, 3, 9]
    fit = cross_validate(found.h[test], y, found.subject[test], 3, inner=2)
    got = table[table.target.isin(["centre in 2", "centre in 3", "centre in 9"])]
    assert (
        np.allclose(
            got[["mean", "low", "high"]],
            [[t["mean"], *t["ci"]] for t in auc_intervals(fit)["per_target"]],
            atol=1e-4,
        )
        and got.positive.tolist() == y.sum(0).tolist()
    )
    assert got["mean"].max() > .8

def test_one_region_all_rows_and_counts_of_voxels(embedded):
    found = read_embeddings(embedded)
    one = probe_table(found, 9, split="all")
    assert (
        one.target.tolist() == ["centre in 9"]
        and one.rows[0] == len(found)
        and one.groups[0] == 6
        and one.how[0]
        == f"{len(set(found.subject[found.labels.label_center == 9]))} of 6 folds of all rows"
        and one.positive[0] == (found.labels.label_center == 9).sum()
    )
    held = probe_table(
        Embeddings(found.h, found.table.drop(columns="label_center"), found.facts),
        "3",
        split="train",
        folds=2,
    )
    train = found.split == "train"
    assert (
        held.target[0] == "voxels of 3"
        and held.rows[0] == train.sum()
        and held.positive[0] == (found.labels.label_3[train] > 0).sum()
        and held.how[0] == "3 of 3 folds of the split train"
    )
    assert held["mean"][0] > .7 and one["mean"][0] > .7

def test_a_region_in_one_subject_is_told_and_not_scored(embedded):
    found = read_embeddings(embedded)
    found.table.loc[found.subject != "body_004", "label_center"] = found.table.label_center.where(
        found.table.label_center != 9, 0
    )
    table = probe_table(found, "labels").set_index("target")
    assert (
        np.isnan(table.loc["centre in 9", ["mean", "low", "high"]].astype(float)).all()
        and table.how["centre in 9"].startswith("0 of 3 folds")
        and np.isfinite(table["mean"]["centre in 3"])
    )
    with pytest.raises(
        ValueError,
        match="centre in 9: expected rows that are and rows that are not, each in two groups",
    ):
        probe_table(found, 9)

def test_features_that_know_nothing_are_not_said_to(embedded):
    found = read_embeddings(embedded)
    none = Embeddings(
        np.random.default_rng(0).normal(size=found.h.shape).astype(np.float32),
        found.table,
        found.facts,
    )
    assert (
        probe_table(none)["mean"][0] < 0.02
        and abs(probe_table(none, "labels", split="all")["mean"].mean() - 0.5) < 0.06
    )

def tiles(path, n_classes=2, n=240, groups=12, seed=0):
    rng = np.random.default_rng(seed)
    label, patient = rng.integers(0, n_classes, n), np.repeat(np.arange(groups), n//groups)
    h = np.concatenate(
        [np.eye(n_classes)[label] * 1.5 + rng.normal(size=(n, n_classes)), rng.normal(size=(n, 3))],
        1,
    ).round(4)
    columns = {
        "label": np.array(["healthy", "stroma", "tumour"])[label],
        "grade": label,
        "subject": [f"p{k}" for k in patient],
        "x": rng.uniform(0, 900, n),
        "y": rng.uniform(0, 900, n),
    }
    if path.suffix == ".csv":
        pd.DataFrame({**columns, "embedding": [json.dumps(r.tolist()) for r in h]}).to_csv(
            path, index=False
        )
    else:
        pq.write_table(pa.table({**columns, "embedding": h.tolist()}), path)
    return path, h, label, patient

@pytest.mark.parametrize("name", ["f.csv", "f.parquet"])
def test_tiles_of_others(tmp_path, name):
    path, h, label, patient = tiles(tmp_path/name)
    table = probe_table(path, "label")
    fit = cross_validate(
        h.astype(np.float32), label[:, None] == [1], np.array([f"p{k}" for k in patient]), 10
    )
    assert (
        table.target.tolist() == ["label = stroma"]
        and table["mean"][0] == pytest.approx(fit.mean, abs=1e-4)
        and table["mean"][0] > 0.8
        and table.low[0] < table["mean"][0] < table.high[0]
    )
    assert (
        table.rows[0] == 240
        and table.groups[0] == 12
        and table.positive[0] == label.sum()
        and table.how[0] == "10 of 10 folds of all rows"
    )
    assert probe_table(path, "grade").target[0] == "grade = 1" and np.allclose(
        probe_table(path, "grade")["mean"], table["mean"]
    )
    with pytest.raises(ValueError, match="no column 'patient'; there are label, grade, subject"):
        probe_table(path, "label", group="patient")
    position = probe_table(path, "position")
    assert (
        position["mean"][0] < 0.05
        and position.metric[1] == "mean absolute error, units of the file"
        and position.rows[0] == 120
    )

def test_several_classes_are_asked_one_by_one(tmp_path):
    table = probe_table(tiles(tmp_path/"f.csv", 3)[0], "label", folds=4)
    assert (
        table.target.tolist() == ["label = healthy", "label = stroma", "label = tumour"]
        and (table["mean"] > 0.7).all()
        and table.positive.sum() == 240
        and (table.how == "4 of 4 folds of all rows").all()
    )

@pytest.mark.parametrize(
    "kw, message",
    [
        (
            {"target": "kidney"},
            "expected 'position', 'labels' for all regions, or one of the regions 1, 2",
        ),
        ({"target": 77}, "'77'"),
        ({"folds": 1}, "folds=1"),
        ({"target": 3, "split": "val"}, "no row is in the split 'val'; there are test, train"),
        ({"group": "nobody"}, "no column 'nobody'"),
        ({"target": 3, "group": "split", "split": "all"}, "2 groups"),
        ({"target": "tissue"}, "different values in"),
        ({"group": "volume", "target": 3, "split": "all", "folds": 2}, None),
    ],
)
def test_questions_that_cannot_be_asked(embedded, kw, message):
    if message is None: assert probe_table(embedded, **kw).how[0] == "2 of 2 folds of all rows"
    else:
        with pytest.raises(ValueError, match=message): probe_table(embedded, **kw)

def test_files_without_labels_positions_or_values(store, tmp_path):
    bare = embed(store, tmp_path/"e.parquet")
    with pytest.raises(ValueError, match="have no labels: embed again with labels="):
        probe_table(bare, "labels")
    for columns, target, message in (
        ({"label": ["a", "b"] * 3}, "position", "there are no positions"),
        ({"label": ["a", "", "b"] * 2}, "label", "2 of 6 rows have no label"),
        ({"label": ["a"] * 6}, "label", "1 different values"),
        ({"x": ["1", "b"] * 3, "y": [2] * 6}, "position", "are not all numbers"),
        ({"subject": ["a"] * 6, "x": range(6), "y": range(6)}, "position", "1 groups"),
    ):
        pd.DataFrame(
            {
                "subject": list("abcdef"),
                **columns,
                "embedding": [json.dumps([k, 1]) for k in range(6)],
            }
        ).to_csv(tmp_path / "f.csv", index=False)
        with pytest.raises(ValueError, match=message):
            probe_table(tmp_path / "f.csv", target)
    found = read_embeddings(bare)
    found.h[3] = np.nan
    with pytest.raises(ValueError, match="not finite: rows 3"): probe_table(found)

"""The embedded data is hard in the right way: colour does not give the class away, form does, and a
generator can see the nuclei."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from synthpi.models.encoders import make_encoder
from synthpi.data.phantoms import (
    CLASSES,
    Lab,
    _adipose,
    _grid,
    _patient,
    _tile,
    pair_phantoms,
    tissue_phantoms,
    write_tissue,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other spin: on two busy cores the small network took 535 s with
    two threads, 26 s with one"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def tissue():
    "Training and test patients at the size of the demo"
    return tissue_phantoms(200, 10, prefix="train-patient"), tissue_phantoms(
        60, 6, prefix="test-patient"
    )

def probe(features, tissue):
    train, test = tissue
    return (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        .fit(features(train.image), train.label)
        .score(features(test.image), test.label)
    )

def marginal(images):
    return np.stack(
        [[np.histogram(x[..., c], 8, (0, 256))[0] for c in range(3)] for x in images]
    ).reshape(len(images), -1)

def joint(images):
    code = (images//64).astype(int) @ [16, 4, 1]
    return np.stack([np.bincount(x.ravel(), minlength=64) for x in code])

def tensor(images): return torch.tensor(images).permute(0, 3, 1, 2).float()/255

@torch.no_grad()
def encode(encoder, images):
    encoder.eval()
    return torch.cat(
        [encoder(tensor(x)) for x in np.array_split(images, -(-len(images) // 256))]
    ).numpy()

def random_encoder(images, calibrated):
    torch.manual_seed(0)
    encoder = make_encoder("resnet10_narrow")
    # BatchNorm statistics of these very images, the kinder setting
    if calibrated:
        with torch.no_grad():
            [encoder.train()(tensor(images[i :: len(images) // 256])) for i in range(8)]
    return encode(encoder, images)

@pytest.mark.slow
@pytest.mark.parametrize(
    "name, features, limit",
    [
        ("mean RGB", lambda x: x.mean((1, 2)), 0.45),
        ("marginal histogram", marginal, 0.65),
        ("joint histogram", joint, 0.65),
        ("random encoder", lambda x: random_encoder(x, False), 0.65),
        ("random encoder, calibrated", lambda x: random_encoder(x, True), 0.65),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_colour_does_not_give_the_class_away(tissue, name, features, limit):
    accuracy = probe(features, tissue)
    assert 1.5/9 < accuracy <= limit, f"{name}: {accuracy:.3f}"

def augment(x):
    "Flips and quarter turns of the batch, contrast, exposure and white balance of each tile"
    gain, balance, contrast = (
        1 + s * (2 * torch.rand(len(x), c, 1, 1) - 1) for s, c in ((0.4, 1), (0.2, 3), (0.4, 1))
    )
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (((x - mean)*contrast + mean)*gain*balance).clamp(0, 1)
    x = torch.rot90(x, int(torch.randint(4, ())), (2, 3))
    return x.flip(3) if torch.rand(()) < .5 else x

@pytest.mark.slow
def test_form_gives_the_class_away(tissue):
    train, test = tissue
    torch.manual_seed(0)
    encoder, head = make_encoder("resnet10_narrow"), nn.Linear(128, 9)
    x, y, steps = tensor(train.image), torch.tensor(train.label), 300
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *head.parameters()], 3e-3, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=.2)
    order = torch.cat([torch.randperm(len(x)) for _ in range(-(-steps*64//len(x)))])
    for i in order.split(64)[:steps]:
        loss = F.cross_entropy(head(encoder(augment(x[i]))), y[i], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (
            head(torch.tensor(encode(encoder, test.image))).argmax(1).numpy() == test.label
        ).mean()
    assert accuracy >= .85, f"{accuracy:.3f}"

def test_nuclei_are_where_haematoxylin_is():
    """In a tile of the plainest laboratory, with one threshold for all tiles, darkness in red
    recovers the mask"""
    plain = Lab(
        turn=0,
        amount_patient=0,
        amount_tile=0,
        exposure_patient=0,
        exposure_tile=0,
        balance_patient=0,
        balance_tile=0,
        veil=0,
        blur_um=(0.01, 0.02),
        noise=(0, 0),
    )
    patient = _patient(np.random.default_rng(0), plain)
    for name in ("LYM", "MUS", "NORM", "STR", "TUM"):
        tiles = [_tile(np.random.default_rng(k), patient, plain, [name], 96, .5) for k in range(8)]
        image, mask = (np.stack(x) for x in zip(*tiles))
        guess, truth = image[..., 0] < 140, mask > 0
        assert 2*(guess & truth).sum()/(guess.sum() + truth.sum()) > .9, name

def test_sizes_are_in_micrometres():
    "Halving the pixel at the same field of view leaves the nuclear area"
    area = [
        (tissue_phantoms(12, 3, size, um).mask > 0).reshape(9, -1).mean(1)
        for size, um in ((64, 0.75), (128, 0.375))
    ]
    assert np.allclose(*area, atol=.06) and np.corrcoef(*area)[0, 1] > .97

def test_splits_and_pair_set(tmp_path):
    summary = write_tissue(
        tmp_path,
        {"train": 4, "val": 2, "test": 2},
        {"train": 2, "val": 1, "test": 2},
        n_pairs=6,
        n_pair_patients=3,
    )
    assert (
        summary["tiles"]
        == 9 * 8
        == len(list((tmp_path / "tiles").rglob("*.png")))
        == len(list((tmp_path / "masks").rglob("*.png")))
    )
    assert (
        len(list((tmp_path / "pairs" / "image").iterdir()))
        == len(list((tmp_path / "pairs" / "privileged").iterdir()))
        == 6
    )
    assert {p.name for p in (tmp_path/"tiles"/"test").iterdir()} == set(CLASSES)
    pairs = pair_phantoms(36, 12)
    assert set(np.unique(pairs.mask)) == {0, 255} and .1 < (pairs.mask > 0).mean() < .5
    with pytest.raises(ValueError, match="splits"):
        write_tissue(tmp_path, {"train": 4}, {"test": 2})

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size, um", [(64, .5), (32, .5), (16, .5), (48, .25)])
def test_tiles_smaller_than_a_cell_or_a_gland_are_drawn(size, um):
    pairs, tiles = pair_phantoms(24, 8, size=size, um_per_px=um), tissue_phantoms(3, 3, size, um)
    assert pairs.image.shape == (24, size, size, 3) and tiles.image.shape == (27, size, size, 3)

def test_a_tile_inside_one_fat_cell_has_no_wall():
    """Of many tiles of 12 um, most lie inside one cell: flat and without nuclei; some hold a wall,
    which is dark"""
    sheets = [_adipose(np.random.default_rng(k), _grid(24, .5), 1.) for k in range(60)]
    spread = np.array([s.eosin.max() - s.eosin.min() for s in sheets])
    assert (spread < 1e-3).sum() > 15 and (spread > .2).sum() > 5
    assert all(not len(s.nuclei) for s, flat in zip(sheets, spread < 1e-3) if flat)

"What only a GPU can show: `pytest --gpu tests/test_gpu.py`. Everything else runs anywhere."
import gc

import numpy as np
import pytest
import torch
from PIL import Image

from synthpi.data.device_views import BatchViews
from synthpi.data.folders import image_folder
from synthpi.pairs.generators import ModuleGenerator, make_unet
from synthpi.losses.paired import BarlowTwins, SimCLR, VICReg
from synthpi.train.memory import memory_estimate
from synthpi.models.branches import make_branches, siamese
from synthpi.pairs.privileged import add_privileged
from synthpi.data.recipes import farndale, histology, strong, weak
from synthpi.train.steps import large_batch_step, paired_step
from synthpi.train.trainer import Trainer
from synthpi.train.processes import make_accelerator
from synthpi.data.views import batches

@pytest.fixture(autouse=True)
def cuda(request):
    if not request.config.getoption("--gpu"): pytest.skip("needs --gpu")
    if not torch.cuda.is_available(): pytest.skip("--gpu was given and there is no CUDA device")
    exact = (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.deterministic,
    ) = exact

def tiles(n=24, size=64):
    rng = np.random.default_rng(0)
    return [
        {
            "primary": np.kron(
                rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
                np.ones((size // 8, size // 8, 1), np.uint8),
            )
        }
        for _ in range(n)
    ]

def data(n=24, size=48, recipe=strong): return BatchViews(tiles(n), [("primary", recipe)]*2, size)

@pytest.mark.parametrize("recipe", [weak, strong, histology, farndale])
def test_views_do_not_depend_on_the_device(recipe):
    views = data(recipe=recipe)
    batch = next(iter(batches(views, 24, 1)))
    def move(x):
        return {k: tuple(t.cuda() for t in v) if k == "images" else v for k, v in x.items()}
    here, there = views(batch)["views"], views(move(batch))["views"]
    for a, b in zip(here, there):
        assert b.is_cuda
        # a solarised pixel at its threshold may fall on either side
        assert (a - b.cpu()).abs().mean() < 2e-3 and (
            (a - b.cpu()).abs() > 0.05
        ).float().mean() < 0.01

@pytest.mark.parametrize("loss", [VICReg(), BarlowTwins(), SimCLR(), SimCLR(temperature=.005)])
@pytest.mark.parametrize("shape", [(64, 16), (32, 512)])
def test_losses_agree_with_the_processor(loss, shape):
    zs = [torch.randn(*shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    found = []
    for device in ("cpu", "cuda"):
        leaves = [z.to(device).requires_grad_() for z in zs]
        value, _ = loss(*leaves)
        value.backward()
        found.append((value.item(), leaves[0].grad.cpu()))
    # float32 sums in another order
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-3, atol=1e-6)

def train(run_dir=None, precision="fp32", stop=None, **kw):
    torch.manual_seed(0)
    model, views = siamese("resnet10_narrow", (64, 64)), data()
    def on_step(t):
        if t.done == stop: raise KeyboardInterrupt
    t = Trainer(
        model,
        VICReg(),
        torch.optim.AdamW(model.parameters(), 1e-3),
        lambda start: batches(views, 12, 20, start),
        20,
        transform=views,
        run_dir=run_dir,
        on_step=on_step,
        accelerator=make_accelerator(precision),
        progress=None,
        **kw,
    )
    t.fit()
    return t

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_is_taken_up_where_it_was(precision, tmp_path):
    whole = train(precision=precision).history
    assert train(tmp_path, precision, stop=7).done == 7
    resumed = train(tmp_path, precision)
    assert len(resumed.history) == 20
    # some CUDA kernels add in any order, and steps carry that on
    np.testing.assert_allclose(resumed.history.loss[:8], whole.loss[:8], rtol=1e-3)
    np.testing.assert_allclose(resumed.history.loss, whole.loss, rtol=.05)
    if precision == "fp16": assert resumed.accelerator.scaler.get_scale() > 0

@pytest.mark.parametrize(
    "kw",
    [
        dict(precision="bf16", channels_last=True),
        dict(precision="fp16"),
        dict(precision="bf16", compile=True),
    ],
)
def test_faster_ways_lead_to_the_same_place(kw):
    slow, fast = train().history.loss, train(**kw).history.loss
    assert np.isfinite(fast).all() and fast.iloc[0] == pytest.approx(slow.iloc[0], rel=.03)
    assert fast.iloc[-3:].mean() < fast.iloc[:3].mean()

def peak(f):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result

def test_a_large_batch_in_little_memory():
    torch.manual_seed(0)
    model = make_branches((0, 0), "resnet18", widths=(256,), norm="group").cuda()
    batch = {"views": tuple(torch.rand(96, 3, 128, 128, device="cuda") for _ in range(2))}
    def gradient(step):
        model.zero_grad()
        step(model, VICReg(), batch)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    whole, a = peak(lambda: gradient(paired_step))
    parts, b = peak(lambda: gradient(large_batch_step(8)))
    assert parts < whole/3
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > .9999

@pytest.mark.parametrize("encoder, precision", [("resnet18", "fp32"), ("resnet50", "bf16")])
def test_the_memory_estimate_is_near_what_is_taken(encoder, precision):
    model = siamese(encoder, (1024, 1024)).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters())
    views = tuple(torch.rand(32, 3, 160, 160, device="cuda") for _ in range(2))
    estimate = memory_estimate(model, [tuple(v.shape) for v in views], precision)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            zs = model(*views)
        VICReg()(*zs)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    taken = torch.cuda.max_memory_allocated()
    assert .75 < estimate.total/taken < 1.25, (estimate, taken)

def test_pairs_do_not_depend_on_the_device(tmp_path):
    (tmp_path/"tiles").mkdir()
    for k, tile in enumerate(tiles()):
        Image.fromarray(tile["primary"]).save(tmp_path / "tiles" / f"{k:02}.png")
    torch.manual_seed(0)
    generator = ModuleGenerator(make_unet(8, out_channels=3), um_per_px=.5)
    found = {}
    for device in ("cpu", "cuda"):
        pairs, stats = add_privileged(
            image_folder(tmp_path / "tiles"),
            generator.to(device),
            tmp_path / device,
            0.5,
            batch_size=8,
        )
        found[device] = np.stack([np.asarray(r["privileged"], int) for r in pairs])
        assert stats["made"] == 24
    # float32 sums in another order, then rounded
    assert abs(found["cpu"] - found["cuda"]).max() <= 1 and found["cpu"].std() > 1
    # the key is that of the weights, wherever they are
    assert (
        add_privileged(image_folder(tmp_path / "tiles"), generator, tmp_path / "cpu", 0.5)[1][
            "cache_hits"
        ]
        == 24
    )

"""The two-pass step: the gradient of the large batch, in one process and in two, at the memory of a
micro-batch."""
import datetime
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from synthpi.losses.distance import DistanceBarlow, DistanceLoss, TwoHead, TwoHeadLoss
from synthpi.losses.position import PositionRegression
from synthpi.losses.paired import BarlowTwins, SimCLR, VICReg
from synthpi.models.branches import Branches, Projector
from synthpi.models.encoders import make_encoder
from synthpi.train.steps import distance_step, large_batch_step, paired_step

LOSSES = {
    "vicreg": VICReg(),
    "vicreg reference": VICReg("reference"),
    "barlow": BarlowTwins(),
    "nt-xent": SimCLR(),
    "infonce": SimCLR(variant="infonce"),
}

def network(k, dropout=0.):
    "One encoder for all views but the last, in float64 and without BatchNorm"
    torch.manual_seed(0)
    layout = (0,)*(k - 1) + (1,)
    encoders = [nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)]
    return Branches(encoders, [nn.Linear(24, 12) for _ in range(2)], layout).double()

def views(n, k):
    return tuple(
        torch.randn(n, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(j))
        for j in range(k)
    )

def gradients(model, step, loss, batch, factor=1.):
    model.zero_grad()
    scalar, terms = step(model, loss, {"views": batch})
    (scalar*factor).backward()
    return scalar.detach(), terms, [p.grad.clone() for p in model.parameters()]

@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("n, micro", [(30, 30), (30, 7), (30, 2), (5, 100)])
def test_loss_and_gradient_are_those_of_the_whole_batch(name, k, n, micro):
    model, batch, loss = network(k), views(n, k), LOSSES[name]
    (a, terms_a, grad_a), (b, terms_b, grad_b) = (
        gradients(model, step, loss, batch) for step in (paired_step, large_batch_step(micro))
    )
    # float64: only sums are taken in another order
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for t in terms_a: torch.testing.assert_close(terms_a[t], terms_b[t], rtol=1e-10, atol=1e-12)
    for x, y in zip(grad_a, grad_b): torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)

def test_a_branch_with_a_stopped_gradient_gets_none():
    model, batch, loss = network(3), views(20, 3), VICReg(stop_gradient=(2,))
    results = []
    for step in (paired_step, large_batch_step(6)):
        model.zero_grad()
        step(model, loss, {"views": batch})[0].backward()
        results.append([p.grad for p in model.parameters()])
    assert any(g is None for g in results[0])
    for x, y in zip(*results):
        assert (x is None) == (y is None) and (x is None or torch.allclose(x, y))

def test_a_factor_on_the_scalar_reaches_the_gradient():
    model, batch = network(2), views(20, 2)
    once, thousandfold = (
        gradients(model, large_batch_step(6), VICReg(), batch, f)[2] for f in (1.0, 1024.0)
    )
    for x, y in zip(once, thousandfold): torch.testing.assert_close(1024*x, y)

def test_dropout_is_drawn_alike_in_both_passes():
    "With one part, both passes see what a plain step would have seen"
    model, batch = network(3, dropout=.5), views(20, 3)
    results = []
    for step in (paired_step, large_batch_step(20), large_batch_step(7)):
        torch.manual_seed(3)
        results.append((*gradients(model, step, VICReg(), batch), torch.rand(())))
    for x, y in zip(results[0][2], results[1][2]): torch.testing.assert_close(x, y)
    # and the generator has moved on as far
    assert torch.equal(results[0][3], results[1][3])
    # in parts, the masks are others; the gradient is that of those masks:
    assert not torch.allclose(results[0][0], results[2][0])
    model.zero_grad()
    torch.manual_seed(3)
    parts = [model(*part) for part in zip(*(v.tensor_split(3) for v in batch))]
    VICReg()(*(torch.cat(z) for z in zip(*parts)))[0].backward()
    for x, p in zip(results[2][2], model.parameters()): torch.testing.assert_close(x, p.grad)

def test_batchnorm_counts_every_micro_batch_once():
    torch.manual_seed(0)
    model = Branches([make_encoder("resnet10_narrow")], [Projector(128, (16, 16))], (0, 0)).train()
    x = tuple(torch.rand(12, 3, 32, 32) for _ in range(2))
    twin = Branches([make_encoder("resnet10_narrow")], [Projector(128, (16, 16))], (0, 0)).train()
    twin.load_state_dict(model.state_dict())
    gradients(model, large_batch_step(4), VICReg(), x)
    for part in zip(*(v.split(4) for v in x)): twin(*part)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
        # weights untouched, statistics as after one pass over the parts
        torch.testing.assert_close(a, b, msg=name)
    assert all(
        m.track_running_stats
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    )

def test_frozen_batchnorm_stays_frozen():
    model = Branches([make_encoder("resnet10_narrow")], [Projector(128, (16, 16))], (0, 0)).eval()
    x = tuple(torch.rand(6, 3, 32, 32) for _ in range(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b = (gradients(model, step, VICReg(), x) for step in (paired_step, large_batch_step(2)))
    # float32; in eval mode no row depends on another, so the parts give the whole
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def test_memory_is_that_of_the_micro_batch():
    def most_kept(n, micro):
        now, most = [0], [0]
        def keep(x):
            class Kept: pass
            kept = Kept()
            kept.x = x
            size = x.numel()*x.element_size()
            now[0] += size
            most[0] = max(most[0], now[0])
            weakref.finalize(kept, lambda: now.__setitem__(0, now[0] - size))
            return kept
        model = Branches(
            [nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(10, 10), nn.Tanh())])],
            [nn.Linear(10, 2)],
            (0, 0),
        ).double()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.x):
            gradients(
                model, large_batch_step(micro) if micro else paired_step, VICReg(), views(n, 2)
            )
        return most[0]
    whole = [most_kept(n, None) for n in (256, 1024)]
    parts = [most_kept(n, 16) for n in (256, 1024)]
    assert whole[1] > 3.5*whole[0]                                          # grows with the batch
    # what is left at 16 rows is the loss on (N, 2) embeddings
    assert parts[1] < whole[1]/3

def test_views_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"views of \[8, 7\] rows"):
        large_batch_step(4)(network(2), VICReg(), {"views": (views(8, 1)[0], views(7, 1)[0])})

def test_a_loss_with_parameters_is_refused():
    class Learnt(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, a, b): return (a - b).square().mean()*self.scale, {}
    with pytest.raises(ValueError, match="part of the model"):
        large_batch_step(4)(network(2), Learnt(), {"views": views(8, 2)})

def in_process(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    out = {}
    for name, loss in LOSSES.items():
        for k in (2, 3):
            model = DistributedDataParallel(network(k))
            # 9 rows and 4: three micro-batches here, two there
            shares = [v.tensor_split([9])[rank] for v in views(13, k)]
            out[name, k] = gradients(model, large_batch_step(4), loss, tuple(shares))
    torch.save(out, f"{folder}/{rank}.pt")
    # a wrapped model that outlives its process group can abort the interpreter at its end
    del model
    gc.collect()
    dist.destroy_process_group()

@pytest.mark.slow
def test_two_processes_with_different_shares_give_the_gradient_of_the_joined_batch(tmp_path):
    mp.start_processes(in_process, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path/f"{r}.pt") for r in range(2)]
    for (name, k), (value, terms, grads) in found[0].items():
        a, t, g = gradients(network(k), paired_step, LOSSES[name], views(13, k))
        for other in (value, found[1][name, k][0]):
            torch.testing.assert_close(other, a, rtol=1e-10, atol=1e-12)
        for x, y, z in zip(g, grads, found[1][name, k][2]):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(y, z)

# Crops with a position

def placed(n=12):
    g = torch.Generator().manual_seed(0)
    return {"center_mm": 100 * torch.rand(n, 3, generator=g), "volume_id": torch.arange(n) // 4}, [
        torch.randn(n, 1, 6, 6, 6, generator=g) for _ in range(2)
    ]

def crop_encoder(width=5):
    return nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, width)
    )

def test_distance_step_hands_the_loss_what_came_with_the_crops():
    (where, (x, y)), seen = placed(), []
    def loss(*zs, center_mm, volume_id):
        seen.append((zs, center_mm, volume_id))
        return sum(z.sum() for z in zs), {"n": len(zs)}
    one, two = crop_encoder(), Branches([crop_encoder()], [nn.Identity()], (0, 0))
    scalar, terms = distance_step(one, loss, {"crop": x, **where})
    assert (
        terms == {"n": 1}
        and torch.equal(seen[0][0][0], one(x))
        and torch.equal(scalar, one(x).sum())
    )
    assert seen[0][1] is where["center_mm"] and seen[0][2] is where["volume_id"]
    assert distance_step(two, loss, {"views": (x, y), **where})[1] == {"n": 2} and all(
        torch.equal(a, b) for a, b in zip(seen[1][0], two(x, y))
    )
    # a model of one branch, a batch without volumes
    distance_step(
        Branches([one], [nn.Identity()], (0,)), loss, {"crop": x, "center_mm": where["center_mm"]}
    )
    assert seen[2][2] is None and torch.equal(seen[2][0][0], one(x))

def test_distance_step_serves_every_loss_of_positions():
    where, crops = placed()
    for loss, width in (
        (DistanceLoss(50.0), 5),
        (DistanceLoss(50.0, "within"), 5),
        (PositionRegression([50.0] * 3, [30.0] * 3), 3),
    ):
        model = crop_encoder(width)
        value, _ = distance_step(model, loss, {"crop": crops[0], **where})
        torch.testing.assert_close(
            value, loss(model(crops[0]), where["center_mm"], where["volume_id"])[0]
        )
    for loss, head in (
        (DistanceBarlow(weight=2.0), nn.Identity()),
        (TwoHeadLoss(3, weight=2.0), TwoHead(5, 3, 4)),
    ):
        model = Branches([crop_encoder()], [head], (0, 0))
        value, _ = distance_step(model, loss, {"views": tuple(crops), **where})
        torch.testing.assert_close(value, loss(*model(*crops), **where)[0])
        value.backward()
        assert all(
            p.grad.isfinite().all() and p.grad.abs().sum() > 0
            for p in model.parameters()
            if p.ndim > 1
        )

def test_positions_are_not_taken_for_embeddings_by_the_watch():
    from synthpi.train.trainer import Trainer
    from synthpi.train.watch import embedding_health
    where, (x, _) = placed()
    # on a line: as embeddings they would look collapsed
    where["center_mm"] = where["center_mm"].mul(0).add(torch.arange(12.)[:, None])
    model = nn.Sequential(crop_encoder(8), nn.BatchNorm1d(8))
    batches = [{"crop": x, **where}]*4
    history = Trainer(
        model,
        DistanceLoss(5.0),
        torch.optim.SGD(model.parameters(), 0.0),
        lambda start: batches[start:],
        steps=4,
        step=distance_step,
        watch_every=1,
        progress=None,
    ).fit()
    with torch.no_grad(): health = embedding_health(model(x))
    assert {"loss", "distance", "abs_error", "pearson"} <= set(history) and all(
        history[k].iloc[0] == pytest.approx(v, rel=1e-4) for k, v in health.items()
    )

@pytest.mark.parametrize("batch", [
    {"crop": 0}, {"center_mm": 0}, {}, {"crop": 0, "views": 0, "center_mm": 0},
])
def test_a_batch_without_positions_or_crops_is_refused(batch):
    with pytest.raises(ValueError, match="expected center_mm, and one of crop and views"):
        distance_step(crop_encoder(), DistanceLoss(), batch)

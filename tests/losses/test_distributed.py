"""Processes that hold different rows train as one process on all rows: every loss, through a
real DistributedDataParallel.

Three processes are started once and run all cases, as a group of three and then two of them as a
group of two; the tests below compare what they stored with one process on the joined batch.
"""
import gc
import math
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from synthpi.losses import distance
from synthpi.losses import paired as losses
from synthpi.losses.distance import DistanceBarlow, DistanceLoss, TwoHeadLoss
from synthpi.losses.paired import BarlowTwins, SimCLR, VICReg, gather
from synthpi.losses.position import PositionRegression

# the last batch is uneven; a process with one row has no variance of its own
ROWS = {2: (5, 3), 3: (3, 1, 4)}
# fewer and more columns than rows: both sides of the second-moment products
WIDTHS = (3, 20)
LOSSES = {
    "vicreg official": (VICReg("official"), (2,)),
    "vicreg mean": (VICReg(), (2, 3)),
    "vicreg reference": (VICReg("reference"), (2, 3)),
    "barlow reference": (BarlowTwins("reference"), (2,)),
    "barlow mean": (BarlowTwins(), (2, 3)),
    "barlow undivided": (BarlowTwins(off_diagonal=0.1, divide_by_d=False), (2, 3)),
    "nt-xent mean": (SimCLR(), (2, 3)),
    "nt-xent reference": (SimCLR(0.1, mode="reference"), (2, 3)),
    "infonce mean": (SimCLR(0.1, "infonce"), (2, 3)),
    "infonce reference": (SimCLR(0.5, "infonce", "reference"), (2, 3)),
    "vicreg weighted, one branch stopped": (
        VICReg(pair_weights=[1.0, 0.5, 0.5], stop_gradient=[2]),
        (3,),
    ),
    "infonce weighted, one branch stopped": (
        SimCLR(0.2, "infonce", pair_weights=[1.0, 0.5, 0.5], stop_gradient=[0]),
        (3,),
    ),
}
CASES = [(name, k, d) for name, (_, ks) in LOSSES.items() for k in ks for d in WIDTHS]
# positions: crops of four volumes, shared by two processes
PLACED_ROWS = (6, 4)
VOLUME = torch.tensor([0, 0, 1, 2, 2, 2, 2, 7, 1, 0])
PLACED = {
    "plain": (DistanceLoss(4.0), 1),
    "all, kl": (DistanceLoss(4.0, "all", kl=0.3), 1),
    "within": (DistanceLoss(4.0, "within", relative=0.1), 1),
    "cross": (DistanceLoss(4.0, "cross", huber=0.5), 1),
    "barlow": (DistanceBarlow(DistanceLoss(4.0), weight=5.0), 2),
    "two heads": (TwoHeadLoss(2, DistanceLoss(4.0, "within"), weight=5.0), 2),
    "regression": (PositionRegression([1.0] * 3, [2.0] * 3), 1),
    "partners": (DistanceLoss(4.0, "within", partners=4), 1),
}
ALONE = "each process its own rows"
CONTROLS = {
    ALONE: lambda *zs: zs,
    "gathered without gradient": lambda *zs: tuple(_no_gradient(z) for z in zs),
}

class Branched(nn.Module):
    """Two primary views through one encoder, a third view through another: no BatchNorm, whose
    statistics are not the loss's business"""
    def __init__(self, d):
        super().__init__()
        def mlp(): return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, d))
        self.primary, self.privileged = mlp(), mlp()

    def forward(self, *views):
        return tuple(self.privileged(v) if i == 2 else self.primary(v) for i, v in enumerate(views))

def data(k, d, n):
    "The same model and joined batch in every process"
    torch.manual_seed(0)
    model = Branched(d).double()
    views = [torch.randn(n, 6, dtype=torch.float64) for _ in range(k)]
    return model, [v + views[0] for v in views]

def step(model, loss, views):
    "Scalar, terms and parameter gradients of one training step"
    scalar, terms = loss(*model(*views))
    scalar.backward()
    return dict(
        loss=scalar.detach(),
        terms=terms,
        grads={
            n.removeprefix("module."): p.grad.clone()
            for n, p in model.named_parameters()
            if p.grad is not None
        },
    )

def _no_gradient(z):
    "A gather as accelerate's: the rows of others are constants"
    rows = [r[0] for r in _collect(len(z))]
    padded = torch.nn.functional.pad(z.detach(), (0, 0, 0, max(rows) - len(z)))
    blocks = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(blocks, padded)
    blocks = [b[:n] for b, n in zip(blocks, rows)]
    blocks[dist.get_rank()] = z
    return torch.cat(blocks)

def _collect(value):
    out = [None]*dist.get_world_size()
    dist.all_gather_object(out, [value])
    return out

@contextmanager
def replaced_gather(other):
    original, losses.gather = losses.gather, other
    try: yield
    finally: losses.gather = original

def own(views, rows, rank):
    start = sum(rows[:rank])
    return [v[start:start + rows[rank]] for v in views]

def raises(call):
    try: call()
    except ValueError as e: return str(e)

class Net(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, d))
    def forward(self, *views): return tuple(self.net(v) for v in views)

def placed_data(name):
    "The same model and joined batch in every process"
    torch.manual_seed(0)
    model = Net(3 if name == "regression" else 5).double()
    views = [torch.randn(10, 6, dtype=torch.float64) for _ in range(PLACED[name][1])]
    return model, views, 3*torch.randn(10, 3, dtype=torch.float64)

def placed_step(model, name, views, c, volume):
    loss = PLACED[name][0]
    return step(model, lambda *zs: loss(*zs, center_mm=c, volume_id=volume), views)

def two_rows():
    g = torch.Generator().manual_seed(0)
    return [3*torch.randn(2, n, generator=g, dtype=torch.float64) for n in (3, 3)]

def placed_cases(rank):
    mine, out = slice(0, PLACED_ROWS[0]) if rank == 0 else slice(PLACED_ROWS[0], None), {}
    for name in PLACED:
        model, views, c = placed_data(name)
        # processes draw different numbers
        torch.manual_seed(10 + rank)
        views, model = [v[mine] for v in views], DistributedDataParallel(model)
        out[name] = placed_step(model, name, views, c[mine], VOLUME[mine])
    z, c = two_rows()
    out["one row each"] = DistanceLoss()(z[rank:rank + 1], c[rank:rank + 1])[0]
    out["not finite in one"] = raises(lambda: DistanceLoss()(z, c*(math.nan if rank else 1)))
    return out

def ddp_step(name, k, d, rows, rank):
    model, views = data(k, d, sum(rows))
    model = DistributedDataParallel(model, find_unused_parameters=True)
    return step(model, LOSSES[name][0], own(views, rows, rank))

def gathered(rank, rows):
    "Rows of two branches, the gradient of what each process weighs differently, and whole numbers"
    z = torch.arange(rows[rank]*2.).reshape(-1, 2).add(100*rank).requires_grad_()
    joined = gather(z, torch.cat([z, z, z], dim=1).detach())
    # the gradient is the sum of the processes' weights
    (joined[0]*(rank + 1)).sum().backward()
    integers = gather(torch.full((rows[rank], 1), 2**40 + rank))[0]
    return {"gather": ([j.detach() for j in joined], z.grad), "integers": integers}

def paired_cases(rank, world):
    rows, out = ROWS[world], {}
    for case in CASES: out[case] = ddp_step(*case, rows, rank)
    alone = (sum(rows),) + (0,)*(world - 1)
    out["empty process"] = ddp_step("nt-xent mean", 3, 3, alone, rank)
    for control, other in CONTROLS.items():
        if world == 3 and control == ALONE: continue     # one process has a single row
        with replaced_gather(other):
            for case in CASES: out[control, case] = ddp_step(*case, rows, rank)
    views = own(data(3, 20, sum(rows))[1], rows, rank)
    each = VICReg(), BarlowTwins(), SimCLR()
    out["half precision"] = [loss(*(v.bfloat16() for v in views))[0] for loss in each]
    with torch.no_grad(): out["validation"] = [loss(*views)[0] for loss in each]
    out["widths"] = raises(lambda: gather(torch.zeros(2, 3 + rank)))
    out["one row in all"] = raises(lambda: SimCLR()(*[torch.ones(int(rank == 0), 4)]*2))
    return out | gathered(rank, rows)

def worker(rank, folder):
    torch.set_num_threads(1)
    for world in sorted(ROWS, reverse=True):
        if rank >= world: continue
        dist.init_process_group(
            "gloo",
            init_method=(folder/f"meeting {world}").as_uri(),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        out = paired_cases(rank, world)
        if world == 2: out |= placed_cases(rank)
        torch.save(out, folder/f"{world} {rank}.pt")
        # DDP sits in reference cycles and holds the group: its threads must end first
        gc.collect()
        dist.destroy_process_group()

@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Folder of what each process of each group computed"
    folder, context = tmp_path_factory.mktemp("group"), mp.get_context("spawn")
    children = [
        context.Process(target=worker, args=(rank, folder), daemon=True)
        for rank in range(max(ROWS))
    ]
    for c in children: c.start()
    try:
        end = time.monotonic() + 120
        while any(c.is_alive() for c in children) and time.monotonic() < end:
            if any(c.exitcode for c in children): break
            time.sleep(.05)
        assert [c.exitcode for c in children] == [0]*len(children), (
            "a process failed or hung; its traceback is on standard error"
        )
    finally:
        for c in children:
            c.kill()
            c.join()
    return folder

def stored(folder, world):
    return [torch.load(folder/f"{world} {rank}.pt", weights_only=False) for rank in range(world)]

@pytest.fixture(scope="module", params=sorted(ROWS), ids="{} processes".format)
def group(request, results):
    "Number of processes, and what each of them computed"
    return request.param, stored(results, request.param)

@pytest.fixture(scope="module")
def processes(results): return stored(results, 2)

def one_process(case, n):
    name, k, d = case
    model, views = data(k, d, n)
    return step(model, LOSSES[name][0], views)

def relative_error(grads, expected):
    def norm(gs): return torch.stack([g.norm() for g in gs]).norm()
    return (norm([grads[n] - expected[n] for n in expected])/norm(expected.values())).item()

@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}, {c[1]} branches, D={c[2]}")
def test_processes_together_equal_one(group, case):
    world, ranks = group
    expected = one_process(case, sum(ROWS[world]))
    # there is a gradient
    assert (
        expected["loss"].isfinite()
        and relative_error({n: 0 * g for n, g in expected["grads"].items()}, expected["grads"]) == 1
    )
    # the scale of what rounding leaves of a gradient of zero (last bias)
    largest = max(g.abs().max().item() for g in expected["grads"].values())
    for result in (r[case] for r in ranks):
        # float64: sums over rows in another order, and over processes
        torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-12, atol=1e-13)
        assert result["terms"].keys() == expected["terms"].keys()
        for name, term in expected["terms"].items():
            torch.testing.assert_close(result["terms"][name], term, rtol=1e-12, atol=1e-13)
        for name, grad in expected["grads"].items():
            torch.testing.assert_close(
                result["grads"][name],
                grad,
                rtol=1e-9,
                atol=1e-11 * largest,
                msg=lambda m: f"{name}: {m}",
            )

def test_a_process_without_rows_takes_part(group):
    world, ranks = group
    expected = one_process(("nt-xent mean", 3, 3), sum(ROWS[world]))
    for result in (r["empty process"] for r in ranks):
        torch.testing.assert_close(result["loss"], expected["loss"], rtol=1e-12, atol=0)
        assert relative_error(result["grads"], expected["grads"]) < 1e-12

@pytest.mark.parametrize("control", CONTROLS)
def test_without_the_gather_it_is_another_gradient(group, control):
    world, ranks = group
    if world == 3 and control == ALONE:
        pytest.skip(
            "one of the three processes has a single row, on which most losses are not defined"
        )
    for case in CASES:
        expected, result = one_process(case, sum(ROWS[world])), ranks[0][control, case]
        assert relative_error(result["grads"], expected["grads"]) > .05, case
        same_loss = torch.allclose(result["loss"], expected["loss"], rtol=1e-12)
        # the second control has the right loss, which is why it deceives
        assert same_loss == (control == "gathered without gradient"), case

def test_gather_joins_rows_in_order_and_sums_gradients(group):
    world, ranks = group
    joined = torch.cat(
        [torch.arange(n * 2.0).reshape(-1, 2) + 100 * rank for rank, n in enumerate(ROWS[world])]
    )
    for rank, result in enumerate(ranks):
        (narrow, wide), grad = result["gather"]
        assert torch.equal(narrow, joined) and torch.equal(wide, torch.cat([joined]*3, dim=1))
        assert torch.equal(
            grad, torch.full((ROWS[world][rank], 2), float(sum(range(1, world + 1))))
        )
        assert result["integers"].dtype == torch.int64
        assert result["integers"].flatten().tolist() == [
            2**40 + r for r, n in enumerate(ROWS[world]) for _ in range(n)
        ]

def test_half_precision_travels_as_float32(group):
    world, ranks = group
    views = [v.bfloat16() for v in data(3, 20, sum(ROWS[world]))[1]]
    for i, loss in enumerate((VICReg(), BarlowTwins(), SimCLR())):
        for result in ranks:
            assert result["half precision"][i].dtype == torch.float32
            # float32, strides differ after the split
            torch.testing.assert_close(
                result["half precision"][i], loss(*views)[0], rtol=1e-5, atol=0
            )

def test_validation_joins_the_batch_too(group):
    world, ranks = group
    for i, loss in enumerate((VICReg(), BarlowTwins(), SimCLR())):
        expected = loss(*data(3, 20, sum(ROWS[world]))[1])[0]
        for result in ranks:
            torch.testing.assert_close(result["validation"][i], expected, rtol=1e-12, atol=0)

def test_every_process_hears_of_the_error(group):
    world, ranks = group
    for result in ranks:
        assert result["widths"].startswith(
            f"the processes hold {', '.join(str(3 + r) for r in range(world))} embedding columns"
        )
        assert "at least two rows" in result["one row in all"]

def _both_draws():
    "What the two processes drew for their rows"
    draws = []
    for rank in range(2):
        torch.manual_seed(10 + rank)
        draws.append(torch.rand(PLACED_ROWS[rank], 4))
    return torch.cat(draws)

@pytest.mark.parametrize("name", PLACED)
def test_two_processes_with_positions_equal_one(processes, name, monkeypatch):
    if name == "partners":
        drawn = _both_draws()
        monkeypatch.setattr(distance.torch, "rand", lambda *shape, **kw: drawn)
    model, views, c = placed_data(name)
    expected = placed_step(model, name, views, c, VOLUME)
    largest = max(g.abs().max().item() for g in expected["grads"].values())
    assert largest > 0
    for found in (p[name] for p in processes):
        # float64: sums in another order
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=1e-13)
        for k, term in expected["terms"].items():
            torch.testing.assert_close(found["terms"][k], term, rtol=1e-11, atol=1e-13)
        for k, grad in expected["grads"].items():
            torch.testing.assert_close(found["grads"][k], grad, rtol=1e-9, atol=1e-11*largest)

@pytest.mark.parametrize("name", [n for n in PLACED if n not in ("partners", "within", "two heads")])
def test_positions_without_the_gather_are_another_loss(processes, name):
    "The losses left out have no pair within the second process alone"
    model, views, c = placed_data(name)
    apart = [
        PLACED[name][0](*model(*[v[s] for v in views]), center_mm=c[s], volume_id=VOLUME[s])[0]
        for s in (slice(0, 6), slice(6, 10))
    ]
    assert abs(sum(apart)/2 - processes[0][name]["loss"]) > 1e-6

def test_rows_of_one_process_count_in_the_other_and_so_do_errors(processes):
    z, c = two_rows()
    for p in processes:
        assert p["one row each"] == DistanceLoss()(z, c)[0]
        assert "2 of 4 rows of centres are not finite, the first is row 2" in p["not finite in one"]

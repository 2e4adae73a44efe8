"""Processes that hold different rows train as one process on all rows: every loss, through a
real DistributedDataParallel.

Each group of processes is started once and runs all cases; the tests below compare what it
stored with one process on the joined batch.
"""
import gc
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from synthpi.losses import paired as losses
from synthpi.losses.paired import BarlowTwins, SimCLR, VICReg, gather

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

def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    rows, out = ROWS[world], {}
    n = sum(rows)

    def ddp_step(name, k, d, rows=rows):
        model, views = data(k, d, n)
        return step(
            DistributedDataParallel(model, find_unused_parameters=True),
            LOSSES[name][0],
            own(views, rows, rank),
        )

    for case in CASES: out[case] = ddp_step(*case)
    out["empty process"] = ddp_step("nt-xent mean", 3, 3, rows=(n,) + (0,)*(world - 1))
    for control, other in CONTROLS.items():
        if world == 3 and control == ALONE: continue     # one process has a single row
        with replaced_gather(other):
            for case in CASES: out[control, case] = ddp_step(*case)

    z = torch.arange(rows[rank]*2.).reshape(-1, 2).add(100*rank).requires_grad_()
    wide = torch.cat([z, z, z], dim=1).detach()
    joined = gather(z, wide)
    # the processes weigh the batch differently: the gradient is the sum of their weights
    (joined[0]*(rank + 1)).sum().backward()
    out["gather"] = [j.detach() for j in joined], z.grad
    out["integers"] = gather(torch.full((rows[rank], 1), 2**40 + rank))[0]
    out["half precision"] = [
        loss(*(v.bfloat16() for v in own(data(3, 20, n)[1], rows, rank)))[0]
        for loss in (VICReg(), BarlowTwins(), SimCLR())
    ]
    with torch.no_grad():
        out["validation"] = [
            loss(*own(data(3, 20, n)[1], rows, rank))[0]
            for loss in (VICReg(), BarlowTwins(), SimCLR())
        ]
    out["widths"] = raises(lambda: gather(torch.zeros(2, 3 + rank)))
    out["one row in all"] = raises(lambda: SimCLR()(*[torch.ones(int(rank == 0), 4)]*2))
    torch.save(out, folder/f"{rank}.pt")
    # DDP sits in reference cycles and holds the group: its threads must end before the interpreter
    gc.collect()
    dist.destroy_process_group()

@pytest.fixture(scope="module", params=sorted(ROWS), ids="{} processes".format)
def group(request, tmp_path_factory):
    "Number of processes, and what each of them computed"
    world, folder = request.param, tmp_path_factory.mktemp("group")
    context = mp.get_context("spawn")
    children = [
        context.Process(target=worker, args=(rank, world, folder), daemon=True)
        for rank in range(world)
    ]
    for c in children: c.start()
    try:
        end = time.monotonic() + 120
        while (
            any(c.is_alive() for c in children)
            and time.monotonic() < end
            and not any(c.exitcode for c in children)
        ):
            time.sleep(0.05)
        assert [c.exitcode for c in children] == [0] * world, (
            "a process failed or hung; its traceback is on standard error"
        )
    finally:
        for c in children:
            c.kill()
            c.join()
    return world, [torch.load(folder/f"{rank}.pt", weights_only=False) for rank in range(world)]

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

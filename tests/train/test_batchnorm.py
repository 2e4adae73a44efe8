"BatchNorm over two processes, against one process with all rows."
import subprocess
import sys

import pytest
import torch
from torch import nn

from synthpi.models.branches import trident
from synthpi.train.batchnorm import JoinedBatchNorm, synchronise_batchnorm

def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


NETWORK = '''
import torch
from torch import nn
torch.set_num_threads(1)
def network():
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 5)
    return nn.Sequential(*first, nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3)).double()
def batches():
    g = torch.Generator().manual_seed(1)
    return 3 + torch.randn(3, 7, 2, 8, 8, generator=g, dtype=torch.float64)
def errors(z, rows):
    "Rows differ in their targets"
    return ((z - torch.arange(rows.start, rows.stop)[:, None])**2).sum()/7
def train(model, rows, share, sync=lambda x: x):
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=.01), []
    for batch in batches():
        optimizer.zero_grad()
        # two views through one network
        loss = share*errors(model(batch[rows]), rows) + share*errors(model(batch.flip(-1)[rows]), rows)
        loss.backward()
        optimizer.step()
        losses.append(sync(loss.detach().clone()))
    return torch.stack(losses), {k: p.grad for k, p in model.named_parameters()}
'''
WORKER = NETWORK + '''
import sys
import torch.distributed as dist
from datetime import timedelta
from synthpi.train.batchnorm import synchronise_batchnorm
rank, init, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
group = dict(rank=rank, world_size=2, timeout=timedelta(seconds=60))
dist.init_process_group("gloo", init_method=init, **group)
def mean(x):
    dist.all_reduce(x)
    return x/2
for mode in ("joined", "apart"):
    model = network()
    if mode == "joined": model = synchronise_batchnorm(model, "cpu")
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    # DDP divides the sum of the gradients by two
    losses, grads = train(parallel, [slice(0, 2), slice(2, 7)][rank], 2., mean)
    # in evaluation nothing waits for the other process
    if rank == 0: model.eval()(batches()[0])
    grads = {f"grad {k.removeprefix('module.')}": v for k, v in grads.items()}
    torch.save({"losses": losses, **grads, **model.state_dict()}, f"{out}/{mode}{rank}.pt")
dist.destroy_process_group()
'''

@pytest.mark.slow
def test_two_processes_with_uneven_rows_train_like_one(tmp_path):
    """Loss, gradients, weights and running statistics after three steps; without joining they
    differ, so the comparison can fail"""
    script = tmp_path/"worker.py"
    script.write_text(WORKER)
    children = [
        subprocess.Popen(
            [sys.executable, script, str(rank), f"file://{tmp_path}/init", str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for child in children:
            _, errors = child.communicate(timeout=90)
            assert child.returncode == 0, errors
    finally:
        for child in children:
            child.kill()
            child.wait()
    here = {}
    exec(NETWORK, here)
    model = here["network"]()
    losses, grads = here["train"](model, slice(0, 7), 1.)
    expected = {
        "losses": losses,
        **{f"grad {k}": v for k, v in grads.items()},
        **model.state_dict(),
    }
    for mode, rank in (("joined", 0), ("joined", 1), ("apart", 0), ("apart", 1)):
        result = torch.load(tmp_path/f"{mode}{rank}.pt", weights_only=True)
        assert result.keys() == expected.keys()
        # float64; sums in another order, over three steps of training
        agree = {
            k for k in expected if torch.allclose(result[k], expected[k], rtol=1e-9, atol=1e-10)
        }
        if mode == "joined":
            assert agree == set(expected)
        else:
            assert not agree & {
                "losses",
                "grad 0.weight",
                "grad 4.weight",
                "0.weight",
                "1.running_mean",
                "1.running_var",
                "5.running_mean",
                "5.running_var",
            }

def test_joined_batchnorm_without_a_group_is_batchnorm():
    for kind, shape in (
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm1d, (4, 3, 5)),
        (nn.BatchNorm2d, (4, 3, 5, 5)),
        (nn.BatchNorm3d, (4, 3, 2, 5, 5)),
    ):
        bn = kind(3, momentum=0.3)
        joined = synchronise_batchnorm(kind(3, momentum=0.3), "cpu")
        for x in torch.randn(2, *shape):
            assert torch.equal(bn(x), joined(x))
        assert (
            type(joined) is JoinedBatchNorm
            and same(bn.state_dict(), joined.state_dict())
            and torch.equal(bn.eval()(x), joined.eval()(x))
        )

def test_only_batchnorm_is_replaced():
    model = nn.Sequential(
        nn.GroupNorm(1, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4), nn.BatchNorm2d(4)
    )
    kinds = [type(m) for m in synchronise_batchnorm(model, "cpu")]
    assert (
        kinds
        == [nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, JoinedBatchNorm]
        == [type(m) for m in synchronise_batchnorm(model, "cpu")]
    )
    class Mine(nn.BatchNorm2d): pass
    with pytest.raises(TypeError, match="1 is a Mine"):
        synchronise_batchnorm(nn.Sequential(nn.ReLU(), Mine(3)), "cpu")
    cuda = synchronise_batchnorm(trident("resnet10_narrow", (4, 2)), "cuda")
    assert not [m for m in cuda.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))] and [
        m for m in cuda.modules() if isinstance(m, nn.SyncBatchNorm)
    ]

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_batchnorm_that_does_more_is_not_converted(device):
    class Activated(nn.BatchNorm2d):
        def forward(self, x): return super().forward(x).relu()
    with pytest.raises(TypeError, match="0 is a Activated"):
        synchronise_batchnorm(nn.Sequential(Activated(3)), device)

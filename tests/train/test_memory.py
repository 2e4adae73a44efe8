"Estimates of memory against real forward passes and real optimisers."
import pytest
import torch
from torch import nn

from synthpi.models.branches import siamese, trident
from synthpi.train.memory import Memory, memory_estimate

def small(channels=3, width=6):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def really_saved(model, views, dtype):
    own, sizes = (
        {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]},
        {},
    )
    def see(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own: sizes[s.data_ptr()] = (s.nbytes(), t)
        return t
    with (
        torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(see, lambda t: t),
    ):
        zs = model(*views)
    for t in (*views, *zs): see(t)
    return sum(n for n, _ in sizes.values())

@pytest.mark.parametrize("name, norm", [
    ("resnet18", "batch"), ("resnet50", "batch"), ("densenet121", "batch"),
    ("resnet10_narrow", "group"),
])
@pytest.mark.parametrize("precision, dtype", [("fp32", None), ("bf16", torch.bfloat16)])
def test_estimate_is_what_a_forward_pass_saves(name, norm, precision, dtype):
    model = trident(name, (64, 64, 32), norm=norm)
    views = [torch.rand(2, 3, 64, 64) for _ in range(3)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    estimate = memory_estimate(model, [v.shape for v in views], precision).activations
    assert same(state, model.state_dict())
    real = really_saved(model, views, dtype)
    # under autocast real kernels keep the statistics of norms in 32 bits and the fake ones in 16:
    # below a hundredth
    assert estimate == real if dtype is None else .99*real < estimate <= real

def test_state_of_the_optimisers():
    model, x = siamese(small, (8, 4)), torch.rand(4, 3, 8, 8)
    for p in model.encoders[0].parameters(): p.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for name, optimizer in {
        "adamw": torch.optim.AdamW(trained),
        "adam": torch.optim.Adam(trained),
        "sgd": torch.optim.SGD(trained, 0.1, momentum=0.9),
    }.items():
        memory = memory_estimate(model, [x.shape] * 2, optimizer=name)
        optimizer.zero_grad()
        sum(z.square().sum() for z in model(x, x)).backward()
        optimizer.step()
        # less Adam's step count
        assert memory.optimizer == sum(
            t.nbytes
            for s in optimizer.state.values()
            for t in s.values()
            if isinstance(t, torch.Tensor) and t.ndim
        )
        assert memory.gradients == sum(p.grad.nbytes for p in trained)
        assert memory.parameters == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert (
            memory.total
            == memory.parameters + memory.gradients + memory.optimizer + memory.activations
        )

def test_estimate_of_a_network_that_was_never_built():
    with torch.device("meta"): meta = trident("resnet10_narrow", (16, 8))
    shapes = [(4, 3, 32, 32)]*3
    for precision in ("fp32", "bf16", "fp16"):
        assert memory_estimate(meta, shapes, precision) == memory_estimate(
            trident("resnet10_narrow", (16, 8)), shapes, precision
        )
    assert memory_estimate(meta, shapes, "fp16") == memory_estimate(meta, shapes, "bf16")

def test_estimates_need_a_shape_for_each_view():
    model = trident(small, (4, 2))
    for shapes in ((2, 3, 8, 8), [], None):
        with pytest.raises(ValueError, match="one shape for each view"):
            memory_estimate(model, shapes)
    with pytest.raises(ValueError, match="2 views for the 3 branches"):
        memory_estimate(model, [(2, 3, 8, 8)] * 2)
    with pytest.raises(ValueError, match="expected one of fp32, bf16, fp16"):
        memory_estimate(model, [(2, 3, 8, 8)] * 3, "int8")
    with pytest.raises(ValueError, match="expected one of sgd"):
        memory_estimate(model, [(2, 3, 8, 8)] * 3, optimizer="lion")

def test_fits():
    memory = Memory(1_000_000_000, 2_000_000_000, 3_000_000_000, 4_000_000_000)
    assert (
        memory.total == 10**10
        and not memory.fits(11)
        and memory.fits(11, spare=0)
        and memory.fits(12)
        and str(memory).startswith("10.00 GB (parameters 1.00")
    )

"""The loop: what a killed run leaves behind, what a full disk does, budgets, precision, watches,
trackers."""
import errno
import io
import os
import random
import resource
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from synthpi.train.checkpoints import Checkpoints
from synthpi.losses.paired import BarlowTwins, VICReg
from synthpi.train.trainer import Trainer

STEPS = 16
RUN = '''
import sys
import numpy as np, torch
from pathlib import Path
from torch import nn
from synthpi.core.seeds import seed_for
from synthpi.losses import VICReg
from synthpi.models.branches import Branches, Projector
from synthpi.models import make_encoder, save_encoder
from synthpi.data.recipes import strong
from synthpi.train import Trainer, paired_step
from synthpi.data import Views, batches

def step(model, loss, batch):
    "Draws from two generators: the dropout from PyTorch's, the noise from NumPy's"
    def noise(v): return torch.from_numpy(np.random.normal(0, .02, v.shape).astype("float32"))
    return paired_step(model, loss, batch | {"views": tuple(v + noise(v) for v in batch["views"])})

def build(run_dir, steps=%d, workers=2, **kw):
    rng = np.random.default_rng(0)
    tiles = [{"primary": rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)} for _ in range(50)]
    torch.manual_seed(0)
    np.random.seed(0)
    encoder = make_encoder("resnet10_narrow")
    head = nn.Sequential(nn.Dropout(.3), Projector(encoder.width, (64, 64)))
    model = Branches([encoder], [head], (0, 0))
    views = Views(tiles, [("primary", strong)]*2, 32)
    return Trainer(
        model, VICReg(), torch.optim.AdamW(model.parameters(), 1e-3),
        lambda start: batches(views, 12, steps, start, workers), steps,
        step=step, run_dir=run_dir, progress=None, **kw,
    )
''' % STEPS
MAIN = '''
trainer = build(sys.argv[1], save_every=.05, on_step=lambda t: print(t.done, flush=True))
trainer.fit()
encoder = trainer.accelerator.unwrap_model(trainer.model).encoders[0]
save_encoder(encoder, Path(sys.argv[1])/"encoder.safetensors", steps=trainer.done)
'''
build = {}
exec(RUN, build)
build = build["build"]

def start(script, folder):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )

def to_the_end(folder, monkeypatch):
    "The script in this process; the steps that it took"
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["run.py", str(folder)])
    with redirect_stdout(said): exec(RUN + MAIN, {})
    return [int(line) for line in said.getvalue().split()]

def test_kill_9_at_a_random_step_changes_nothing(tmp_path, monkeypatch):
    "Killed in a process of its own; left alone and taken up again in this one"
    script, kill_at = tmp_path/"run.py", random.SystemRandom().randrange(3, STEPS - 3)
    script.write_text(RUN + MAIN)
    assert to_the_end(tmp_path/"whole", monkeypatch) == list(range(1, STEPS + 1))
    killed = start(script, tmp_path/"killed")
    for line in killed.stdout:
        if int(line) == kill_at: break
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    assert not (tmp_path/"killed"/"encoder.safetensors").exists()
    steps = to_the_end(tmp_path/"killed", monkeypatch)
    assert steps[-1] == STEPS and 1 <= steps[0] <= kill_at + 1, kill_at
    for name in ("encoder.safetensors", "history.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), (name, kill_at)
    a, b = (Checkpoints(tmp_path/n/"checkpoints").load() for n in ("killed", "whole"))
    assert a["model"].keys() == b["model"].keys() and all(
        torch.equal(a["model"][k], b["model"][k]) for k in a["model"]
    )
    # no half-written file is left behind
    assert not [p for p in (tmp_path/"killed").rglob("*") if p.name.startswith((".", "writing"))]

def leave_out(name):
    "A loader of checkpoints that forgets one part of the state"
    whole = Checkpoints.load
    def load(self):
        state = whole(self)
        if state is None: return None
        fresh = build(None, workers=0).state()
        if name in ("torch", "numpy"): state["random"][0][name] = fresh["random"][0][name]
        elif name == "running statistics":
            state["model"] |= {k: v for k, v in fresh["model"].items() if "running" in k}
        elif name == "history":
            columns = state["history"].items()
            state["history"] = {k: [values[:-1], there[:-1]] for k, (values, there) in columns}
        elif name == "moments": state["optimizer"]["state"] = {}
        elif name: state[name] = fresh[name]
        return state
    return load

PARTS = ["model", "optimizer", "moments", "torch", "numpy", "running statistics", "history"]

@pytest.mark.parametrize("forgotten", [None, *PARTS])
def test_each_part_of_the_state_is_needed(forgotten, tmp_path, monkeypatch):
    """The control of the test above: whatever is left out is noticed, and nothing but what is left
    out changes the result"""
    def stop(trainer):
        if trainer.done == 4: raise KeyboardInterrupt
    build(tmp_path, steps=8, workers=0, on_step=stop).fit()
    monkeypatch.setattr(Checkpoints, "load", leave_out(forgotten))
    def result(run_dir):
        t = build(run_dir, steps=8, workers=0)
        return t.fit(), t.model.state_dict()
    result = result(tmp_path), result(None)
    same = result[0][0].equals(result[1][0]) and all(
        torch.equal(result[0][1][k], v) for k, v in result[1][1].items()
    )
    assert same == (forgotten is None)

# A small problem for everything else

class Two(nn.Module):
    "One linear map for every view"
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 8)
    def forward(self, *views): return tuple(self.net(v) for v in views)

def stream(start, n=16, views=2):
    k = start
    while True:
        g = torch.Generator().manual_seed(k)
        yield {
            "views": tuple(torch.randn(n, 6, generator=g) for _ in range(views)),
            "index": torch.arange(n * k, n * k + n),
        }
        k += 1

def trainer(run_dir=None, steps=20, **kw):
    torch.manual_seed(0)
    model = Two()
    return Trainer(
        model,
        kw.pop("loss", VICReg()),
        torch.optim.AdamW(model.parameters(), kw.pop("lr", 1e-2)),
        kw.pop("train_dl", stream),
        steps,
        run_dir=run_dir,
        progress=kw.pop("progress", None),
        **kw,
    )

def at(step, do):
    def on_step(t):
        if t.done == step: do(t)
    return on_step

@pytest.mark.parametrize("how", ["injected", "limit"])
def test_a_full_disk_keeps_the_last_good_checkpoint(how, tmp_path, monkeypatch):
    first = trainer(tmp_path, save_every=1e9, on_step=at(10, lambda t: t.save()))
    def full(t):
        if how == "injected":
            def fail(*a, **k):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(torch, "save", fail)
        # a real failing write, after 1000 bytes
        else:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            )
        t.save_every = 0.
    def both(t):
        at(10, lambda t: t.save())(t)
        at(12, full)(t)
    first.on_step = both
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(
                OSError, match="step 20 could not be written.*last good one is step-00000010"
            ):
                first.fit()
    finally:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2
        )
    monkeypatch.undo()
    # the work in memory is not thrown away
    assert first.done == 20 and [
        str(w.message) for w in said if "Training continues" in str(w.message)
    ]
    assert [p.name[:13] for p in (tmp_path/"checkpoints").iterdir()] == ["step-00000010"]
    # there is room again
    first.save()
    assert (
        Checkpoints(tmp_path / "checkpoints").paths()[0].name.startswith("step-00000020")
        and len(pd.read_csv(tmp_path / "history.csv")) == 20
    )

def test_a_small_file_system_that_is_really_full(tmp_path):
    mount = tmp_path/"small"
    mount.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        t = trainer(mount, steps=4)
        t.fit()
        (mount / "filler").write_bytes(
            b"x" * (os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize - 4096)
        )
        before = Checkpoints(mount/"checkpoints").load()
        with pytest.raises(OSError, match="No space left|could not be written"): t.save()
        after = Checkpoints(mount/"checkpoints").load()
        assert torch.equal(before["model"]["net.weight"], after["model"]["net.weight"])
    finally: subprocess.run(["umount", mount], check=True)

def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(tmp_path):
    whole = trainer(tmp_path/"a").fit()
    trainer(
        tmp_path / "b",
        on_step=lambda t: (
            t.save()
            if t.done in (6, 9)
            else at(12, lambda t: (_ for _ in ()).throw(KeyboardInterrupt))(t)
        ),
    ).fit()
    newest, before = Checkpoints(tmp_path/"b"/"checkpoints").paths()
    newest.write_bytes(newest.read_bytes()[:-7])
    second = trainer(tmp_path/"b")
    with pytest.warns(UserWarning, match="damaged"): assert second.load()
    assert second.done == int(before.name.split("-")[1]) == 9
    assert second.fit().equals(whole)

def test_a_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self): return os.system, (f"touch {tmp_path/'exploded'}",)
    checkpoints = Checkpoints(tmp_path/"checkpoints")
    checkpoints.save(1, {"model": Bomb()})
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"): checkpoints.load()
    assert not (tmp_path/"exploded").exists()

@pytest.mark.parametrize("change, message", [
    (dict(loss=BarlowTwins()), "loss was VICReg.* and is BarlowTwins"),
    (dict(loss=VICReg(covariance=2.)), "covariance=2.0"),
])
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    trainer(tmp_path).fit()
    with pytest.raises(ValueError, match=message): trainer(tmp_path, **change).fit()

def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(tmp_path).fit()
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="another model"):
        Trainer(
            model,
            VICReg(),
            torch.optim.AdamW(model.parameters(), 0.1),
            stream,
            20,
            run_dir=tmp_path,
        ).load()
    with pytest.raises(ValueError, match="optimizer was AdamW and is SGD"):
        Trainer(
            model, VICReg(), torch.optim.SGD(model.parameters(), 0.1), stream, 20, run_dir=tmp_path
        ).load()

def test_ctrl_c_keeps_the_work_and_returns(tmp_path):
    t = trainer(tmp_path, on_step=at(7, lambda t: os.kill(os.getpid(), signal.SIGINT)))
    history = t.fit()                                                       # returns
    assert t.interrupted and len(history) == 7
    assert Checkpoints(tmp_path/"checkpoints").paths()[0].name.startswith("step-00000007")
    t.on_step = None
    # the same trainer continues
    assert t.fit().equals(trainer().fit()) and not t.interrupted

def test_ctrl_c_in_the_middle_of_an_optimiser_step_waits_for_its_end(tmp_path):
    t, before = trainer(tmp_path), signal.getsignal(signal.SIGINT)
    step, count = t.optimizer.optimizer.step, []
    def interrupted(*a, **k):
        count.append(1)
        if len(count) == 5: os.kill(os.getpid(), signal.SIGINT)
        return step(*a, **k)
    t.optimizer.optimizer.step = interrupted
    t.fit()
    assert t.interrupted and t.done == 5
    # no step was taken twice
    assert trainer(tmp_path).fit().equals(trainer().fit())
    assert signal.getsignal(signal.SIGINT) is before

class Normed(nn.Module):
    "With BatchNorm and dropout: a step that is broken off could leave traces in both"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    def forward(self, *views): return tuple(self.net(v) for v in views)

def normed(run_dir=None, **kw):
    torch.manual_seed(0)
    model = Normed()
    return Trainer(
        model,
        VICReg(),
        torch.optim.AdamW(model.parameters(), 1e-2),
        stream,
        12,
        run_dir=run_dir,
        progress=None,
        **kw,
    )

def same(a, b):
    return a.history.equals(b.history) and all(
        torch.equal(x, y)
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values())
    )

@pytest.mark.parametrize("where", ["forward", "backward", "clip"])
@pytest.mark.parametrize("how", ["ctrl-c", "twice", "error"])
def test_a_step_that_is_broken_off_leaves_no_trace(where, how, tmp_path, monkeypatch):
    whole = normed()
    whole.fit()
    # the same trainer continues, or another process does
    for fresh in (False, True):
        folder, count = tmp_path/str(fresh), []
        t = normed(folder)
        def trouble():
            count.append(1)
            if len(count) != 5: return
            if how == "error": raise RuntimeError("out of memory")
            for _ in range(1 + (how == "twice")): os.kill(os.getpid(), signal.SIGINT)
        if where == "forward": hook = t.model.register_forward_hook(lambda *_: trouble())
        elif where == "backward": hook = t.model.net[0].weight.register_post_accumulate_grad_hook(lambda *_: trouble())
        else:
            clip = t.accelerator.clip_grad_norm_
            monkeypatch.setattr(t.accelerator, "clip_grad_norm_", lambda *a: (trouble(), clip(*a))[1])
        if how == "error":
            with pytest.raises(RuntimeError, match="out of memory"):
                t.fit()
        else:
            t.fit()
            assert t.interrupted
        # one Ctrl-C waits for the end of the step, two do not
        assert t.done == (5 if how == "ctrl-c" else 4)
        if fresh: t = normed(folder)
        t.fit()
        assert same(t, whole)

def test_a_batch_that_spoils_the_loss_does_not_spoil_batchnorm(tmp_path):
    def bad(start):
        return (
            b
            if 64 not in b["index"]
            else b | {"views": (b["views"][0] * float("nan"), b["views"][1])}
            for b in stream(start)
        )
    t = normed(tmp_path)
    t.train_dl = bad
    with pytest.raises(FloatingPointError): t.fit()
    resumed = normed(tmp_path)
    resumed.fit()
    assert resumed.model.net[1].running_mean.isfinite().all()
    whole = normed()
    whole.fit()
    assert same(resumed, whole)

def test_another_learning_rate_is_used_with_a_warning(tmp_path):
    trainer(tmp_path, on_step=at(8, lambda t: (_ for _ in ()).throw(KeyboardInterrupt))).fit()
    second = trainer(tmp_path, lr=1e-3)
    with pytest.warns(UserWarning, match="lr was 0.01 and is 0.001"): h = second.fit()
    usual = trainer().fit()
    np.testing.assert_allclose(h.lr[8:], usual.lr[8:] / 10)
    np.testing.assert_allclose(h.lr[:8], usual.lr[:8])

def test_an_optimiser_keeps_its_own_learning_rate():
    t = trainer()
    t.fit()
    # not the last value of the schedule
    assert t.optimizer.param_groups[0]["lr"] == 1e-2

def test_parts_that_were_frozen_stay_frozen_and_callbacks_may_evaluate():
    torch.manual_seed(0)
    model = nn.Sequential(Normed(), nn.Identity())
    model[0].net[1].eval()
    def step(m, l, b): return l(*m[0](*b["views"]))
    seen = []
    t = Trainer(
        model,
        VICReg(),
        torch.optim.AdamW(model.parameters(), 1e-2),
        stream,
        3,
        step=lambda m, l, b: (
            seen.append((m[0].net[2].training, m[0].net[1].training)),
            step(m, l, b),
        )[1],
        on_step=lambda t: t.model.eval(),
        progress=None,
    )
    with pytest.warns(UserWarning, match="1 parts of the model are in eval mode"): t.fit()
    assert seen == [(True, False)]*3 and torch.equal(model[0].net[1].running_mean, torch.zeros(8))

def test_a_loss_with_state_is_a_part_of_the_run(tmp_path):
    class Learnt(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))
        def forward(self, a, b): return ((a - b).square().mean()*self.scale.exp() - self.scale), {}
    def build(folder=None, **kw):
        torch.manual_seed(0)
        model, loss = Two(), Learnt()
        return Trainer(
            model,
            loss,
            torch.optim.AdamW([*model.parameters(), *loss.parameters()], 1e-2),
            stream,
            10,
            run_dir=folder,
            progress=None,
            **kw,
        )
    whole = build()
    whole.fit()
    build(tmp_path, on_step=at(5, lambda t: (_ for _ in ()).throw(KeyboardInterrupt))).fit()
    resumed = build(tmp_path)
    resumed.fit()
    assert (
        resumed.history.equals(whole.history)
        and torch.equal(resumed.loss.scale, whole.loss.scale)
        and whole.loss.scale != 0
    )

def test_terms_that_come_and_go_are_kept_as_they_were(tmp_path):
    def step(model, loss, batch):
        scalar, terms = loss(*model(*batch["views"]))
        k = int(batch["index"][0])//16
        return scalar, terms | ({"sometimes": float("nan") if k == 2 else k} if k % 2 == 0 else {})
    whole = trainer(step=step).fit()
    trainer(
        tmp_path, step=step, on_step=at(7, lambda t: (_ for _ in ()).throw(KeyboardInterrupt))
    ).fit()
    assert trainer(tmp_path, step=step).fit().equals(whole)
    assert trainer(step=step, accumulate=2, steps=3).fit().sometimes.notna().sum() == 2

def test_a_loader_that_fails_leaves_a_checkpoint(tmp_path):
    def failing(start):
        for k, b in enumerate(stream(start)):
            if k == 6: raise OSError("a file is gone")
            yield b
    with pytest.raises(OSError, match="a file is gone"): trainer(tmp_path, train_dl=failing).fit()
    assert trainer(tmp_path).fit().equals(trainer().fit())

def test_two_precisions_do_not_leak_into_each_other(tmp_path):
    torch.manual_seed(0)
    model = Two()
    def fit(precision):
        t = Trainer(
            model,
            VICReg(),
            torch.optim.AdamW(model.parameters(), 0.0),
            stream,
            2,
            precision=precision,
            progress=None,
        )
        return t, lambda: t.fit().loss[0]
    (first, low), (second, high), (third, usual) = fit("bf16"), fit("fp32"), fit(None)
    a, b, c = high(), low(), usual()
    # built in one order, run in another
    assert a == c != b and b == pytest.approx(a, rel=.02)
    assert model(*next(stream(0))["views"])[0].dtype == torch.float32
    import pickle
    pickle.loads(pickle.dumps(model))

def test_accumulated_batches_average_their_gradients():
    one = trainer(steps=1, accumulate=3, clip=None)
    model = Two()
    model.load_state_dict(one.model.state_dict())
    it = stream(0)
    loss = sum(VICReg()(*model(*next(it)["views"]))[0] for _ in range(3))/3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    row = one.fit().iloc[0]
    # float32 sums in another order
    assert row.loss == pytest.approx(loss.item(), rel=1e-6) and row.grad_norm == pytest.approx(
        norm.item(), rel=1e-5
    )
    seen = []
    resumed = trainer(
        steps=2, accumulate=3, train_dl=lambda start: (seen.append(start), stream(start))[1]
    )
    resumed.rows = [{"step": 1, "loss": 0.}]
    resumed.fit()
    # step 1 begins at batch 3
    assert seen == [3]

def test_the_learning_rate_and_the_norm_are_what_the_history_says():
    t = trainer(schedule=lambda k: .5**k, clip=.01)
    h = t.fit()
    np.testing.assert_allclose(h.lr, 1e-2*.5**np.arange(20))
    t = trainer(steps=1, clip=.01)
    old = t.optimizer.optimizer.step
    norms = []
    t.optimizer.optimizer.step = lambda *a, **k: (
        norms.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]).norm().item()),
        old(*a, **k),
    )
    # the history has the norm before clipping
    assert t.fit().grad_norm[0] > 1 and norms[0] == pytest.approx(.01, rel=1e-4)

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(bad, tmp_path):
    def step(model, loss, batch):
        scalar, terms = loss(*model(*batch["views"]))
        return scalar*(bad if 64 in batch["index"] else 1), terms
    t = trainer(tmp_path, step=step)
    with pytest.raises(
        FloatingPointError, match=r"step 4 .*records \[64, 65.*state before this step"
    ):
        t.fit()
    clean = trainer(steps=20, on_step=at(4, lambda t: (_ for _ in ()).throw(KeyboardInterrupt)))
    clean.fit()
    assert t.done == 4 and all(
        torch.equal(a, b) for a, b in zip(t.model.parameters(), clean.model.parameters())
    )
    assert Checkpoints(tmp_path/"checkpoints").paths()[0].name.startswith("step-00000004")

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which can")
def test_half_precision_of_gpus_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="no GPU"): trainer(precision="fp16")

def test_epochs_are_counted_in_steps():
    ends = []
    t = trainer(steps=None, epochs=3, epoch_steps=2.5, on_epoch=lambda t: ends.append(t.done))
    # the steps in which 2.5, 5 and 7.5 are reached
    assert len(t.fit()) == 8 and ends == [3, 5, 8]

def test_time_ends_a_run_that_can_be_given_more(tmp_path):
    import time
    def slow(t): return time.sleep(.02)
    t = trainer(tmp_path, steps=1000, minutes=.3/60, on_step=slow)
    t.fit()
    assert t.out_of_time and 1 <= t.done < 1000
    again = trainer(tmp_path, steps=1000, minutes=.6/60, on_step=slow)
    again.fit()
    assert again.done > t.done and again.seconds >= .6

def test_precision_is_really_lower_and_two_can_live_in_one_process():
    dtypes = {}
    def step(model, loss, batch):
        handle = model.net.register_forward_hook(
            lambda m, i, o: dtypes.update({precision: o.dtype})
        )
        result = loss(*model(*batch["views"]))
        handle.remove()
        return result
    for precision in ("bf16", "fp32", "bf16"):
        t = trainer(steps=2, precision=precision, step=step)
        h = t.fit()
        assert t.model.net.weight.dtype == torch.float32 and np.isfinite(h.loss).all()
    assert dtypes == {"bf16": torch.bfloat16, "fp32": torch.float32}

def test_images_get_the_memory_format_of_the_trainer():
    seen = []
    def step(model, loss, batch):
        seen.append(
            (
                batch["views"][0].is_contiguous(memory_format=torch.channels_last),
                model[0].weight.is_contiguous(memory_format=torch.channels_last),
            )
        )
        return model(batch["views"][0]).square().mean(), {}
    for wanted in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        Trainer(
            model,
            None,
            torch.optim.SGD(model.parameters(), 0.1),
            lambda s: iter([{"views": (torch.randn(2, 3, 8, 8),)}]),
            1,
            step=step,
            channels_last=wanted,
            progress=None,
        ).fit()
    assert seen == [(False, False), (True, True)]

def test_compiled_or_not_the_numbers_agree(tmp_path):
    plain, compiled = trainer(steps=4).fit(), trainer(tmp_path, steps=4, compile="aot_eager").fit()
    # the compiler may reorder float32 sums, and steps carry that on
    np.testing.assert_allclose(plain.loss, compiled.loss, rtol=1e-4)
    # no prefix of the compiler's
    assert list(Checkpoints(tmp_path/"checkpoints").load()["model"]) == ["net.weight", "net.bias"]

def test_tensorboard_gets_every_row(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    h = trainer(
        steps=5,
        progress="study",
        accelerator=Accelerator(log_with="tensorboard", project_dir=str(tmp_path)),
    ).fit()
    log = events.EventAccumulator(str(tmp_path/"study")).Reload()
    for name in ("loss", "invariance", "lr", "grad_norm"):
        got = log.Scalars(name)
        assert [e.step for e in got] == [1, 2, 3, 4, 5]
        # stored in float32
        np.testing.assert_allclose([e.value for e in got], h[name], rtol=1e-6)

@pytest.mark.parametrize("collapsed", [True, False])
def test_a_collapse_gives_a_warning(collapsed):
    t = trainer(steps=200, watch_every=25)
    t.loss = VICReg(variance=0., covariance=0.) if collapsed else VICReg()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        h = t.fit()
    warned = [str(w.message) for w in said if "collapsed" in str(w.message)]
    # the first step and every 25th
    assert bool(warned) == collapsed and h["std"].notna().sum() == 9
    if collapsed: assert "larger weight on variance" in warned[0]

def test_a_transform_sees_the_batch_on_the_device():
    def transform(batch): return batch | {"views": tuple(v*0 + 1 for v in batch["views"])}
    seen = []
    trainer(
        steps=1,
        transform=transform,
        step=lambda m, l, b: (seen.append(b["views"][0].unique().tolist()), l(*m(*b["views"])))[1],
    ).fit()
    assert seen == [[1.0]]

def test_a_gradient_that_is_no_number_stops_the_run():
    def step(model, loss, batch):
        # 0, with an infinite slope times zero
        scalar = (model(*batch["views"])[0]*0).abs().sum().sqrt()
        return scalar, {}
    t = trainer(step=step)
    with pytest.raises(FloatingPointError, match="norm of the gradient is nan at step 0"): t.fit()

@pytest.mark.parametrize("left", (None, 3))
def test_a_history_that_was_not_written_in_time_is_written_again(left, tmp_path):
    "Killed between the last checkpoint and history.csv"
    whole = trainer(tmp_path).fit()
    if left is None: (tmp_path/"history.csv").unlink()
    else: whole[:left].to_csv(tmp_path/"history.csv", index=False)
    assert trainer(tmp_path).fit().equals(whole)
    assert len(pd.read_csv(tmp_path/"history.csv")) == len(whole)

def test_sigterm_saves_and_ends_the_process(tmp_path):
    t = trainer(tmp_path, on_step=at(7, lambda t: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as ended: t.fit()
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert Checkpoints(tmp_path/"checkpoints").paths()[0].name.startswith("step-00000007")
    assert trainer(tmp_path).fit().equals(trainer().fit())

ONE_ROW = '''
import os, sys
import torch
from torch import nn
from synthpi.losses import VICReg
from synthpi.train import Trainer
from synthpi.train.batchnorm import synchronise_batchnorm
from synthpi.train.processes import make_accelerator

rank, rows = int(os.environ["RANK"]), 2 - int(os.environ["RANK"])
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = synchronise_batchnorm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), "cpu")
    def forward(self, *views): return tuple(self.net(v) for v in views)

def stream(start):
    for k in range(start, 9):
        z = torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(9*k + rank))
        yield {"views": tuple(z*(float("nan") if k == 3 and rank else 1)), "index": torch.arange(rows) + 40*rank}

model = Net()
trainer = Trainer(
    model, VICReg(), torch.optim.SGD(model.parameters(), .1), stream, 9, watch_every=1, progress=None,
    accelerator=make_accelerator(cpu=True),
)
try: trainer.fit()
except FloatingPointError as error: print(trainer.done, len(trainer.history.dropna()), error, flush=True)
torch.distributed.destroy_process_group()
'''

@pytest.mark.slow
def test_a_process_with_one_row_takes_part_and_its_records_are_named(tmp_path):
    (tmp_path/"run.py").write_text(ONE_ROW)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, tmp_path/"run.py"], capture_output=True, text=True, timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout.splitlines()
    assert len(told) == 2 and all(line.startswith("3 3 the loss is nan at step 3") for line in told)
    assert all("records of process 0: [0, 1]; records of process 1: [40]" in line for line in told)

"What a TorchScript or ONNX file must not do: each way in, tried, and nothing has happened."
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from synthpi.pairs.foreign import ResNet, UNet
from synthpi.pairs.generators import load_generator, make_resnet, make_unet
from synthpi.pairs.graphs import look_at_onnx, open_script

def spill(x, file:str):
    torch.save(x, file)
    return x

class Inner(nn.Module):
    def __init__(self, file):
        super().__init__()
        self.file:str = file
    def forward(self, x): return spill(x, self.file)

class InSubmodule(Inner):
    def __init__(self, file):
        super().__init__(file)
        self.parts = nn.ModuleList([Inner(file)])
    def forward(self, x):
        for part in self.parts: x = part(x)
        return x

class InBlock(Inner):
    def forward(self, x):
        for k in range(2):
            if k == 1: x = x + torch.from_file(self.file, True, 5, dtype=torch.uint8).fill_(65)[0]
        return x

class InAnotherMethod(Inner):
    def forward(self, x): return x
    @torch.jit.export
    def __len__(self)->int:
        torch.save(1, self.file)
        return 1

class InAnotherThread(Inner):
    def forward(self, x): return torch.jit.wait(torch.jit.fork(spill, x, self.file))

class ByAnObject(Inner):
    def forward(self, x): return Spiller(self.file).spill(x)

@torch.jit.script
class Spiller:
    def __init__(self, file:str): self.file = file
    def spill(self, x):
        torch.save(x, self.file)
        return x

class WhileOpened(nn.Module):
    def __init__(self, file):
        super().__init__()
        self.file:str = file
    def forward(self, x): return x
    @torch.jit.export
    def __getstate__(self)->tuple[str, bool]: return self.file, self.training
    @torch.jit.export
    def __setstate__(self, state:tuple[str, bool]):
        self.file, self.training = state
        torch.save(1, self.file)

class WithDefault(nn.Module):
    def forward(self, x, n:int=3): return x + n

def with_default(source, path, default, name=lambda n: n):
    "The module's file with another default value"
    torch.jit.script(WithDefault()).save(source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for n in old.namelist():
            new.writestr(name(n), old.read(n).replace(b"n: int=3", f"n: int={default}".encode()))

@pytest.mark.parametrize(
    "make",
    [Inner, InSubmodule, InBlock, InAnotherMethod, InAnotherThread, ByAnObject],
    ids=lambda m: m.__name__,
)
def test_a_program_that_opens_files_is_refused_and_has_not_run(tmp_path, make):
    file = tmp_path/"theirs.txt"
    torch.jit.script(make(str(file))).save(tmp_path/"g.pt")
    for touched in (False, True):
        if touched: file.write_text("a file of the user")
        with pytest.raises(ValueError, match=r"uses .*(save|from_file|fork).*It is not run"):
            load_generator(tmp_path/"g.pt", range=(0, 1))
        assert file.read_text() == "a file of the user" if touched else not file.exists()

def test_what_would_run_while_it_is_opened_is_refused(tmp_path):
    file, path = tmp_path/"theirs.txt", tmp_path/"g.pt"
    torch.jit.script(WhileOpened(str(file))).save(path)
    with pytest.raises(ValueError, match="while it is opened \\(__setstate__\\)"): open_script(path)
    default = f'torch.numel(torch.from_file("{file}", True, 5, dtype=0).fill_(65))'
    file.write_text("a file of the user")
    for name in (lambda n: n, lambda n: n.replace("/code/", "/CODE/").replace(".py", ".PY")):
        with_default(tmp_path/"plain.pt", path, default, name)
        with pytest.raises(ValueError, match="while it is opened \\(torch.numel"): open_script(path)
    assert file.read_text() == "a file of the user"
    with_default(tmp_path/"plain.pt", path, "-7")
    assert open_script(path)[0](torch.zeros(1)) == -7

@pytest.mark.parametrize("how", ["traced", "scripted"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(3, width=4),
        lambda: ResNet(1, width=4, dropout=True),
        lambda: ResNet(1, width=4, padding="replicate", norm="batch"),
        lambda: make_resnet(4, 1, antialias=True),
        lambda: make_unet(4),
    ],
    ids=["unet", "resnet", "replicate", "blur", "monai"],
)
def test_generators_still_open(tmp_path, make, how):
    torch.manual_seed(0)
    net, x = make().eval(), torch.rand(1, 3, 32, 32)
    made = torch.jit.script(net) if how == "scripted" else torch.jit.trace(net, x)
    made.save(tmp_path/"g.pt")
    torch.testing.assert_close(open_script(tmp_path/"g.pt")[0](x), net(x))

class Everyday(nn.Module):
    "What networks do beside convolutions"
    def forward(self, x):
        y = nn.functional.interpolate(x, scale_factor=2., mode="bilinear", align_corners=False)
        y = nn.functional.interpolate(y, size=[32, 32], mode="nearest")
        q = nn.functional.pixel_unshuffle(y, 2).flatten(2).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(1, 12, 16, 16)
        y = nn.functional.pixel_shuffle(nn.functional.layer_norm(y, [16, 16]), 2)
        y = torch.einsum("bchw,dc->bdhw", [y, torch.eye(3)])
        y = nn.functional.pad(nn.functional.gelu(y), [1, 1, 1, 1], mode="reflect")[:, :, 1:-1, 1:-1]
        y = y*torch.rsqrt(y.pow(2).mean(dim=[2, 3], keepdim=True) + 1e-8)
        a, b = torch.chunk(torch.cat([y, y], 1), 2, 1)
        y[:, 0] = torch.where(a > b, a, b).softmax(1)[:, 0]
        return y.to(torch.float32).clamp(0, 1)

@pytest.mark.parametrize("how", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(1, 3, 32, 32))])
def test_everyday_operators_are_allowed(tmp_path, how):
    how(Everyday().eval()).save(tmp_path/"g.pt")
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(open_script(tmp_path/"g.pt")[0](x), Everyday()(x))

def varint(n):
    out = b""
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])

def message(*fields):
    "A protobuf message"
    out = b""
    for number, value in fields:
        value = value.encode() if isinstance(value, str) else value
        out += varint(number << 3 | 2) + varint(len(value)) + value
    return out

def external(file): return message((13, message((1, "location"), (2, file))))

def model(*graph, **functions):
    own = [(25, message((10, domain), (7, node))) for domain, node in functions.items()]
    return message((7, message(*graph)), *own)

NODE = (1, message((4, "Relu")))
STRANGE = message((4, "Run"), (7, "their"))

@pytest.mark.parametrize("file", ["/etc/hostname", "../secret", "a/b", "..\\secret", "..", ""])
@pytest.mark.parametrize(
    "place",
    [
        lambda t: model(NODE, (5, t)),
        lambda t: model(NODE, (15, message((1, t)))),
        lambda t: model((1, message((4, "Constant"), (5, message((5, t)))))),
        lambda t: model((1, message((4, "If"), (5, message((6, message((5, t)))))))),
        lambda t: model(NODE, f=message((4, "Constant"), (5, message((10, t))))),
    ],
    ids=["initializer", "sparse", "attribute", "subgraph", "function"],
)
def test_onnx_weights_from_elsewhere_are_refused(tmp_path, place, file):
    (tmp_path/"g.onnx").write_bytes(place(external(file)))
    with pytest.raises(ValueError, match="expected a file in its own folder"):
        look_at_onnx(tmp_path/"g.onnx")

def test_onnx_weights_through_a_link_are_refused(tmp_path):
    (tmp_path/"in").mkdir()
    (tmp_path/"secret").write_text("a file of the user")
    (tmp_path/"in/w").symlink_to(tmp_path/"secret")
    (tmp_path/"in/g.onnx").write_bytes(model(NODE, (5, external("w"))))
    with pytest.raises(ValueError, match="expected a file in its own folder"):
        look_at_onnx(tmp_path/"in/g.onnx")

def test_onnx_operators_of_a_domain_of_their_own_are_refused(tmp_path):
    path = tmp_path/"g.onnx"
    for content in (
        model((1, STRANGE)),
        model((1, message((4, "If"), (5, message((6, message((1, STRANGE)))))))),
        model(NODE, f=STRANGE),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="uses their::Run"): look_at_onnx(path)
    # a function that the file itself defines
    path.write_bytes(model((1, STRANGE), (1, message((4, "Tanh"))), their=NODE[1]))
    assert look_at_onnx(path) == ("Tanh", [])

def test_damaged_onnx_is_said(tmp_path):
    path, content = tmp_path/"g.onnx", model(NODE)
    for damaged in (content[:-1], b"no graph", b"\xff"*20, b""):
        path.write_bytes(damaged)
        if not damaged: assert look_at_onnx(path) == ("none", [])
        else:
            with pytest.raises(ValueError, match="not an ONNX graph"): look_at_onnx(path)

def test_weights_beside_the_graph_are_part_of_its_identity(tmp_path, monkeypatch):
    class Session:
        def __init__(self, path, providers): pass
        def get_inputs(self):
            return [types.SimpleNamespace(name="x", shape=["b", 3, "h", "w"], type="tensor(float)")]
    runtime = types.SimpleNamespace(InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    (tmp_path/"g.onnx").write_bytes(model(NODE, (5, external("g.data"))))
    keys = set()
    for content in ("one", "two"):
        (tmp_path/"g.data").write_text(content)
        keys.add(load_generator(tmp_path/"g.onnx", range=(0, 1), verbose=False).key)
    assert len(keys) == 2

def test_a_real_export_is_read(tmp_path):
    pytest.importorskip("onnx")
    net, x = ResNet(1, width=4).eval(), torch.rand(1, 3, 32, 32)
    torch.onnx.export(net, (x,), str(tmp_path/"g.onnx"), dynamo=False)
    assert look_at_onnx(tmp_path/"g.onnx") == ("Tanh", [])

"Files as microscopes, viewers and broken downloads write them: read right, or refused with the cause."
import io
import os
import warnings

import numpy as np
import pytest
import tifffile
from datasets import Dataset, Image as ImageFeature
from PIL import Image

from synthpi.core.files import atomic_path, remove_unfinished
from synthpi.core.formats import read_picture
from synthpi.core.images import to_mask, to_raw, to_rgb
from synthpi.data.conversion import _rgb8
from synthpi.data.folders import image_folder, pair_folders
from synthpi.data.splits import check_images
from synthpi.data.views import Images

RGB = np.kron(np.random.default_rng(0).integers(20, 236, (3, 4, 3)), np.ones((6, 5, 1))).astype(np.uint8)
DEEP = RGB.astype(np.uint16)*257
GRAY = DEEP[..., 0]
FIRST = np.moveaxis(DEEP, 2, 0)     # channels first

def column(path):
    return Dataset.from_dict({"x": [str(path)]}).cast_column("x", ImageFeature())

def readers(path):
    "The pixels by every way that a file takes into the library, as functions."
    return [
        lambda: to_rgb(read_picture(path)[0]),
        lambda: to_rgb(Image.open(path)),
        lambda: to_rgb(column(path)[0]["x"]),
        lambda: Images(column(path), "x", 18)[0],
    ]

RIGHT = [
    dict(data=RGB, photometric="rgb"),
    dict(data=np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate"),
    dict(data=DEEP, photometric="rgb"), dict(data=DEEP, photometric="rgb", byteorder=">"),
    dict(data=DEEP, photometric="rgb", compression="zlib", predictor=True),
    dict(data=FIRST, photometric="rgb", planarconfig="separate", compression="zlib"),
    dict(data=FIRST, photometric="rgb", planarconfig="separate", compression="zlib", tile=(16, 16)),
    dict(data=RGB, photometric="rgb", tile=(16, 16)), dict(data=DEEP, photometric="rgb", tile=(16, 16)),
    dict(data=RGB, photometric="rgb", bigtiff=True), dict(data=DEEP, photometric="rgb", bigtiff=True),
    dict(data=RGB, imagej=True), dict(data=RGB, photometric="rgb", ome=True),
]

@pytest.mark.parametrize("how", RIGHT, ids=lambda how: ",".join(map(str, [*how, how["data"].dtype])))
def test_tiff_kinds_that_are_read(tmp_path, how):
    tifffile.imwrite(tmp_path/"x.tif", **how)
    for read in readers(tmp_path/"x.tif")[:3]: assert np.array_equal(read(), RGB)

def test_white_is_zero_with_8_bits_is_turned(tmp_path):
    tifffile.imwrite(tmp_path/"x.tif", RGB[..., 0], photometric="miniswhite")
    assert np.array_equal(to_rgb(read_picture(tmp_path/"x.tif")[0])[..., 0], 255 - RGB[..., 0])

@pytest.mark.parametrize("how, words", [
    (dict(data=FIRST, photometric="rgb", planarconfig="separate"), "one after another"),
    (dict(data=FIRST, photometric="rgb", planarconfig="separate", tile=(16, 16)), "one after another"),
    (dict(data=GRAY, photometric="miniswhite"), "white is 0"),
    (dict(data=GRAY, photometric="miniswhite", compression="zlib"), "white is 0"),
    (dict(data=np.stack([RGB]*3), photometric="rgb"), "holds 3 pages"),
    (dict(data=FIRST, imagej=True, metadata={"axes": "CYX"}), "holds 3 pages or planes"),
    (dict(data=FIRST, ome=True, photometric="minisblack", metadata={"axes": "CYX"}), "holds 3 pages"),
    (dict(data=np.stack([RGB[..., 0]]*4), photometric="minisblack", volumetric=True, tile=(16, 16, 16)),
     "holds 4 pages or planes"),
    (dict(data=RGB[..., :2], photometric="minisblack", planarconfig="contig"), "2 channels, of which 1"),
    (dict(data=RGB[..., 0].astype(np.int8), photometric="minisblack"), "signed"),
    (dict(data=np.concatenate([RGB]*2, 2), photometric="minisblack", planarconfig="contig"), "6 channels of 8"),
    (dict(data=RGB/np.float32(255), photometric="rgb"), "3 channels of 32 bits .float32"),
])
def test_tiff_kinds_that_are_refused(tmp_path, how, words):
    path = tmp_path/"tile.tif"
    tifffile.imwrite(path, **how)
    opens = "cannot be read here" not in str(pytest.raises(ValueError, read_picture, path).value)
    for read in readers(path) if opens else readers(path)[::3]:
        with pytest.raises(ValueError, match=f"tile.tif .*{words}"): read()
    if opens:
        for read in (to_raw, to_mask):
            with pytest.raises(ValueError, match=words): read(Image.open(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=f"1 of 1 images cannot be used: tile.tif .*{words}"):
            check_images(image_folder(tmp_path))

def test_a_pyramid_is_one_picture_and_an_animation_is_not(tmp_path):
    with tifffile.TiffWriter(tmp_path/"pyramid.tif") as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(to_rgb(read_picture(tmp_path/"pyramid.tif")[0]), RGB)
    other = Image.fromarray(255 - RGB)
    Image.fromarray(RGB).save(tmp_path/"two.png", save_all=True, append_images=[other])
    with pytest.raises(ValueError, match="two.png holds 2 pages"): read_picture(tmp_path/"two.png")

@pytest.mark.parametrize("compression", [33003, 34712])
def test_jpeg_2000_in_tiff_is_named(tmp_path, compression):
    tifffile.imwrite(tmp_path/"x.tif", RGB, photometric="rgb")
    data = bytearray((tmp_path/"x.tif").read_bytes())
    tag = data.index((259).to_bytes(2, "little"), 8)
    data[tag + 8:tag + 12] = compression.to_bytes(4, "little")
    (tmp_path/"x.tif").write_bytes(data)
    with pytest.raises(ValueError, match="x.tif is a TIFF that cannot be read here: .*compression .*J"):
        read_picture(tmp_path/"x.tif")

@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("gray", [True, False])
def test_12_bits_in_16_are_refused_as_a_set(tmp_path, suffix, gray):
    if suffix == "png" and not gray: pytest.skip("nothing here writes PNG of 16-bit colours")
    x = (GRAY if gray else DEEP) >> 4
    for i in range(2):
        if suffix == "png": Image.fromarray(x + i).save(tmp_path/f"{i}.png")
        else: tifffile.imwrite(tmp_path/f"{i}.tif", x, photometric="minisblack" if gray else "rgb")
    with pytest.warns(UserWarning, match="no group"): ds = image_folder(tmp_path)
    with pytest.raises(ValueError, match="2 images of 16 bits .* hold 12 bits .* Multiply them by 16"):
        check_images(ds)
    Image.fromarray(GRAY).save(tmp_path/"bright.png")
    with pytest.warns(UserWarning, match="no group"): check_images(image_folder(tmp_path))

# ---- EXIF orientation

def turned(path, orientation, x=RGB):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(x).save(path, exif=exif)
    return path

@pytest.mark.parametrize("orientation, truth", [(3, np.rot90(RGB, 2)), (6, np.rot90(RGB, -1)), (2, RGB[:, ::-1])])
def test_orientation_holds_in_every_reader(tmp_path, orientation, truth):
    path = turned(tmp_path/"x.png", orientation)
    for read in readers(path)[:3]: assert np.array_equal(read(), truth)
    assert np.array_equal(_rgb8(path), truth)
    assert np.allclose(to_raw(Image.open(path)), truth/255, atol=1e-6)

def test_pairs_are_compared_as_they_are_seen(tmp_path):
    for side in ("image", "privileged"): (tmp_path/side).mkdir()
    turned(tmp_path/"image/a.png", 6)
    Image.fromarray(np.rot90(RGB, -1).copy()).save(tmp_path/"privileged/a.png")
    with pytest.warns(UserWarning, match="no group"): assert len(pair_folders(tmp_path)) == 1
    Image.fromarray(RGB).save(tmp_path/"privileged/a.png")
    with pytest.raises(ValueError, match=r"a \(18x20 and 20x18\)"): pair_folders(tmp_path)

# ---- broken files

def encoded(suffix, **how):
    file = io.BytesIO()
    Image.fromarray(np.kron(RGB, np.ones((4, 4, 1), np.uint8))).save(file, suffix, **how)
    return file.getvalue()

@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("name, data, words", [
    ("a.png", b"<!DOCTYPE html><html>404</html>", "is a web page"),
    ("b.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ("c.png", b"", "is empty"), ("d.png", bytes(4000), "zeros only"), ("e.png", b"PK\3\4" + bytes(9), "an archive"),
    ("f.png", b"what is this", "cannot be decoded"),
    *((f"cut.{suffix}", encoded(suffix, **how)[:-60], "is cut off or damaged") for suffix, how in [
        ("png", {}), ("jpeg", {}), ("tiff", {}), ("tiff", dict(compression="tiff_lzw")),
    ]),
    ("half.jpeg", encoded("jpeg")[:200], "is cut off or damaged"),
    ("half.tiff", encoded("tiff", compression="tiff_lzw")[:200], "is cut off or damaged"),
])
def test_broken_files_are_named_with_their_cause(tmp_path, name, data, words):
    (tmp_path/name).write_bytes(data)
    for read in readers(tmp_path/name)[::3]:
        with pytest.raises(ValueError, match=f"{name} .*{words}"): read()

def test_too_many_pixels_are_to_be_cut(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path/"x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="x.png is too large .*: cut it into tiles"):
        read_picture(tmp_path/"x.png")

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path/"x.png")
    for read in readers(tmp_path/"x.png")[::3]:
        with pytest.raises(ValueError, match="x.png is no file"): read()

# ---- files of killed runs

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_write_leaves_nothing_for_long(tmp_path):
    "A process that dies while it writes; the next one writes over its file, or sweeps it."
    for name in ("run.json", "other.json"):
        if not (child := os.fork()):
            with atomic_path(tmp_path/name) as tmp:
                tmp.write_text("half")
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.glob(".*"))) == 2
    with atomic_path(tmp_path/"run.json") as tmp: tmp.write_text("whole")
    assert [p.name.split("-")[0] for p in tmp_path.glob(".*")] == [".other"]
    assert remove_unfinished(tmp_path) == 1 and [p.name for p in tmp_path.iterdir()] == ["run.json"]

def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic_path(tmp_path/"a.txt") as one, atomic_path(tmp_path/"a.txt") as two:
        one.write_text("1")
        two.write_text("2")
        assert one != two and remove_unfinished(tmp_path) == 0
    assert (tmp_path/"a.txt").read_text() == "1" and len(list(tmp_path.iterdir())) == 1

"Masks as programs write them: those that say the opposite, or more than they mean, train no generator."
import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from datasets import Dataset, Image as ImageFeature
from PIL import Image

from synthpi.core.images import to_mask, to_rgb
from synthpi.data.folders import pair_folders
from synthpi.data.phantoms import pair_phantoms
from synthpi.pairs.examples import read_examples
from synthpi.pairs.masks import check_polarity, haematoxylin_correlation
from synthpi.pairs.objectives import read_mask, Regression

REAL = Path(__file__).parents[3]/"shared/data"
TISSUE = pair_phantoms(4, 4, size=64)
MASKS = [m > 0 for m in TISSUE.mask]

def gray(x): return Image.fromarray(np.uint8(x)*255)

def palette(x, first, second):
    "Index 1 where `x`, in the two colours."
    image = Image.fromarray(np.uint8(x))
    image.putpalette([*first, *second])
    return image

def pairs_of(tmp_path, save, **columns):
    "A folder of the phantoms, each mask written by `save(mask, path without suffix)`."
    for side in ("image", "privileged"): (tmp_path/side).mkdir()
    for i, (x, m) in enumerate(zip(TISSUE.image, MASKS)):
        Image.fromarray(x).save(tmp_path/f"image/{i}.png")
        save(m, tmp_path/f"privileged/{i}")
    with pytest.warns(UserWarning, match="no group"): return pair_folders(tmp_path)

def read(ds): return read_examples(ds, Regression("mask"), um_per_px=.5)

def png(make): return lambda m, path: make(m).save(f"{path}.png")
def minus(m): return ~np.asarray(m)
WHITE, BLACK, GREEN = (255, 255, 255), (0, 0, 0), (0, 200, 0)

@pytest.mark.filterwarnings("ignore:the masks have")
@pytest.mark.parametrize("save", [
    png(gray), png(lambda m: Image.fromarray(np.uint8(m))), png(Image.fromarray),
    png(lambda m: palette(m, BLACK, WHITE)), png(lambda m: palette(~m, WHITE, BLACK)),
    png(lambda m: palette(m, BLACK, GREEN)), png(lambda m: palette(m, WHITE, GREEN)),
    png(lambda m: Image.fromarray(np.where(m, 1 + np.arange(64)//8, 0).astype(np.uint16))),
    png(lambda m: Image.fromarray(np.where(m, np.where(np.roll(m, 1, 0), 255, 128), 0).astype(np.uint8))),
    lambda m, path: tifffile.imwrite(f"{path}.tif", ~m, photometric="miniswhite"),
], ids="gray ones bits black-white white-black black-green white-green numbers rim miniswhite".split())
def test_right_masks_are_read(tmp_path, save):
    targets = read(pairs_of(tmp_path, save)).targets
    assert all(np.array_equal(t[0].numpy() > 0, m) for t, m in zip(targets, MASKS))

@pytest.mark.filterwarnings("ignore:the masks have", "ignore:.* are foreground")
@pytest.mark.parametrize("save", [
    png(lambda m: gray(~m)), png(lambda m: Image.fromarray(np.uint8(~m))),
    png(lambda m: palette(m, WHITE, BLACK)), png(lambda m: palette(~m, BLACK, WHITE)),
    lambda m, path: tifffile.imwrite(f"{path}.tif", m, photometric="miniswhite"),
    lambda m, path: tifffile.imwrite(f"{path}.tif", np.uint8(m)*255, photometric="miniswhite"),
], ids="gray zero-is-nucleus white-black black-white bits miniswhite".split())
def test_inverted_sets_are_refused(tmp_path, save):
    with pytest.raises(ValueError, match="the masks seem to be inverted"): read(pairs_of(tmp_path, save))

def big(m): return Image.fromarray(np.uint8(np.kron(m, np.ones((4, 4), bool)))*255)

def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()

def exif():
    found = Image.Exif()
    found[274] = 1
    return found

@pytest.mark.filterwarnings("ignore:the masks have")
@pytest.mark.parametrize("suffix, make, words", [
    ("png", lambda m: encoded(big(m).resize(m.shape, Image.Resampling.BOX, (2, 2, 254, 254)), "PNG"), "at rims only"),
    ("png", lambda m: encoded(gray(np.roll(m, 1, 1)).resize((48, 48), 3).resize((64, 64), 3), "PNG"), "at rims only"),
    ("png", lambda m: encoded(gray(m).convert("RGB"), "WEBP", quality=60), "at rims only"),
    ("jpg", lambda m: encoded(gray(m), "JPEG", quality=95), "in a JPEG"),
    ("jpg", lambda m: encoded(gray(m), "JPEG", exif=exif()), "in a JPEG"),
    ("tif", lambda m: encoded(gray(m), "TIFF", compression="jpeg"), "in a JPEG"),
    ("png", lambda m: encoded(Image.fromarray(np.where(m, 1, 255*np.roll(m, 2, 0)).astype(np.uint8)), "PNG"),
     "Pascal VOC"),
], ids="supersampled antialiased webp jpeg jpeg-exif jpeg-in-tiff void".split())
def test_blurred_and_void_masks_are_refused_by_name(tmp_path, suffix, make, words):
    ds = pairs_of(tmp_path, lambda m, path: Path(f"{path}.{suffix}").write_bytes(make(m)))
    with pytest.raises(ValueError, match=f"privileged/0.{suffix}: got a mask .*{words}"): read(ds)

def test_what_a_data_set_decodes_is_refused_as_well(tmp_path):
    "Its images do not know any more what file they came from."
    turned = exif()
    turned[274] = 3
    (tmp_path/"a.jpg").write_bytes(encoded(gray(MASKS[0]), "JPEG", exif=turned))
    ds = Dataset.from_dict({"x": [str(tmp_path/"a.jpg")]}).cast_column("x", ImageFeature())
    with pytest.raises(ValueError, match="a mask"): read_mask(ds[0]["x"])

def test_images_that_are_no_he_are_not_judged(recwarn):
    "Fluorescence, gray scans and brown immunostains: nuclei may be bright, or not blue."
    brown = np.array([210, 170, 120]) - 60*np.stack(MASKS)[..., None]*[.2, .6, 1]
    for images in (255 - TISSUE.image, TISSUE.image[..., :1].repeat(3, 3), 255 - TISSUE.image[..., :1].repeat(3, 3),
                   brown.astype(np.uint8)):
        for sign in (np.array, minus):
            x = [torch.from_numpy(to_rgb(i)).permute(2, 0, 1) for i in images]
            check_polarity(x, [sign(m) for m in MASKS])
    assert all("are foreground" in str(w.message) for w in recwarn.list)

def test_gray_palettes_are_read_by_their_grays():
    labels = np.uint8(MASKS[0])
    assert np.array_equal(to_mask(palette(1 - labels, WHITE, BLACK), 2), labels)
    assert np.array_equal(to_mask(palette(labels, BLACK, WHITE), 2), labels)
    assert np.array_equal(to_mask(palette(labels, WHITE, GREEN), 2), labels)

@pytest.mark.skipif(not REAL.exists(), reason="the real images (shared/data beside the repository) are not here")
@pytest.mark.filterwarnings("ignore:.*no group is known")
@pytest.mark.parametrize("name", ["he_nuclei_pairs", "nuclei_pairs", "tnbc_nuclei_pairs"])
def test_real_masks_pass_and_inverted_ones_do_not(name, recwarn):
    ds = pair_folders(REAL/name)
    ds = ds.select(range(0, len(ds), 3))
    images = [torch.from_numpy(to_rgb(x)).permute(2, 0, 1) for x in ds["primary"]]
    masks = [read_mask(m) for m in ds["privileged"]]
    check_polarity(images, masks, ds["path"][:])
    assert min(haematoxylin_correlation(x, m) for x, m in zip(images, masks)) > .4
    assert all("no group" in str(w.message) for w in recwarn.list)
    with pytest.raises(ValueError, match="seem to be inverted"): check_polarity(images, [~m for m in masks])

"Foreground and windows: padding decides nothing, and a window shows something or is refused."
import numpy as np
import pytest
from volume_files import ball, save

from synthpi.volumes.bodies import body_phantoms
from synthpi.volumes.intensities import foreground
from synthpi.volumes.scans import prepare_volumes

@pytest.fixture(scope="module")
def ct(): return body_phantoms(1, "ct", (40, 30, 36), 11.)[0].image

def padded(ct, value, share=1.05):
    "Beyond a circle, as scanners fill up what they did not see"
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in ct.shape[:2]), indexing="ij")
    return np.where((np.hypot(x, y) < share)[..., None], ct, value).astype(np.float32)

def one_voxel(ct):
    x = ct.copy()
    x[0, 0, 0] = -5000
    return x

@pytest.mark.parametrize("change", [
    lambda ct: padded(ct, -3024), lambda ct: padded(ct, -2000), lambda ct: padded(ct, -32768), one_voxel,
    lambda ct: np.pad(ct, ((0, 0), (0, 0), (20, 20)), constant_values=-3024)[:, :, 15:-15],
    # no offset: air is 24, padding -2000
    lambda ct: padded(ct + 1024, -2000),
])
@pytest.mark.parametrize("spacing", [None, 9.])
def test_padding_does_not_decide_what_is_tissue(tmp_path, ct, change, spacing):
    shares = []
    for name, image in {"plain": ct, "changed": change(ct)}.items():
        save(tmp_path/name/"x.nii", image, np.diag([11., 11, 11, 1]))
        store = prepare_volumes(tmp_path/name, tmp_path/f"{name}_out", spacing, margin=0)
        shares.append(np.asarray(store.array(0, "foreground")).sum())
    assert abs(shares[1]/shares[0] - 1) < .03, shares

def test_empty_space_around_tissue_is_no_padding():
    "The plateau of a skull-stripped scan borders on tissue: its threshold is what it always was"
    x = ball((40, 40, 40), (20, 20, 20))
    assert np.array_equal(foreground(x), foreground(x, .1*np.percentile(x, 99.5)))
    x[x > 0] += 400
    assert (foreground(x) == (x > 0)).all()

GRAY = "; the window -1000 to 1000 makes its foreground one gray"

@pytest.mark.parametrize("change, says", [
    (lambda ct: (ct + 1100)/2500, r"from 0\.\d+ to 0\.\d+" + GRAY),
    (lambda ct: np.clip(ct, -1000, 400)/1000, "from -1 to 0.4" + GRAY),
    (lambda ct: padded(ct + 1100, -2000), r"from -2000 to \d+.*, and 100\.0% of its voxels.*no air"),
    (lambda ct: np.maximum(ct + 1024, 0), r"from 0 to \d+.*, and 100\.0% of its voxels.*no air"),
])
def test_a_window_on_other_units_is_refused(tmp_path, ct, change, says):
    save(tmp_path/"in/bad.nii", change(ct).astype(np.float32))
    with pytest.raises(ValueError, match=f"bad.nii has values {says}"):
        prepare_volumes(tmp_path/"in", tmp_path/"out", window="ct")
    save(tmp_path/"in/bad.nii", ct)
    assert prepare_volumes(tmp_path/"in", tmp_path/"out", window="ct").array(0).std() > 20

def test_a_scan_cut_out_of_a_body_takes_a_threshold(tmp_path, ct):
    save(tmp_path/"in/organ.nii", np.clip(ct, -400, None)[10:30, 8:22, 8:28])
    with pytest.raises(ValueError, match="give prepare_volumes a foreground_above"):
        prepare_volumes(tmp_path/"in", tmp_path/"out", window="soft tissue")
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", window="soft tissue", foreground_above=-900)
    assert store.array(0).shape == (20, 14, 20)

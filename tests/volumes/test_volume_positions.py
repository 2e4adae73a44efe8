"""The central test of this wing: a volume whose values are its own coordinates in RAS. The mean of a
crop is its centre, in every format, direction and frame."""
import gzip

import nibabel as nib
import numpy as np
import pytest
from volume_files import LPS, ball, save, series_of, slice_of, turned, world

from synthpi.volumes.crops import grid_crops, sample_crops
from synthpi.volumes.scans import prepare_volumes, read_volume

SHAPE = 11, 12, 13
AFFINES = {
    "straight": turned((2, 3, 4), 0, 0),
    "radiological": turned((2, 3, 4), 0, 0, flip=(-1, 1, 1)),
    "sagittal": turned((2, 3, 4), 0, 0, flip=(-1, 1, -1), order=(2, 0, 1)),
    "oblique": turned((1, 2.5, 4), .17, .35),
    "oblique, other axes": turned((1, 2.5, 4), -.3, .2, flip=(1, -1, 1), order=(1, 2, 0)),
    "sheared": turned((1, 2, 3), .1, .2, shear=.2),
}

def nifti(folder, values, affine):
    "Pixdim says 1 mm, whatever the sform says; no qform"
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, 4)
    image.set_qform(None, 0)
    image.header["pixdim"][1:4] = 1
    nib.save(image, folder/"x.nii.gz")
    return folder/"x.nii.gz"

def micron(folder, values, affine):
    image = nib.Nifti1Image(values, np.diag([1000., 1000, 1000, 1]) @ affine)
    image.header.set_xyzt_units("micron")
    nib.save(image, folder/"x.nii")
    return folder/"x.nii"

def nrrd_in(space, signs, units):
    def write(folder, values, affine):
        import nrrd
        factor = {"mm": 1, "um": 1000}[units]
        a = np.diag([*signs, 1]) @ affine
        header = {"space": space, "space directions": a[:3, :3].T*factor,
                  "space origin": a[:3, 3]*factor, "space units": [units]*3}
        nrrd.write(str(folder/"x.nrrd"), values, header)
        return folder/"x.nrrd"
    return write

def dicom(folder, values, affine):
    "Numbers of the slices in no order; coordinates in steps of 1/65536 mm"
    pixels = np.round(values.astype(float)*2**16).astype("<i4")
    numbers = np.random.default_rng(0).permutation(values.shape[2])
    return series_of(folder/"x", pixels, affine, numbers, lambda k: {"RescaleSlope": 2.**-16})

def meta(folder, values, affine):
    import itk
    a = LPS @ affine
    size = np.linalg.norm(a[:3, :3], axis=0)
    image = itk.image_from_array(np.ascontiguousarray(values.T))
    image.SetSpacing(size.tolist())
    image.SetOrigin(a[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(a[:3, :3]/size)))
    itk.imwrite(image, str(folder/"x.mha"))
    return folder/"x.mha"

FORMATS = {
    "mha": meta, "nifti": nifti, "micron": micron, "dicom": dicom,
    "RAS": nrrd_in("RAS", (1, 1, 1), "mm"),
    "right-anterior-superior": nrrd_in("right-anterior-superior", (1, 1, 1), "um"),
    "LAS": nrrd_in("left-anterior-superior", (-1, 1, 1), "mm"),
    "LPS": nrrd_in("LPS", (-1, -1, 1), "mm"),
}
NEEDS = {"mha": "itk", "dicom": "pydicom", "nifti": "nibabel", "micron": "nibabel"}

@pytest.mark.parametrize("kind", AFFINES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_volume_of_its_own_coordinates_is_read_at_them(tmp_path, form, kind):
    pytest.importorskip(NEEDS.get(form, "nrrd"))
    affine = AFFINES[kind]
    truth = world(affine, SHAPE)
    for axis in range(3):
        path = FORMATS[form](tmp_path, truth[..., axis].astype(np.float32), affine)
        values, found = read_volume(path)
        # axes go to the right, to the front and up, and no voxel moved
        assert np.abs(values - world(found, values.shape)[..., axis]).max() < 1e-3, (axis, found)
        assert sorted(values.shape) == sorted(SHAPE)
    assert (np.abs(found[:3, :3]).argmax(0) == [0, 1, 2]).all() and (np.diag(found)[:3] > 0).all()

def coordinate_store(folder, affine, spacing=None):
    "Three volumes that hold x, y and z in mm, from 0 to 1 between -200 and 200 mm"
    for axis in range(3):
        save(folder/"in"/f"{'xyz'[axis]}.nii", world(affine, SHAPE)[..., axis].astype(np.float32), affine)
    return prepare_volumes(
        folder/"in", folder/"out", spacing, window=(-200, 200), foreground_above=-999, dtype="float32",
    )

def inside(store, affine, spacing, centers):
    "Crops that leave neither the array nor, where it was resampled, the source of its values"
    at = store.voxel(0, centers)
    whole = ((at >= .99) & (at <= store.items[0]["shape"] - 1.99)).all(1)
    if not spacing: return whole
    back = np.linalg.inv(affine[:3, :3])
    at, reach = (centers - affine[:3, 3]) @ back.T, np.abs(back).sum(1)*spacing
    return whole & ((at >= reach) & (at <= np.array(SHAPE) - 1 - reach)).all(1)

@pytest.mark.parametrize("spacing", [None, 2.])
@pytest.mark.parametrize("kind", AFFINES)
def test_the_mean_of_a_crop_is_its_centre_in_every_frame(tmp_path, kind, spacing):
    affine, centers = AFFINES[kind], {}
    store = coordinate_store(tmp_path, affine, spacing)
    for frame in ("world_mm", "mm_local", "mm_centered"):
        crops = [next(grid_crops(store, i, 3, 2, 2000, frame)) for i in range(3)]
        means = np.stack([c["crop"].double().mean((1, 2, 3, 4)).numpy()*400 - 200 for c in crops], 1)
        centers[frame] = crops[0]["center_mm"].double().numpy()
        # a frame differs from the world by a shift alone; the world, by none
        shift = (centers[frame] - means)[inside(store, affine, spacing, centers["world_mm"])]
        assert len(shift) > 10 and np.abs(shift - shift[0]).max() < 1e-3, frame
        if frame == "world_mm": assert np.abs(shift).max() < 1e-3
    middle = (store.items[0]["box"].sum(0) - 1)/2
    assert np.allclose(store.position(0, middle, "mm_centered"), 0)

# ---- NIfTI

def test_nifti_is_where_nibabel_says(tmp_path):
    sform, qform = turned((2, 2, 2), .1, .3), turned((1, 2, 3), .4, 0)
    for codes in ((1, 1), (0, 2), (3, 0), (0, 0)):
        image = nib.Nifti1Image(ball((6, 7, 8)), None)
        image.set_sform(sform, codes[0])
        image.set_qform(qform, codes[1])
        # as tools leave it that write the sform alone
        if codes[0]: image.header["pixdim"][1:4] = 1
        nib.save(image, tmp_path/"x.nii.gz")
        expected = nib.as_closest_canonical(nib.load(tmp_path/"x.nii.gz")).affine
        assert np.allclose(read_volume(tmp_path/"x.nii.gz")[1], expected, atol=1e-9), codes

def test_what_is_assumed_is_printed_once_and_kept(tmp_path, capsys):
    metre = nib.Nifti1Image(ball(), np.diag([.002, .002, .002, 1]))
    metre.header.set_xyzt_units("meter")
    save(tmp_path/"in/a.nii", ball())
    nib.save(metre, tmp_path/"in/b.nii")
    store = prepare_volumes(tmp_path/"in", tmp_path/"out")
    assert np.allclose(store.spacing_mm(1), 2)
    said = capsys.readouterr().out
    assert said.count("1 of 2 volumes: no unit of length: taken as mm (a)") == 1
    assert store.items[0]["notes"] == ["no unit of length: taken as mm"] and not store.items[1]["notes"]
    assert "in: 2 volumes of 2 subjects, 0 with labels" in said and said.splitlines()[0].startswith(store.decided[0])

def test_warnings_of_a_reader_are_told(tmp_path, capsys):
    path = save(tmp_path/"in/odd.nii", ball())
    raw = bytearray(path.read_bytes())
    # sizes of voxels below 0
    raw[80:84] = np.float32(-2).tobytes()
    path.write_bytes(raw)
    store = prepare_volumes(tmp_path/"in", tmp_path/"out")
    out, err = capsys.readouterr()
    assert "should be positive" in out and "(odd)" in out and not err
    assert any("should be positive" in n for n in store.items[0]["notes"])

@pytest.mark.parametrize("damage, says", [
    (lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:], "CRC check failed"),
    (lambda b: b[:-20], "EOFError"),
    (lambda b: b[:len(b)//2], "EOFError"),
    (lambda b: gzip.compress(gzip.decompress(b)[:-100]), "Expected"),
    (lambda b: b"<!DOCTYPE html><html>", "it is a web page"),
    (lambda b: b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    (lambda b: b"", "it is empty"),
])
def test_a_damaged_nifti_is_refused_by_name(tmp_path, damage, says):
    path = save(tmp_path/"bad.nii.gz", ball())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"bad.nii.gz could not be read.*{says}"): read_volume(path)
    raw = save(tmp_path/"cut.nii", ball()).read_bytes()
    (tmp_path/"cut.nii").write_bytes(raw[:-100])
    with pytest.raises(ValueError, match="cut.nii could not be read"): read_volume(tmp_path/"cut.nii")

def test_what_is_no_scan_is_refused(tmp_path):
    save(tmp_path/"c.nii", ball().astype(np.complex64))
    with pytest.raises(ValueError, match="c.nii has complex values"): read_volume(tmp_path/"c.nii")
    colours = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(tmp_path/"rgb.nii", colours)
    with pytest.raises(ValueError, match="rgb.nii has .* values"): read_volume(tmp_path/"rgb.nii")
    # a vector image, as ITK writes it
    save(tmp_path/"v.nii", np.stack([ball(), -ball()], -1)[:, :, :, None])
    assert np.array_equal(read_volume(tmp_path/"v.nii", 1)[0], -ball())

# ---- image and label

def test_grids_agree_where_the_corners_do(tmp_path):
    affine = turned((1, 1, 3), .2, 0)
    save(tmp_path/"in/a.nii", ball((60, 60, 30), (30, 30, 15)), affine)
    turn = affine.copy()
    # less than .1 in each number, and 9 mm at the far corner
    turn[:3, :3] += .08
    save(tmp_path/"in/a_label.nii", (ball((60, 60, 30), (30, 30, 15)) > 0).astype(np.uint8), turn)
    with pytest.raises(ValueError, match="a_label.nii lies elsewhere .* voxels apart"):
        prepare_volumes(tmp_path/"in", tmp_path/"out")
    near = affine.copy()
    near[:3, 3] += .3
    save(tmp_path/"in/a_label.nii", (ball((60, 60, 30), (30, 30, 15)) > 0).astype(np.uint8), near)
    assert prepare_volumes(tmp_path/"in", tmp_path/"out").items[0]["labels"] == [0, 1]

@pytest.mark.parametrize("spacing", [None, 1.7])
def test_large_labels_stay_what_they_are(tmp_path, spacing):
    "As of the Allen atlas; float32 has none between 614454272 and 614454336"
    label = np.where(ball() > 0, 614454277, 0)
    label[12:] += (label[12:] > 0)
    save(tmp_path/"in/a.nii.gz", ball())
    save(tmp_path/"in/a_label.nii.gz", label.astype(np.uint32))
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", spacing)
    assert store.items[0]["labels"] == [0, 614454277, 614454278]
    batch = sample_crops(store, [0], 4, 6, labels=True)
    assert set(np.unique(batch["label"])) <= {0, 614454277, 614454278}

# ---- DICOM

AXIAL = [1, 0, 0, 0, 1, 0]

def axial(folder, n=6, numbers=None, change=lambda k: {}, skip=(), step=2.5):
    "Slices whose value is their height"
    pytest.importorskip("pydicom")
    for k in range(n):
        if k in skip: continue
        pixels = np.full((5, 4), round(k*step*10), np.uint16)
        tags = {"InstanceNumber": k + 1 if numbers is None else numbers[k], "RescaleSlope": .1, **change(k)}
        position = tags.pop("at", (0, 0, k*step))
        slice_of(folder, f"{k:03d}.dcm", pixels, position, AXIAL, (1, 1), **tags)
    return folder

@pytest.mark.parametrize("numbers", [
    [1, 4, 2, 5, 3, 6], [7]*6, [None]*6, [1, None, 2, 3, None, 4], [6, 5, 4, 3, 2, 1],
])
def test_slices_lie_where_their_positions_say(tmp_path, numbers):
    values, affine = read_volume(axial(tmp_path/"s", numbers=numbers))
    assert values.shape == (5, 4, 6) and affine[2, 2] == 2.5
    assert np.allclose(values, world(affine, values.shape)[..., 2], atol=1e-5)

@pytest.mark.parametrize("change, says", [
    ({"skip": (3,)}, "2.50 to 5.00 mm apart .see 002.dcm and 004.dcm"),
    ({"change": lambda k: {"at": (0, 0, 2.5*min(k, 4))}}, "0.00 to 2.50 mm apart .* come twice"),
    ({"change": lambda k: {"at": (3*(k == 2), 0, 2.5*k)}}, "002.dcm in .*s lies 3.00 mm beside"),
    ({"change": lambda k: {"ImageOrientationPatient": [1, 0, 0, 0, .98, .199]} if k == 2 else {}},
     "another ImageOrientationPatient in 1 of 6 slices .*002.dcm"),
    ({"change": lambda k: {"PixelSpacing": [2, 2]} if k > 2 else {}}, "another PixelSpacing in 3 of 6"),
    ({"change": lambda k: {"ImagePositionPatient": None} if k == 4 else {}}, "004.dcm has no ImagePositionPatient"),
    ({"change": lambda k: {"ImageOrientationPatient": None}}, "has no ImageOrientationPatient"),
    ({"change": lambda k: {"PixelSpacing": None}}, "has no PixelSpacing"),
    ({"change": lambda k: {"NumberOfFrames": 1 + k}}, "is an enhanced multi-frame file of 2 frames"),
    ({"change": lambda k: {"SeriesInstanceUID": f"1.{k % 2}"}}, "s holds the slices of 2 DICOM series"),
    ({"n": 1}, "s has one slice"),
    ({"change": lambda k: {"SamplesPerPixel": 3}}, "000.dcm has colours"),
])
def test_a_series_that_is_none_is_named(tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as e: read_volume(axial(tmp_path/"s", **change))
    assert str(tmp_path/"s") in str(e.value)

def test_a_file_of_a_series_that_cannot_be_read_is_named(tmp_path):
    folder = axial(tmp_path/"s")
    whole = (folder/"003.dcm").read_bytes()
    for damage in (whole[:300], whole[:-20], b"no DICOM at all", b""):
        (folder/"003.dcm").write_bytes(damage)
        with pytest.raises(ValueError, match="s/003.dcm"): read_volume(folder)
    (folder/"003.dcm").write_bytes(whole)
    # what macOS leaves beside each file is nothing
    (folder/"._003.dcm").write_bytes(b"junk")
    assert read_volume(folder)[0].shape == (5, 4, 6)
    with pytest.raises(ValueError, match="expected the folder of its series"): read_volume(folder/"003.dcm")

def test_values_of_dicom_are_those_of_each_slice(tmp_path):
    folder = axial(tmp_path/"pet", change=lambda k: {"RescaleSlope": .1*(k + 1), "RescaleIntercept": -3})
    values, _ = read_volume(folder)
    assert np.allclose(values[0, 0], [25*k*.1*(k + 1) - 3 for k in range(6)], atol=1e-4)
    pixels = np.arange(24, dtype=np.uint16).reshape(4, 3, 2)
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    series_of(tmp_path/"m1", 4095 - pixels, LPS @ np.eye(4), change=lambda k: inverted)
    assert np.array_equal(read_volume(tmp_path/"m1")[0][::-1, ::-1], pixels)

# ---- NRRD

def test_nrrd_says_what_it_does_not_know(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    header = {"space directions": np.diag([1., 2, 3]), "space": "LAS"}
    nrrd.write(str(tmp_path/"in.nrrd"), ball(), header)
    assert np.array_equal(read_volume(tmp_path/"in.nrrd")[1][:3, 3], [-23, 0, 0])
    for space in ("scanner-xyz", "3D-right-handed"):
        nrrd.write(str(tmp_path/"in.nrrd"), ball(), header | {"space": space})
        with pytest.raises(ValueError, match=f"in.nrrd has the space '{space}'.*RAS, LAS, LPS"):
            read_volume(tmp_path/"in.nrrd")
    four = np.stack([ball(), 2*ball()])
    rows = np.array([[np.nan]*3, *np.diag([1., 2, 3])])
    header = {"space directions": rows, "space": "LPS", "kinds": ["list", *["domain"]*3]}
    nrrd.write(str(tmp_path/"4d.nrrd"), four, header)
    assert np.array_equal(read_volume(tmp_path/"4d.nrrd", 1)[0][::-1, ::-1], 2*ball())
    with pytest.raises(ValueError, match="4d.nrrd holds 2 volumes"): read_volume(tmp_path/"4d.nrrd")
    whole = (tmp_path/"4d.nrrd").read_bytes()
    (tmp_path/"4d.nrrd").write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match="4d.nrrd could not be read"): read_volume(tmp_path/"4d.nrrd")

def test_nrrd_with_time_written_by_hand(tmp_path):
    pytest.importorskip("nrrd")
    values = np.arange(48, dtype="<i2").reshape(2, 2, 3, 4)     # time, z, y, x
    head = (
        "NRRD0005\ntype: short\ndimension: 4\nspace: left-posterior-superior-time\nsizes: 4 3 2 2\n"
        "space directions: (2000,0,0,0) (0,3000,0,0) (0,0,4000,0) (0,0,0,9)\n"
        'space origin: (10000,20000,30000,0)\nspace units: "microns" "microns" "microns" "s"\n'
        "endian: little\nencoding: raw\n\n"
    )
    (tmp_path/"t.nrrd").write_bytes(head.encode() + values.tobytes())
    x, affine = read_volume(tmp_path/"t.nrrd", 1)
    assert np.array_equal(x, values[1].T[::-1, ::-1])
    assert np.allclose((affine @ [3, 2, 0, 1])[:3], [-10, -20, 30]) and np.allclose(np.diag(affine)[:3], [2, 3, 4])

def test_a_detached_file_is_part_of_what_a_volume_is(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    (tmp_path/"in").mkdir()
    header = {"space directions": np.eye(3), "space": "LPS", "space origin": [0., 0, 0], "encoding": "raw"}
    def made(values):
        nrrd.write(str(tmp_path/"in/x.nhdr"), values, header, detached_header=True)
        return prepare_volumes([{"name": "x", "image": "x.nhdr"}], tmp_path/"out", root=tmp_path/"in").made
    assert [made(ball()), made(ball()), made(ball(seed=1))] == [1, 0, 1]

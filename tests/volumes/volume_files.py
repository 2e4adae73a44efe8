"Small volumes on disk, for the tests of this wing."
import nibabel as nib
import numpy as np

LPS = np.diag([-1., -1, 1, 1])

def save(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path

def ball(shape=(24, 20, 22), center=None, seed=0):
    "A textured ball in empty space"
    d = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape)/2 if center is None else center)
    return (np.random.default_rng(seed).uniform(50, 100, shape) * ((d**2).sum(-1) < 64)).astype(
        np.float32
    )

def world(affine, shape):
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]

def oblique(spacing, angle=.3, origin=(-20, 5, 40)):
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag(spacing), origin
    return affine

def turned(spacing, about_x, about_z, shear=0., flip=(1, 1, 1), order=(0, 1, 2)):
    "An affine that is tilted twice, perhaps sheared along its third axis, its axes in any order"
    a, b = np.cos([about_x, about_z]), np.sin([about_x, about_z])
    x = np.array([[1, 0, 0], [0, a[0], -b[0]], [0, b[0], a[0]]])
    z = np.array([[a[1], -b[1], 0], [b[1], a[1], 0], [0, 0, 1]])
    directions = z @ x @ np.diag(spacing)
    directions[:, 2] += shear*directions[:, 1]
    affine = np.eye(4)
    affine[:3, :3] = (directions*flip)[:, list(order)]
    affine[:3, 3] = -12, 31, -7
    return affine

# ---- DICOM

_TYPES = {"u": 0, "i": 1}

def slice_of(folder, name, pixels, position, orientation, spacing, **other):
    "One DICOM file of pixels `(X, Y)`; `other` tags replace the usual ones, None takes one away"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
    folder.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    uid = f"1.2.3.{abs(hash((str(folder), name))) % 10**9}"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    bits = pixels.dtype.itemsize*8
    tags = dict(
        SOPClassUID=CTImageStorage, SOPInstanceUID=uid, SeriesInstanceUID="1.2.3", Modality="CT",
        PatientID="p", ImagePositionPatient=[float(f"{x:.10g}") for x in position],
        ImageOrientationPatient=[float(f"{x:.10g}") for x in orientation],
        PixelSpacing=[float(x) for x in spacing], Columns=pixels.shape[0], Rows=pixels.shape[1],
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=bits,
        BitsStored=bits, HighBit=bits - 1, PixelRepresentation=_TYPES[pixels.dtype.kind],
        RescaleSlope=1, RescaleIntercept=0, PixelData=pixels.T.tobytes(),
    )
    d = FileDataset(None, {}, file_meta=meta, preamble=b"\0"*128)
    for tag, value in (tags | other).items():
        if value is not None: setattr(d, tag, value)
    d.save_as(folder/name, enforce_file_format=True)
    return folder/name

def series_of(folder, pixels, affine, numbers=None, change=lambda k: {}):
    "A series of pixels `(X, Y, Z)` at an affine in RAS, its file names in no order"
    lps, n = LPS @ affine, pixels.shape[2]
    size = np.linalg.norm(lps[:3, :2], axis=0)
    along = (lps[:3, :2]/size).T.ravel()
    for k in range(n):
        number = k + 1 if numbers is None else numbers[k]
        slice_of(
            folder, f"{(7*k) % n if n % 7 else k:03d}.dcm", pixels[..., k], lps[:3, 3] + k*lps[:3, 2], along,
            size[::-1], **{"InstanceNumber": number, **change(k)},
        )
    return folder

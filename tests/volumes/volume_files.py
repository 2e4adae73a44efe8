"Small volumes on disk, for the tests of this wing."
import nibabel as nib
import numpy as np

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

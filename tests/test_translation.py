"A generator learns on the small, different-looking pair set, and its masks fit the tiles of another laboratory."
import numpy as np
import torch

from synthpi.data import pair_folders
from synthpi.generators import ModuleGenerator
from synthpi.phantoms import tissue_phantoms, write_tissue
from synthpi.translation import Regression, dice_score, fit_generator

def test_masks_carry_over_to_another_laboratory(tmp_path):
    write_tissue(tmp_path, {"train": 1}, {"train": 1}, n_pairs=48, n_pair_patients=8)
    generator = fit_generator(pair_folders(tmp_path/"pairs"), um_per_px=.5, steps=100, batch_size=8, crop=64, progress=None)
    assert generator.about["dice_validation"] >= .75               # 0.9 was reached
    assert not set(generator.training_ids) & set(generator.about["validation_groups"]) and len(generator.training_ids) == 6
    tiles = tissue_phantoms(6, 3, seed=1)
    drawn = generator.translate(torch.from_numpy(tiles.image).permute(0, 3, 1, 2).float()/255, um_per_px=tiles.um_per_px)[:, 0]
    true = torch.from_numpy((tiles.mask > 0).astype(np.float32))
    assert dice_score((drawn > .5).float(), true) >= .6 > dice_score((drawn > .5).float(), true.roll(1, 0))

def test_colour_targets_are_learnt_by_their_absolute_error():
    target = torch.rand(2, 3, 8, 8)
    loss, terms = Regression("image")(torch.logit(target.clamp(.01, .99)), target)
    assert loss < .01 and set(terms) == {"l1"}
    generator = ModuleGenerator(Regression("image").module())
    for size in (9, 16, 40): assert generator.translate(torch.rand(1, 3, size, size)).shape == (1, 3, size, size)

"""What a synthetic second image buys on real tiles, over the whole range of augmentation
strength: accuracy, stain shift, label budget, and what the encoder knows about nuclei.

    OMP_NUM_THREADS=1 python tests/evidence/tiles.py --tiles ../shared/data/tissue --pairs
    ../shared/data/he_nuclei_pairs --work tiles --out tests/evidence/results/tiles.json

Every arm of the study and the controls, at four strengths of the colour jitter, with three
seeds. A generator learns nuclear masks on some patients of the pairs; the other patients are the
ones whose nuclei are
asked of the frozen features. A call that was stopped goes on in --work; `--part 0/2` and `--part
1/2` share the training between two processes, and a call without it sums up. Only what is in
--only and --jitters
is trained; sums are made over what is there, and the table says how many seeds that is. With
--device cuda everything runs there.
"""
import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from synthpi.studies.tissue.arms import ARMS, add_controls, train_arm, untrained_encoder
from synthpi.core.files import atomic_path
from synthpi.core.runs import claim_folder
from synthpi.core.images import to_rgb
from synthpi.data.folders import pair_folders
from synthpi.evaluate.features import colour_histogram, extract_features, mean_rgb
from synthpi.core.optics import restain
from synthpi.pairs.stains import StainGenerator
from synthpi.core.files import fingerprint
from synthpi.pairs.generators import load_generator, save_generator
from synthpi.models.files import save_encoder
from synthpi.pairs.privileged import add_privileged
from synthpi.pairs.examples import cut_pairs
from synthpi.data.recipes import strong
from synthpi.pairs.stains import RandomWeights
from synthpi.studies.tissue.tiles import load_tiles
from synthpi.pairs.training import fit_generator

# pixels; steps; tiles a step; um/px of the pairs, and, by eye, of the tiles
SIZE, STEPS, BATCH, UM = 96, 300, 64, .5
JITTERS, SEEDS, SHIFTS = (0., .2, .4, .8), (0, 1, 2), (.4, .8, 1.2)
# of the pairs, on which the generator is trained; the others' nuclei are asked of the features
PATIENTS = 14
# pixels of the pairs, and what the encoders see of them: within the range of scales that training
# shows
FIELD, FIELD_SIDE = 128, 80
MAIN, RANGE = ("siamese_unprivileged", "trident"), ("trident_third_view", "trident_haematoxylin")
CONTROLS = (
    "trident_shuffled",
    "trident_random_generator",
    "trident_blank",
    "siamese_privileged",
    "supervised",
    "trident_real_pairs",
)

def runs(only, jitters=None):
    "What is to be trained, the most wanted first: (arm, jitter, seed)"
    order = [("random_encoder", None, s) for s in SEEDS] + [
        (a, j, s) for arms in (MAIN, RANGE) for s in SEEDS for j in JITTERS for a in arms
    ]
    order += [(a, j, s) for j in (.4, 0., .8, .2) for a in CONTROLS for s in SEEDS]
    return [r for r in order if (not only or r[0] in only) and (not jitters or r[1] in jitters)]

def place(work, arm, jitter, seed):
    return (
        work
        / "runs"
        / "-".join([arm, *([] if jitter is None else [f"jitter{jitter:g}"]), f"seed{seed}"])
    )

def patients(pairs):
    "Those that train the generator, and those that nobody trains on"
    names = sorted(set(pairs["group"][:]))
    order = np.random.default_rng(0).permutation(len(names))
    return {names[i] for i in order[:PATIENTS]}, {names[i] for i in order[PATIENTS:]}

def nuclei(folder, pairs, keep):
    """Fields of the kept patients, and per field: the number of nuclei, their share of the area,
    their mean area in square micrometres"""
    fields, targets, groups = [], [], []
    for r in pairs:
        if r["group"] not in keep: continue
        image, labels = (
            to_rgb(r["primary"]),
            np.array(Image.open(folder / "instances" / (Path(r["path"]).stem + ".png"))),
        )
        for y in range(0, image.shape[0] - FIELD + 1, FIELD):
            for x in range(0, image.shape[1] - FIELD + 1, FIELD):
                part = labels[y : y + FIELD, x : x + FIELD]
                areas = np.bincount(part.ravel())[1:]
                # pieces of less than 5 square micrometres, cut off by the edge, are no nuclei
                areas = areas[areas >= 20]
                if len(areas) == 0:
                    continue
                fields.append(
                    np.asarray(
                        Image.fromarray(image[y : y + FIELD, x : x + FIELD]).resize(
                            (FIELD_SIDE, FIELD_SIDE), Image.Resampling.LANCZOS
                        )
                    )
                )
                targets.append([len(areas), (part > 0).mean(), areas.mean() * UM**2])
                groups.append(r["group"])
    return np.stack(fields), np.array(targets), np.array(groups)

class Study:
    "The data of the study: read once, in every process alike"
    def __init__(self, args):
        self.work, self.device = args.work, "cuda" if args.device == "cuda" else "cpu"
        self.accelerator = Accelerator(cpu=self.device == "cpu")
        self.data, pairs = load_tiles(args.tiles, SIZE), pair_folders(args.pairs)
        self.settings = {
            "size": SIZE,
            "steps": STEPS,
            "batch": BATCH,
            "um_per_px": UM,
            "jitters": JITTERS,
            "restain": SHIFTS,
            "field": [FIELD, FIELD_SIDE],
            "patients": PATIENTS,
        }
        claim_folder(
            args.work,
            self.settings
            | {
                "tiles": self.data.summary["fingerprint"],
                "pairs": fingerprint(sorted(zip(pairs["path"][:], pairs["group"][:]))),
            },
            inputs=[args.tiles, args.pairs],
            writes=(),
        )
        self.learn, self.asked = patients(pairs)
        self.fields, self.targets, self.field_groups = nuclei(args.pairs, pairs, self.asked)
        self.real = pairs.select([i for i, g in enumerate(pairs["group"][:]) if g in self.learn])
        test = [self.data.images["test"][i] for i in range(len(self.data.images["test"]))]
        self.sets = (
            {
                s: [self.data.images[s][i] for i in range(len(self.data.images[s]))]
                for s in ("train", "val")
            }
            | {"test": test, "nuclei": self.fields}
            | {f"shift{s:g}": restain(test, strength=s) for s in SHIFTS}
        )

    def tables(self):
        "The generator, and training tiles with every second image"
        path = self.work/"generator.safetensors"
        if not path.exists():
            made = fit_generator(
                self.real,
                um_per_px=UM,
                steps=400,
                run_dir=self.work / "generator",
                accelerator=self.accelerator,
                progress=None,
            )
            save_generator(made, path, **made.about)
        self.generator = load_generator(path, device=self.device)
        tiles = self.data.train
        def add(generator, name):
            return add_privileged(tiles, generator, self.work/"cache"/name, UM)[0]
        synthetic = add(self.generator, "synthetic")
        self.table = {
            "privileged": synthetic,
            "shuffled": add_controls(synthetic),
            "blank": add_controls(synthetic),
            "random": add(RandomWeights(self.generator), "random"),
            "haematoxylin": add(StainGenerator(), "haematoxylin").rename_column(
                "privileged", "haematoxylin"
            ),
            "pairs": cut_pairs(self.real, 224),
            "tiles": tiles,
        }

    def rows(self, arm):
        column = {"trident_random_generator": "random", "trident_real_pairs": "pairs"}.get(
            arm
        ) or next((c for c in ARMS[arm].columns if c != "primary"), "tiles")
        return self.table[column]

    def features(self, encoder):
        "Of every set of images; an encoder, or a function of images"
        if not isinstance(encoder, torch.nn.Module):
            return {name: encoder(images) for name, images in self.sets.items()}
        return {
            name: extract_features(encoder, images, device=self.device)
            for name, images in self.sets.items()
        }

    def run(self, arm, jitter, seed):
        folder, facts = place(self.work, arm, jitter, seed), {}
        if (folder/"features.npz").exists(): return
        if arm == "random_encoder":
            encoder = untrained_encoder(self.data.train, size=SIZE, batch_size=BATCH, seed=seed)
        else:
            encoder, trainer = train_arm(
                "trident" if arm == "trident_random_generator" else arm,
                self.rows(arm),
                partial(strong, jitter=jitter),
                steps=STEPS,
                size=SIZE,
                batch_size=BATCH,
                seed=seed,
                accelerator=self.accelerator,
            )
            if trainer.interrupted:
                raise KeyboardInterrupt
            facts = {"seconds": trainer.seconds, "loss": trainer.history["loss"].iloc[-20:].mean()}
        folder.mkdir(parents=True, exist_ok=True)
        save_encoder(
            encoder,
            folder / "encoder.safetensors",
            arm=arm,
            jitter=jitter,
            seed=seed,
            steps=STEPS,
            size=SIZE,
        )
        self.write(folder, self.features(encoder), facts)
        print(arm, jitter, seed, {k: round(float(v), 3) for k, v in facts.items()}, flush=True)

    def write(self, folder, features, facts=()):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "features.npz") as path:
            np.savez(path, **features, **{f"about_{k}": v for k, v in dict(facts).items()})

    def inside_generator(self, images):
        """What the generator's own network knows: mean, deviation and maximum of its deepest and of
        its last maps, (N, R). Its skip connections leave the deepest ones little to do"""
        kept, net = [], self.generator.module
        def pooled(m, x, out):
            return kept[-1].append(
                torch.cat([out.mean((2, 3)), out.std((2, 3)), out.amax((2, 3))], 1).cpu()
            )
        hooks = [part.register_forward_hook(pooled) for part in (net.down_4, net.upcat_1)]
        try:
            for i in range(0, len(images), 64):
                kept.append([])
                self.generator.translate(
                    torch.from_numpy(np.stack(images[i : i + 64]))
                    .permute(0, 3, 1, 2)
                    .to(self.device)
                    / 255
                )
        finally:
            for hook in hooks: hook.remove()
        return torch.cat([torch.cat(k, 1) for k in kept]).numpy()

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("tiles", "pairs", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="Some of the arms")
    parser.add_argument("--jitters", nargs="*", type=float, help="Some of the jitters")
    parser.add_argument("--part", help="I/N: train each N-th run, and do not sum up")
    parser.add_argument("--sum", action="store_true", help="Train nothing: sum up what is there")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if not torch.cuda.is_available(): torch.set_num_threads(1)
    study = Study(args)
    if not args.sum:
        study.tables()
        for name, f in (
            ("mean_rgb", mean_rgb),
            ("colour_histogram", colour_histogram),
            ("inside_generator", study.inside_generator),
        ):
            folder = place(args.work, name, None, 0)
            if not (folder / "features.npz").exists():
                study.write(folder, study.features(f))
        part, n = map(int, args.part.split("/")) if args.part else (0, 1)
        for arm, jitter, seed in runs(args.only, args.jitters)[part::n]:
            study.run(arm, jitter, seed)
    if not args.part:
        from tiles_scores import summarise
        summarise(study, args.out)

if __name__ == "__main__": main()

"""synthpi trains an image encoder on unlabelled tissue tiles and on *synthetic* second images of the same tissue, for example nuclear masks that a
small generator draws: privileged information, there in training and absent when the encoder is used. It then holds that encoder against honest
baselines, explains what it looks at, and writes one report.

Modules:

- `synthpi.arms`: What a study compares: one name for one way of getting features
- `synthpi.batch_views`: The same recipes on a whole batch, where the network is
- `synthpi.batchnorm`: The statistics of the whole batch, whichever process holds its rows
- `synthpi.bodies`: Simulated trunks with a dozen organs, as MRI or CT shows them: volumes in which every voxel's place and organ are known
- `synthpi.cache`: Files named by what they were made from, each with its own checksum, and a table that says where they come from
- `synthpi.cards`: What an encoder is, what it was trained on and how to load it: one page beside its file
- `synthpi.checkpoints`: Files that a run can be taken up from, or that are not there at all
- `synthpi.cli`: The study from a terminal: on simulated tiles, and on your own
- `synthpi.cli_explain`: `synthpi explain` from a terminal
- `synthpi.cli_volumes`: Where in the body is this crop? The study of volumes from a terminal
- `synthpi.comparisons`: Is one arm better than another? Tests over folds, over answers and over subjects, and many of them at once
- `synthpi.containers`: Arrays and outlines become, once, a plain folder of images that every command reads
- `synthpi.core`: Seeds, pictures and files: the small things that every other notebook uses
- `synthpi.crop_lists`: The crops on which every encoder is scored: drawn once from a seed, written by the volumes' names
- `synthpi.crop_views`: A crop seen twice, at different brightness and with holes
- `synthpi.crops`: Random crops for training and grids of crops for inference, each with its centre in millimetres
- `synthpi.crossval`: Grouped folds, an inner choice of C, and intervals in which subjects are drawn again
- `synthpi.data`: Folders and manifests to a `Dataset`; every image looked at once; splits that keep patients whole
- `synthpi.distance`: Position as privileged information: embeddings as far apart as the crops they came from
- `synthpi.doctor`: What this machine has, what is missing for which feature, and what to do about it
- `synthpi.evaluate`: Frozen features, scores with intervals over patients, and one table of all arms
- `synthpi.explain`: Where in the image an encoder looks, and how it arranges a data set
- `synthpi.explain_run`: Coverage, saliency, sanity check and map of finished encoders, in one call and one page
- `synthpi.explore`: A volume to slide through and to click on, with the crops that an encoder finds most alike in other subjects
- `synthpi.explore_map`: Hover over an embedding map, click a point: its image, its synthetic partner, its saliency, its nearest neighbours
- `synthpi.explore_pairs`: One pair at a time, in one place: flip between real and synthetic, the worst first
- `synthpi.feature_cache`: Features read once, and found again only for the same encoder and the same images
- `synthpi.figures`: The figures of a study: curves, intervals, per-class bars, confusion, pairs
- `synthpi.foreign`: Which published network a file of weights belongs to, read from its names and shapes
- `synthpi.generator_run`: Pairs, or two unpaired folders, to a generator that was judged on patients it has not seen
- `synthpi.generators`: One calling convention for everything that supplies a privileged image
- `synthpi.geometry`: Distances between crops: which pairs, how far, and how well embeddings follow
- `synthpi.kid`: How far a set of synthetic images is from the set of true ones, and what looks at them
- `synthpi.logistic`: All folds, all values of C and all targets solved at once, to scikit-learn's optimum
- `synthpi.losses`: VICReg, Barlow Twins and SimCLR for two or more branches, on one device or on many
- `synthpi.maps`: How an encoder arranges a data set, with the numbers that say how far to trust the picture
- `synthpi.memory`: What a training step will hold, before there is a device to hold it
- `synthpi.models`: Encoders, projectors, branch layouts, and encoder files
- `synthpi.neighbours`: A probe without training: the label of the nearest training features
- `synthpi.objectives`: What a generator learns from: pairs, or two sets that are not paired
- `synthpi.pairs`: The synthesised privileged column: made once, checked, and with a history
- `synthpi.patches`: A grid of crops through a frozen encoder into one Parquet file, and what a probe reads out of it
- `synthpi.phantoms`: Simulated H&E tissue: nine classes, exact nuclear masks, patients, and a second set that looks different
- `synthpi.pictures`: A picture that tells where it was clicked, two that are compared in place, and the still one that stands in without a kernel
- `synthpi.position_maps`: What an encoder of crops knows of where they were: errors of distances, maps coloured by millimetres, AUC by fold and by region
- `synthpi.positions`: How well frozen features say where a crop was, and what position alone says about its label
- `synthpi.presets`: PanNuke, MoNuSeg, BCI, immunofluorescence pairs, NCT-CRC-HE and PatchCamelyon, each read in its published layout
- `synthpi.pretrain`: A folder of tiles, perhaps with caches of synthetic images, to an encoder
- `synthpi.probes`: What lies open in frozen features: a regression, a linear layer, and the small network of the papers
- `synthpi.quality`: Is the synthetic image the second image of *this* tissue? Measures with and without true pairs, each shown to fall on damage
- `synthpi.ranks`: What can be said about an embedding without a single label
- `synthpi.recipes`: What a view may differ in: the augmentations that teach an encoder what to ignore
- `synthpi.regression`: Ridge regression on subjects that the fit has not seen, with intervals over subjects
- `synthpi.report`: A run as one page that opens anywhere: text, figures and tables in a single HTML file
- `synthpi.runtimes`: PyTorch files, TorchScript, ONNX, diffusion pipelines and callables, opened without running a pickle
- `synthpi.sanity`: Does a map tell of what the network has learnt, or only of the image?
- `synthpi.stacks`: H&E beside immunofluorescence: TIFF of 16 bits and any number of channels becomes pairs of pictures
- `synthpi.stains`: Privileged images that no network has learnt: a slide's own stains, and what a synthetic image has to be better than
- `synthpi.steps`: What one training step does, and a large batch on a small GPU
- `synthpi.study`: Does a synthetic second image help? Every arm, on your tiles, in one call
- `synthpi.synthesise`: A folder of tiles and a generator to a cache of pairs, with a look at the first ones before the rest is made
- `synthpi.terminal`: What all commands share: how errors are told, how cores are shared, how several processes start
- `synthpi.tileset`: The tiles of a study: read, split, guarded, and scored by one probe
- `synthpi.tiling`: Overlapping tiles, blended: the same image in whatever order the tiles come, with seams weaker than the generator's own noise
- `synthpi.tissue_report`: What a study found, as one page that a person likes to read
- `synthpi.trainer`: One small loop: resumable, watched, with a history to plot
- `synthpi.translation`: Training a generator on a small set of images, paired or not
- `synthpi.views`: From a record to the augmented images that enter the branches
- `synthpi.volume_arms`: What a study of volumes compares: one name for one way of getting features of a crop
- `synthpi.volume_report`: What a study of volumes found, as one page that a person likes to read
- `synthpi.volume_scores`: From the features of all arms to the numbers of the study, each with its interval
- `synthpi.volume_sets`: Folders of volumes in their published layouts become records; subjects are split once, in a file that moves with the data
- `synthpi.volume_study`: Does it help to tell an encoder where in the body a crop is? Every arm, on your volumes, in one call
- `synthpi.volumes`: Scans are decoded, oriented, resampled and normalised once; afterwards they are arrays on disk that know where in the body they lie
- `synthpi.watch`: What a run looks like while it learns: collapse, and the history"""

from importlib.metadata import PackageNotFoundError, version as _version

try: __version__ = _version("synthpi")
except PackageNotFoundError: __version__ = "0+unknown"  # a clone on sys.path, not installed

"""synthpi trains an image encoder on unlabelled tissue tiles and on *synthetic* second images of the
same tissue, for example nuclear masks that a small generator draws: privileged information, there
in training and absent when the encoder is used. It then compares that encoder with
strong baselines, explains what it looks at, and writes one report.

Nine wings stand on one ground, `core`, behind one door, `cli`:

- `core`: run folders, keyed randomness, images, files, checks
- `data`: folders of images to data sets to views
- `volumes`: scans to stores to crops in millimetres
- `models`: encoders, branches, encoder files
- `losses`: what compares embeddings
- `train`: one resumable loop
- `pairs`: generators, and the second images they make
- `evaluate`: what frozen features know, and how sure that is
- `explain`: where an encoder looks, and how it arranges a data set
- `studies`: the wings put together, one call and one page each
- `cli`: the command line

Modules:

- `synthpi.cli.app`: What all commands share: flags from settings, errors as lines, cores, processes
- `synthpi.cli.doctor`: What this machine has, what is missing for which feature, and what to do about it
- `synthpi.cli.explain`: `synthpi explain` from a terminal
- `synthpi.cli.pairs`: Generators and synthetic images from a terminal
- `synthpi.cli.pretrain`: One encoder from a folder of tiles, from a terminal
- `synthpi.cli.tissue`: The study of tiles from a terminal: on simulated tiles, and on your own
- `synthpi.cli.volumes`: Where in the body is this crop? The study of volumes from a terminal
- `synthpi.core.checks`: Values from outside are checked where they come in; settings are said once
- `synthpi.core.figures`: What all figures share: colours, markers, sizes
- `synthpi.core.files`: Whole files or none, with checksums, and fingerprints of content
- `synthpi.core.groups`: Folds and resampling that keep a patient whole
- `synthpi.core.images`: Any file, array or tensor to RGB, to a mask, to a square
- `synthpi.core.optics`: Light through stained tissue: Beer-Lambert, stain matrices, re-staining
- `synthpi.core.runs`: Where a run computes, where it writes, and what it notes about its machine
- `synthpi.core.seeds`: Seeds made of names, and random states that can be put back
- `synthpi.data.conversion`: Arrays and outlines become, once, a plain folder of images that every command reads
- `synthpi.data.device_views`: The same recipes on a whole batch, where the network is
- `synthpi.data.folders`: Folders and manifests to a `Dataset`, with the patient of every image
- `synthpi.data.nuclei_sets`: PanNuke and MoNuSeg, each read in its published layout
- `synthpi.data.phantoms`: Simulated H&E tissue: nine classes, exact nuclear masks, patients
- `synthpi.data.published`: Seven published sets, each read by its name in its published layout
- `synthpi.data.recipes`: What a view may differ in: the augmentations that teach an encoder what to ignore
- `synthpi.data.splits`: Every image decoded once, and splits that keep patients whole
- `synthpi.data.stain_sets`: H&E beside another stain: TIFF stacks, paired folders, BCI
- `synthpi.data.tile_sets`: NCT-CRC-HE, PatchCamelyon and sets of a hub, each read in its published layout
- `synthpi.data.views`: From a record to the augmented images that enter the branches
- `synthpi.evaluate.budget`: How many labels does an encoder save?
- `synthpi.evaluate.crossval`: Grouped folds, an inner choice of C, and intervals over subjects
- `synthpi.evaluate.feature_cache`: Features read once, and found again for the same encoder and the same images
- `synthpi.evaluate.features`: Images through a frozen encoder, and features that need none
- `synthpi.evaluate.intervals`: Scores with intervals over patients and training seeds, and error reduction
- `synthpi.evaluate.logistic`: All folds, values of C and targets solved at once, to scikit-learn's optimum
- `synthpi.evaluate.probes`: Logistic regression, the small network of the TriDeNT papers, and nearest neighbours
- `synthpi.evaluate.ranks`: What can be said about an embedding without a single label
- `synthpi.evaluate.regression`: Quantities and positions from frozen features, on subjects that the fit has not seen
- `synthpi.evaluate.scores`: Accuracy, balanced accuracy, macro-F1, recall and AUC
- `synthpi.evaluate.significance`: Paired tests over folds, over answers and over subjects, and Holm's adjustment
- `synthpi.evaluate.tables`: One table of all arms, with intervals and paired tests
- `synthpi.explain.activations`: Which nonlinearities of a network guided backpropagation covers
- `synthpi.explain.map_explorer`: Click a point of a map: its image, synthetic partner, saliency and neighbours
- `synthpi.explain.maps`: How an encoder arranges a data set, and how far to trust the picture
- `synthpi.explain.neighbours`: Do classes lie together, or patients? And what is nearest in other subjects?
- `synthpi.explain.pair_explorer`: One pair at a time, in one place: flip between real and synthetic, the worst first
- `synthpi.explain.pictures`: A picture that can be clicked, two compared in place, and a still one
- `synthpi.explain.places`: What an encoder of crops knows of where in the body they were
- `synthpi.explain.saliency`: Where in the image an encoder looks
- `synthpi.explain.sanity`: Does a map depend on what the network has learnt, or only on the image?
- `synthpi.explain.targets`: What a saliency map explains: a class, a similarity, or one dimension
- `synthpi.explain.volume_explorer`: Slide through a volume, click a voxel, see the nearest crops in other subjects
- `synthpi.losses.distance`: Position as privileged information: embeddings as far apart as their crops
- `synthpi.losses.geometry`: Distances between crops: which pairs, how far, and how well embeddings follow
- `synthpi.losses.paired`: VICReg, Barlow Twins and SimCLR for two or more branches, on one or many devices
- `synthpi.losses.position`: Reading a place from a crop: the regression head and its loss
- `synthpi.models.branches`: Encoders and projectors in a layout: Siamese, TriDeNT, or more privileged sources
- `synthpi.models.cards`: What an encoder is, what it was trained on and how to load it, on one page
- `synthpi.models.distances`: An embedding whose distances are millimetres, loaded from a run
- `synthpi.models.encoders`: MONAI's networks by name, and those of other libraries
- `synthpi.models.files`: Weights and what they are, in one file that opens without a pickle
- `synthpi.pairs.cache`: Files named by what they were made from, each with a checksum, and their table
- `synthpi.pairs.examples`: What a generator learns from: pairs or two folders, with patients held out
- `synthpi.pairs.foreign`: Which published network a file of weights belongs to, read from its names and shapes
- `synthpi.pairs.generators`: One calling convention for everything that supplies a privileged image
- `synthpi.pairs.graphs`: Graphs are read before they run, and run only if they do nothing but compute
- `synthpi.pairs.kid`: How far a set of synthetic images is from the set of true ones
- `synthpi.pairs.makers`: From tiles to images on the disk: read ahead, translate, write behind
- `synthpi.pairs.measures`: Agreement of nuclei, edges, seams and checkerboards of one image
- `synthpi.pairs.objectives`: What a generator learns from: pairs, or two sets that are not paired
- `synthpi.pairs.privileged`: The synthesised privileged column: made once, checked, and with a history
- `synthpi.pairs.quality`: Whether synthetic images are second images of this tissue, with intervals
- `synthpi.pairs.runtimes`: PyTorch files, TorchScript, ONNX, pipelines and functions, opened without a pickle
- `synthpi.pairs.stains`: A slide's own stains, and controls that a synthetic image has to beat
- `synthpi.pairs.tiling`: A generator on images of any size, in overlapping tiles that are blended
- `synthpi.pairs.training`: Training a generator on a small set of images, paired or not
- `synthpi.studies.embeddings`: A grid of crops through a frozen encoder into one Parquet file, and its probe
- `synthpi.studies.embeddings_settings`: Which crops are embedded, and what is then asked of the file
- `synthpi.studies.explanation`: Coverage, saliency, sanity check and map of finished encoders, in one call and one page
- `synthpi.studies.explanation_page`: Sections and figures of `synthpi explain`
- `synthpi.studies.explanation_settings`: Which encoders are explained, on which images, and what is asked
- `synthpi.studies.features`: Embeddings of crops, or features that were made elsewhere, with what is known of each
- `synthpi.studies.figures`: The figures of a study: curves, intervals, per-class bars, confusion, pairs
- `synthpi.studies.generator`: Images to a generator, judged on patients that it has not seen
- `synthpi.studies.generator_settings`: The arguments of a training, their checks, and the flags
- `synthpi.studies.page`: A run as one page that opens anywhere: text, figures and tables in a single HTML file
- `synthpi.studies.pretraining`: A folder of tiles, perhaps with caches of synthetic images, to an encoder
- `synthpi.studies.pretraining_settings`: The arguments of `pretrain`, said once
- `synthpi.studies.probe`: What frozen features know: a place, a region, or a label of your own
- `synthpi.studies.runs`: The names inside a run folder, and what is read back from it
- `synthpi.studies.synthesise`: A folder of tiles and a generator to a cache of pairs, the first ones shown early
- `synthpi.studies.tissue.arms`: What a study compares: one name for one way of getting features
- `synthpi.studies.tissue.inputs`: Everything is read and checked before anything is written
- `synthpi.studies.tissue.report`: What a study found, as one page that a person likes to read
- `synthpi.studies.tissue.scores`: From the predictions of all arms to numbers with intervals
- `synthpi.studies.tissue.settings`: The arguments of the study of tiles, said once
- `synthpi.studies.tissue.study`: Does a synthetic second image help? Every arm, on your tiles, in one call
- `synthpi.studies.tissue.tiles`: The tiles of a study: read, split, guarded, and scored by one probe
- `synthpi.studies.volumes.arms`: What a study of volumes compares: ways of getting features of a crop
- `synthpi.studies.volumes.report`: What a study of volumes found, as one page
- `synthpi.studies.volumes.scores`: From the features of all arms to the numbers of the study, each with its interval
- `synthpi.studies.volumes.settings`: The arguments, their checks, the identity of a folder, and the flags
- `synthpi.studies.volumes.study`: Does it help an encoder to know where in the body a crop is? One call
- `synthpi.train.batchnorm`: The statistics of the whole batch, whichever process holds its rows
- `synthpi.train.budget`: How long a run is, and how its learning rate falls
- `synthpi.train.checkpoints`: Files that a run continues from, written whole or not at all
- `synthpi.train.history`: One row per step, read from the device once and kept exactly
- `synthpi.train.interrupts`: A step is taken whole or not at all, whatever stops it
- `synthpi.train.memory`: What a training step needs, before there is a device to hold it
- `synthpi.train.processes`: Devices, precision and several processes, by way of accelerate
- `synthpi.train.steps`: What one training step does, and a large batch on a small GPU
- `synthpi.train.trainer`: One small loop: resumable, watched, with a history to plot
- `synthpi.train.watch`: What a run looks like while it learns: collapse, and the history
- `synthpi.volumes.bodies`: Simulated trunks with a dozen organs, in MRI or CT, every voxel's organ known
- `synthpi.volumes.crop_lists`: The crops on which every encoder is scored, drawn once and kept in a file
- `synthpi.volumes.crop_views`: A crop seen twice, at different brightness and with holes
- `synthpi.volumes.crops`: Random crops for training, grids for inference, each with its centre in mm
- `synthpi.volumes.scans`: Scans are read, oriented, resampled and normalised once, into arrays on disk
- `synthpi.volumes.sets`: Folders of volumes in their published layouts become records, split by subject
- `synthpi.volumes.store`: Prepared scans: one folder of arrays that know where in the body they lie"""

from importlib.metadata import PackageNotFoundError, version as _version

try: __version__ = _version("synthpi")
except PackageNotFoundError: __version__ = "0+unknown"  # a clone on sys.path, not installed

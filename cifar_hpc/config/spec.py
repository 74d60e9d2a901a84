"""The spec of a run: frozen dataclasses with every key, its default, unit and range.

Defaults are the report's recipe. `batch_size` and `dropout`, which the report leaves open, are our choice."""

from dataclasses import dataclass, field
from typing import Any, Literal

from cifar_hpc.config.fields import option
from cifar_hpc.slurm.options import node_counts

CLASSES = 10
BUILT_IN = "improved_resnet:ImprovedResNet"  # the built-in network, as exported models name it
TARGET_KEYS = ("target", "args", "code", "init_from", "init_digest")  # of a network that is not the built-in one
IMAGE_SIZE = 32  # height and width of a CIFAR-10 image, in pixels
LEAST_SIZE, LARGEST_SIZE = 4, 1024  # of an image, likewise
# Of a layer that another one follows, whose 1x1 convolution of stride 2 then has 4 x this many channels. With fewer
# than 16 oneDNN writes past its memory on a CPU (https://github.com/uxlfoundation/oneDNN/issues/6035).
LEAST_WIDTH = 4
# A rank on a GPU launches kernels from one CPU core; autograd, NCCL and the writer of checkpoints need others.
CORES_BESIDE_GPU = 4
# The largest numbers that PyTorch takes where it computes with 32 bits. Every number has a bound: a checkpoint with
# one of thousands of digits could not be read.
FLOAT32, INT32 = 1e38, 2**31 - 1


@dataclass(frozen=True)
class AugmentConfig:
    """The report's six augmentations, and one more, with torchvision's meaning; 0 switches one off at no cost."""

    crop_padding: int = option(4, "zero padding, in pixels, before the crop; 0 is off", low=0, high=LARGEST_SIZE - 1)
    flip: float = option(0.5, "probability of a horizontal flip; 0 is off", low=0, high=1)
    rotation: float = option(15.0, "largest angle of rotation, in degrees; 0 is off", low=0, high=180)
    brightness: float = option(0.2, "factor is uniform in [max(0, 1 - x), 1 + x]; 0 is off", low=0, high=FLOAT32)
    contrast: float = option(0.2, "factor is uniform in [max(0, 1 - x), 1 + x]; 0 is off", low=0, high=FLOAT32)
    saturation: float = option(0.2, "factor is uniform in [max(0, 1 - x), 1 + x]; 0 is off", low=0, high=FLOAT32)
    hue: float = option(0.1, "shift is uniform in [-x, x] turns of the circle; 0 is off", low=0, high=0.5)
    erasing: float = option(0.5, "probability of erasing a box after normalisation; 0 is off", low=0, high=1)
    erasing_scale: tuple[float, float] = option((0.02, 0.33), "erased area over image area, from and to", low=0, high=1)
    erasing_ratio: tuple[float, float] = option(
        (0.3, 3.3), "height over width of the box, from and to (log-uniform)", above=0, high=FLOAT32
    )

    trivial: bool = option(False, "TrivialAugmentWide, on the image as it is, before all others")

    @property
    def geometric(self) -> bool:
        """Return whether any pixel is moved (crop, flip or rotation)."""
        return self.crop_padding > 0 or self.flip > 0 or self.rotation > 0

    @property
    def jitter(self) -> bool:
        """Return whether any colour is changed."""
        return self.blending or self.hue > 0

    @property
    def blending(self) -> bool:
        """Return whether any of brightness, contrast and saturation is changed."""
        return self.brightness > 0 or self.contrast > 0 or self.saturation > 0


@dataclass(frozen=True)
class MixingConfig:
    """Mixup and CutMix with their papers' meaning, drawn for each sample; with both on, each takes one of them."""

    mixup: float = option(0.0, "alpha: shares of two images are from Beta(alpha, alpha); 0 is off", low=0, high=100)
    cutmix: float = option(0.0, "alpha: area of the pasted box is from Beta(alpha, alpha); 0 is off", low=0, high=100)
    probability: float = option(1.0, "probability that a sample is mixed at all; 0 is off", low=0, high=1)

    @property
    def on(self) -> bool:
        """Return whether any image is changed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


@dataclass(frozen=True)
class ModelSpec:
    target: str | None = option(
        None,
        "your own network, FILE.py:NAME from the job file's folder or MODULE:NAME; null is that of the keys below",
    )
    args: dict[str, Any] = option({}, "arguments of the target; classes and image_size come from the data")
    code: str | None = option(None, "digest of the target's files; filled in, not given")
    init_from: str | None = option(
        None, "weights to begin with: a run (its best.pt), or the file of a checkpoint or of an exported model"
    )
    init_digest: str | None = option(None, "sha256 of the file of init_from; filled in, not given")
    activation: Literal["leaky_relu", "relu"] = option("leaky_relu", "activation after each convolution")
    dropout: float = option(0.2, "dropout rate after each layer", low=0, high=0.95)
    stem_width: int = option(32, "channels of the stem convolution", low=1, high=100_000)
    blocks: tuple[int, ...] = option((3, 3, 3), "bottleneck blocks in each layer", low=1, high=1000)
    widths: tuple[int, ...] = option(
        (64, 128, 256), "bottleneck width of each layer (output is 4 x width)", low=1, high=100_000
    )
    width_multiplier: float = option(1.0, "scales stem_width and widths; small ones make toy models", above=0, high=100)

    def scaled(self, width: int) -> int:
        """Channels of a convolution whose spec says `width`."""
        return max(1, round(width * self.width_multiplier))


# By name: the class in training/optim.py, and its options beside lr and weight_decay.
OPTIMIZERS = {"sgd": ("SGD", ("momentum", "nesterov", "bias_factor")), "adamw": ("AdamW", ("betas", "eps"))}


@dataclass(frozen=True)
class OptimizerSpec:
    name: Literal["sgd", "adamw"] = option("sgd", "the inner optimizer")
    lr: float = option(0.05, "initial learning rate", above=0, high=FLOAT32)
    momentum: float = option(0.9, "SGD's momentum", low=0, high=1)
    weight_decay: float = option(
        1e-4, "L2 penalty on the weights; AdamW's is decoupled from the gradient", low=0, high=FLOAT32
    )
    nesterov: bool = option(False, "SGD's Nesterov momentum")
    bias_factor: float = option(
        1.0, "SGD's learning rate of the parameters whose names end with bias, as a multiple of lr", above=0, high=1e6
    )
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's decay of the two moments", low=0, high=0.999999)
    eps: float = option(1e-8, "AdamW's term in the denominator", above=0, high=1)
    decay_all: bool = option(True, "weight decay on BatchNorm's parameters and on biases, too; false spares them")


@dataclass(frozen=True)
class LookaheadSpec:
    enabled: bool = option(True, "wrap the optimizer in Lookahead")
    k: int = option(5, "updates of the fast weights between two syncs", low=1, high=INT32)
    alpha: float = option(0.5, "step of the slow weights towards the fast ones", above=0, high=1)
    bn_batches: int = option(
        16,
        "training batches to re-estimate BatchNorm statistics for slow, averaged or resized training; 0 is off",
        low=0,
        high=INT32,
    )


@dataclass(frozen=True)
class ScheduleSpec:
    name: Literal["cosine", "linear", "constant"] = option(
        "cosine", "shape of the learning rate; all but constant fall towards zero"
    )
    per: Literal["epoch", "step"] = option("epoch", "how often the learning rate changes (the report: per epoch)")
    warmup_epochs: float = option(
        0.0, "epochs over which the rate rises from zero to optimizer.lr with each update", low=0, high=1_000_000
    )


@dataclass(frozen=True)
class EmaSpec:
    decay: float | None = option(
        None, "evaluate averaged weights, of which an update keeps this share; null is off", above=0, high=0.999999
    )


@dataclass(frozen=True)
class TrainSpec:
    epochs: int = option(400, "passes over the training images", low=1, high=1_000_000)
    batch_size: int = option(128, "images in a GLOBAL batch, over all shards", low=1, high=INT32)
    label_smoothing: float = option(0.1, "label smoothing of the training loss", low=0, high=1)
    amp: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "autocast type; auto is bf16 where the hardware has it, else fp16 on CUDA and fp32 on a CPU"
    )
    shards: int | None = option(
        None, "logical shards; null is the most tasks that the first submission asks for", low=1, high=INT32
    )
    seed: int = option(0, "all randomness is a function of it", low=0, high=INT32)
    deterministic: bool = option(True, "deterministic kernels only (the same bits need them)")
    compile: bool = option(False, "compile the model with torch.compile")
    graph: Literal["auto", "on", "off"] = option(
        "auto", "on: on one GPU, launch steps as CUDA graphs, which keep the bits; auto is off so far"
    )
    device: str = option("auto", "auto (CUDA, or the CPU where no GPU was asked for) | cuda | cuda:N | cpu")
    cpu_threads: int | None = option(
        None,
        "threads of a rank, part of the bits; null: cpus_per_task, or 1 (Slurm), or a fair share",
        low=1,
        high=4096,
    )
    log_seconds: float = option(30.0, "seconds between two progress lines in train.log", above=0, high=60)
    watchdog_minutes: float = option(
        15.0, "minutes without progress after which a run counts as hung and starts again", above=0, high=100_000
    )


@dataclass(frozen=True)
class DataSpec:
    source: Literal["cifar10", "cifar100", "folder", "synthetic"] = option("cifar10", "where the images come from")
    root: str = option("data", "folder of the images, from the project's root, ~ or $VARIABLE; not for synthetic")
    target: str | None = option(None, "your own images: FILE.py:NAME from the job file's folder, or MODULE:NAME")
    args: dict[str, Any] = option({}, "arguments of the target")
    code: str | None = option(None, "digest of the target's files; filled in, not given")
    image_size: int | None = option(
        None, "height and width to resize all images to; null: 32, or a folder's own", low=LEAST_SIZE, high=LARGEST_SIZE
    )
    train_size: int | None = option(None, "training images (a fixed random choice); null is all", low=1, high=INT32)
    test_size: int | None = option(None, "test images to use; null is all", low=1, high=INT32)
    holdout: int | None = option(
        None, "training images kept apart (a fixed random choice) as the test images", low=1, high=INT32
    )

    @property
    def size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.image_size or IMAGE_SIZE

    @property
    def in_root(self) -> bool:
        """Return whether data.root chooses the images; elsewhere it is only their place."""
        return self.target is not None or self.source == "folder"

    @property
    def label(self) -> str:
        """Name the images in a word."""
        name = self.target or (f"{self.source}:{self.root}" if self.in_root else self.source)
        return f"{name}, {self.image_size}x{self.image_size} pixels" if self.image_size else name


@dataclass(frozen=True)
class ResizingSpec:
    initial: int | None = option(
        None, "height and width of training images at first, in pixels; null is off", low=LEAST_SIZE, high=LARGEST_SIZE
    )
    delay: float = option(0.5, "share of the epochs before the images grow", low=0, high=1)
    finetune: float = option(0.2, "share of the epochs, at the end, on whole images", low=0, high=1)
    increment: int = option(4, "pixels by which the images grow at a time", low=1, high=LARGEST_SIZE)


@dataclass(frozen=True)
class CheckpointSpec:
    every: Literal["auto"] | None = option(
        None, "auto, as null without the next two: an interval within an epoch from measured costs and losses"
    )
    every_minutes: float | None = option(None, "minutes between two checkpoints within an epoch", above=0, high=100_000)
    every_steps: int | None = option(None, "steps between two checkpoints within an epoch", low=1, high=INT32)
    every_epochs: int | None = option(
        None,
        "epochs between two checkpoints at an epoch's end; null: 1, or under auto as costs allow",
        low=1,
        high=INT32,
    )
    keep: int = option(3, "newest checkpoints kept, beside best.pt", low=1, high=INT32)

    @property
    def automatic(self) -> bool:
        """Return whether the interval within an epoch is chosen during the run."""
        return self.every_minutes is None and self.every_steps is None

    @property
    def interval_seconds(self) -> float | None:
        """Seconds between two checkpoints within an epoch, or None where they are not given in time."""
        return None if self.every_minutes is None else 60 * self.every_minutes


@dataclass(frozen=True)
class RetrySpec:
    max: int = option(3, "how often a run is requeued for this cause", low=0, high=INT32)


@dataclass(frozen=True)
class NotifySpec:
    command: str | None = option(
        None, "shell line to run, for 30 s at most, when the run has finished or failed for good; null is none"
    )


@dataclass(frozen=True)
class TrackingSpec:
    tensorboard: bool = option(False, "no longer has an effect: python -m cifar_hpc track RUN --tensorboard DIR")
    wandb: Literal["offline", "online"] | None = option(
        None, "no longer has an effect: python -m cifar_hpc track RUN --wandb offline or online"
    )
    project: str = option("cifar_hpc", "no longer has an effect: --project of track")


@dataclass(frozen=True)
class ResourcesSpec:
    partition: str | None = option(None, "Slurm partition; null leaves the choice to the site")
    account: str | None = option(None, "Slurm account")
    qos: str | None = option(None, "Slurm quality of service")
    time: str = option("04:00:00", "time limit in any Slurm form (minutes, HH:MM:SS, D-HH, UNLIMITED, ...)")
    nodes: str = option("1", "N, or MIN-MAX or a list such as 1,2,4 for Slurm to choose")
    gpus_per_node: int | str = option(1, "GPUs on each node, or with their type such as a100:4", low=0, high=4096)
    tasks_per_node: int | None = option(None, "ranks on each node; null is one a GPU, or 1", low=1, high=4096)
    cpus_per_task: int | None = option(
        None, f"CPU cores of each rank; null is {CORES_BESIDE_GPU} with GPUs, else Slurm's own choice", low=1, high=4096
    )
    mem: str | None = option(None, "memory of a node, such as 32G")
    constraint: str | None = option(None, "node features, as sbatch's --constraint")
    exclude: str | None = option(None, "nodes to avoid")
    nodelist: str | None = option(None, "nodes to use")
    reservation: str | None = option(None, "Slurm reservation")
    dependency: str | None = option(None, "further job dependencies, beside singleton")
    comment: str | None = option(None, "job comment; some sites read wishes from it")
    requeue: bool = option(True, "requeue the job after a preemption, a timeout or a node failure")
    warning_seconds: int = option(
        120,
        "seconds before the time limit at which Slurm sends SIGUSR2; a quarter of a short limit at most",
        low=10,
        high=65535,
    )
    sbatch: dict[str, str] = option({}, "any further sbatch options, by their long names; true: without a value")

    @property
    def max_nodes(self) -> int:
        """The largest number of nodes that Slurm may give."""
        return node_counts(self.nodes)[1]

    @property
    def gpus(self) -> int:
        """GPUs on each node, without their type."""
        return int(str(self.gpus_per_node).rpartition(":")[2])

    @property
    def ntasks_per_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or max(1, self.gpus)

    @property
    def fewest_tasks(self) -> int | None:
        """Processes on the smallest number of nodes that Slurm may give; None where it may give but one number."""
        fewest, most = node_counts(self.nodes)
        return fewest * self.ntasks_per_node if self.nodes != str(most) else None


@dataclass(frozen=True)
class Spec:
    model: ModelSpec = field(default_factory=ModelSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    lookahead: LookaheadSpec = field(default_factory=LookaheadSpec)
    ema: EmaSpec = field(default_factory=EmaSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    data: DataSpec = field(default_factory=DataSpec)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    resizing: ResizingSpec = field(default_factory=ResizingSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    failures: RetrySpec = field(default_factory=RetrySpec)
    timeouts: RetrySpec = field(default_factory=lambda: RetrySpec(max=100))
    notify: NotifySpec = field(default_factory=NotifySpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)

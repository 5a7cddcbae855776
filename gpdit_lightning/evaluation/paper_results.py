"""Results of GPDiT (arXiv 2505.07344, tables 2 and 3) and ACDiT (arXiv 2412.07720, tables 2 and 3), as printed there.

GPDiT continues videos. ACDiT generates images and videos of classes from noise alone.
"""

from typing import NamedTuple

from gpdit_lightning.path_kinds import Medium


class PaperTable(NamedTuple):
    """Rows of one table of a paper for one data set."""

    title: str
    data: str
    videos: int | None
    """Number of continued videos, or of samples from noise alone; None if the paper does not state it."""
    guidance: float
    """Guidance scale over the context, or over the label of samples from noise alone."""
    protocol: str
    """Protocol of the rows of the paper's models."""
    protocol_of_others: str
    """Protocol of the other rows."""
    columns: tuple[str, ...]
    """Columns after the method; scores have their keys in `names.SCORE_NAMES`."""
    rows: dict[str, tuple[str, ...]]
    """Cells by method."""
    paper: str = "GPDiT"
    """The paper, with which the names of its models begin."""
    samples: Medium | None = None
    """Medium of samples from noise alone; None for continued videos."""
    frames: tuple[int, int] = (12, 5)
    """Generated frames and context frames."""
    not_stated: str = ""
    """What the protocol of the paper leaves open."""


ACDIT_SAMPLER, ACDIT_SIZE = ("dpm2m", 25), (256, 256)  # ACDiT, section 5.1
NOT_STATED = (
    "which videos and frames were used, at which size and stride, the sampler and its steps, the seeds, the networks "
    "of the scores, and whether FVD includes the context frames"
)
ZERO_SHOT_COLUMNS = ("#Data", "#Params", "fid", "fvd", "is")
PAPER_TABLES = (
    PaperTable(
        "Table 2, zero-shot on MSR-VTT",
        "MSR-VTT",
        7000,
        1.2,
        "7,000 videos, 12 frames from 5, guidance 1.2",
        "12 frames from 5",
        ZERO_SHOT_COLUMNS,
        {
            "MagicVideo": ("10M", "-", "36.5", "998", "-"),
            "LVDM": ("2M", "1.2B", "-", "742", "-"),
            "ModelScope": ("10M", "1.7B", "-", "550", "-"),
            "PixelDance": ("10M", "1.5B", "-", "381", "-"),
            "DreamVideo": ("5.3M+340k", "2.0B", "-", "149", "-"),
            "SnapVideo": ("1.1B", "3.9B", "8.5", "110", "-"),
            "GPDiT-H": ("192M Img + 6.4M Vid", "2.0B", "7.4", "68", "-"),
            "GPDiT-H-LONG": ("24M Vid", "2.0B", "7.4", "64", "-"),
        },
    ),
    PaperTable(
        "Table 2, zero-shot on UCF-101",
        "UCF-101",
        10000,
        1.2,
        "10,000 videos, 12 frames from 5, guidance 1.2",
        "12 frames from 5",
        ZERO_SHOT_COLUMNS,
        {
            "MagicVideo": ("10M", "-", "145.0", "699", "-"),
            "CogVideo": ("5.4M", "9B", "-", "626", "50.5"),
            "InternVid": ("28M", "-", "60.3", "617", "21.0"),
            "Video-LDM": ("10M", "4.2B", "-", "551", "33.5"),
            "Make-A-Video": ("20M", "9.7B", "-", "367", "33.0"),
            "SnapVideo": ("1.1B", "3.9B", "39.0", "260", "-"),
            "PixelDance": ("10M", "1.5B", "49.4", "243", "42.1"),
            "GPDiT-H": ("192M Img + 6.4M Vid", "2.0B", "14.8", "243", "66.5"),
            "GPDiT-H-LONG": ("24M Vid", "2.0B", "7.9", "218", "66.6"),
        },
    ),
    PaperTable(
        "Table 3, trained on UCF-101",
        "UCF-101",
        10000,
        2.0,
        "10,000 videos, 12 frames from 5, guidance 2.0",
        "not stated",
        ("#Params", "Type", "fvd"),
        {
            "ExtDM-K2": ("119M", "Video-DIT", "394"),
            "OmniTokenizer": ("227M", "Token-AR", "314"),
            "ACDiT": ("130M", "Frame-AR", "376"),
            "MAGI": ("850M", "Frame-AR", "297"),
            "FAR": ("130M", "Frame-AR", "194"),
            "GPDiT-B-OF": ("80M", "Frame-AR", "216"),
            "GPDiT-B-OF2": ("80M", "Frame-AR", "214"),
        },
    ),
    PaperTable(
        "ACDiT, Table 2, class-conditional on ImageNet 256x256",
        "ImageNet",
        50_000,
        1.5,
        "FID-50K, DPM-Solver, 25 steps per block, guidance 1.5",
        "as their papers report",
        ("Type", "Latent", "#Params", "fid", "is", "precision", "recall"),
        {
            "ADM": ("Diff.", "-", "554M", "10.94", "101.0", "0.69", "0.63"),
            "LDM-4-G": ("Diff.", "Cont.", "400M", "3.60", "247.7", "-", "-"),
            "DiT-L/2": ("Diff.", "Cont.", "458M", "5.02", "167.2", "0.75", "0.57"),
            "DiT-XL/2": ("Diff.", "Cont.", "675M", "2.27", "278.2", "0.83", "0.57"),
            "MaskGIT": ("Mask.", "Disc.", "227M", "6.18", "316.2", "0.83", "0.58"),
            "MAGE": ("Mask.", "Disc.", "230M", "6.93", "195.8", "-", "-"),
            "VQGAN": ("AR", "Disc.", "1.4B", "15.78", "78.3", "-", "-"),
            "RQTran": ("AR", "Disc.", "3.8B", "7.55", "134.0", "-", "-"),
            "VAR-d16": ("VAR", "Disc.", "310M", "3.30", "274.4", "0.84", "0.51"),
            "VAR-d20": ("VAR", "Disc.", "600M", "2.57", "302.6", "0.83", "0.56"),
            "LlamaGen-L": ("AR", "Disc.", "343M", "3.07", "256.1", "0.83", "0.52"),
            "LlamaGen-XL": ("AR", "Disc.", "775M", "2.62", "244.1", "0.80", "0.57"),
            "LlamaGen-XXL": ("AR", "Disc.", "1.4B", "2.34", "253.9", "0.80", "0.59"),
            "ImageFolder": ("AR", "Disc.", "362M", "2.60", "295.0", "0.75", "0.63"),
            "LlamaGen+NPP": ("AR", "Cont.", "1.4B", "2.55", "282.0", "0.84", "0.56"),
            "MAR-L (AR)": ("AR", "Cont.", "479M", "4.07", "232.4", "-", "-"),
            "MAR-L (MAR)": ("MAR", "Cont.", "479M", "1.78", "296.0", "0.81", "0.60"),
            "MonoFormer": ("AR+Diff", "Cont.", "1.1B", "2.57", "272.6", "0.84", "0.56"),
            "Dart": ("AR+Diff", "Cont.", "820M", "3.82", "263.8", "-", "-"),
            "ACDiT-L": ("AR+Diff", "Cont.", "460M", "2.53", "262.9", "0.82", "0.55"),
            "ACDiT-XL": ("AR+Diff", "Cont.", "677M", "2.45", "267.4", "0.82", "0.57"),
            "ACDiT-H": ("AR+Diff", "Cont.", "954M", "2.37", "273.3", "0.82", "0.57"),
        },
        paper="ACDiT",
        samples="image",
        frames=(1, 0),
        not_stated=(
            "how labels are drawn (ADM and DiT draw them uniformly), the real images and their number (ADM: moments of "
            "the training set, and 10,000 images for precision and recall), the networks of the scores, and the seeds"
        ),
    ),
    PaperTable(
        "ACDiT, Table 3, class-conditional on UCF-101",
        "UCF-101",
        None,
        2.5,
        "16 frames of 256x256, DPM-Solver, 25 steps per block, guidance 2.5",
        "as their papers report",
        ("Type", "#Params", "fvd"),
        {
            "LVDM": ("Diff.", "437M", "372"),
            "Latte": ("Diff.", "674M", "478"),
            "Matten": ("Diff.", "853M", "211"),
            "VideoFusion": ("Diff.", "510M", "173"),
            "MMVG": ("Mask.", "230M", "328"),
            "MAGVIT": ("Mask.", "306M", "76"),
            "MAGVITv2": ("Mask.", "307M", "58"),
            "TATS": ("AR", "331M", "332"),
            "CogVideo": ("AR", "9.4B", "626"),
            "MAGVIT-AR": ("AR", "306M", "265"),
            "MAGVITv2-AR": ("AR", "307M", "109"),
            "OmniTokenizer": ("AR", "650M", "191"),
            "ACDiT-XL": ("AR+Diff.", "677M", "111"),
            "ACDiT-H": ("AR+Diff.", "954M", "104"),
            "ACDiT-H-LT": ("AR+Diff.", "954M", "90"),
        },
        paper="ACDiT",
        samples="video",
        frames=(16, 0),
        not_stated=(
            "the numbers of generated and of real videos, the split, how 16 frames are chosen from a video, how labels "
            "are drawn, the network of FVD, and the seeds"
        ),
    ),
)

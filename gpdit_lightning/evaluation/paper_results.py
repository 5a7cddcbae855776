"""Results published in the GPDiT paper (arXiv 2505.07344, tables 2 and 3), as printed there."""

from typing import NamedTuple


class PaperTable(NamedTuple):
    """Rows of one table of the paper for one data set."""

    title: str
    data: str
    videos: int
    guidance: float
    protocol: str
    """Protocol of the rows of GPDiT."""
    protocol_of_others: str
    """Protocol of the other rows."""
    columns: tuple[str, ...]
    """Columns after the method; scores have their keys in `report.HEADINGS`."""
    rows: dict[str, tuple[str, ...]]
    """Cells by method."""


PAPER_FRAMES = 12, 5  # generated frames, context frames
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
)

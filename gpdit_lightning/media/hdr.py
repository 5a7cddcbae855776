"""HDR video (ITU-R BT.2100: PQ and HLG) as sRGB, with the reference white of ITU-R BT.2408."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

# Codes of ITU-T H.273.
TRANSFER_PQ, TRANSFER_HLG = 16, 18
PRIMARIES_BT709, PRIMARIES_BT2020, PRIMARIES_DISPLAY_P3 = 1, 9, 12

REFERENCE_WHITE = 203.0  # cd/m2 of diffuse white, which becomes sRGB white (BT.2408, table 1)
PEAK = 1000.0  # cd/m2 of the display for which HLG is defined, and of most PQ masters
KNEE = 0.9  # of reference white; light above it is compressed

# Linear RGB to linear RGB with the primaries of BT.709 (BT.2020: ITU-R BT.2087).
TO_BT709 = {
    PRIMARIES_BT709: ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    PRIMARIES_BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    PRIMARIES_DISPLAY_P3: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
}
BLOCK_PIXELS = 2**18  # converted at a time, to bound memory
LUMINANCE = (0.2627, 0.6780, 0.0593)  # of the primaries of BT.2020


def tone_mapped(signal: np.ndarray, transfer: int, primaries: int) -> Tensor:
    """Convert an HDR image to sRGB.

    Up to `KNEE` the light of the image is reproduced, relative to reference white. Above, it is compressed so that
    `PEAK` becomes white; all channels are scaled alike, which keeps hues.

    Args:
        signal: uint16 (H, W, 3), full range.
        transfer: `TRANSFER_PQ` or `TRANSFER_HLG`.
        primaries: as in ITU-T H.273; unknown ones are taken for BT.2020.

    Returns:
        uint8 (H, W, 3).
    """
    rows = max(1, BLOCK_PIXELS // signal.shape[1])
    blocks = [signal[start : start + rows] for start in range(0, len(signal), rows)]
    return torch.cat([_tone_mapped(torch.from_numpy(block.astype(np.int32)), transfer, primaries) for block in blocks])


def _tone_mapped(signal: Tensor, transfer: int, primaries: int) -> Tensor:
    light = _to_light(transfer)[signal]
    if transfer == TRANSFER_HLG:  # BT.2100, table 5: the OOTF with a system gamma of 1.2
        luminance = (light @ torch.tensor(LUMINANCE)).clamp(min=1e-6)
        light = light * (luminance**0.2)[..., None] * (PEAK / REFERENCE_WHITE)
    light = (light @ torch.tensor(TO_BT709.get(primaries, TO_BT709[PRIMARIES_BT2020])).T).clamp(min=0)
    brightest = light.amax(dim=-1, keepdim=True).clamp(min=1e-6)
    light = light * (_compressed(brightest) / brightest)
    return _to_srgb()[(light.clamp(max=1) * 65535).round().to(torch.int32)]


def _compressed(light: Tensor) -> Tensor:
    """Map [0, PEAK] to [0, 1]: the identity up to the knee, then a hyperbola with the same slope at the knee."""
    peak = PEAK / REFERENCE_WHITE
    position = (light - KNEE) / (peak - KNEE)
    slope = (peak - KNEE) / (1 - KNEE)
    shoulder = KNEE + (1 - KNEE) * slope * position / (1 + (slope - 1) * position)
    return torch.where(light <= KNEE, light, shoulder)


@cache
def _to_light(transfer: int) -> Tensor:
    """Return the light of each 16-bit signal: relative to reference white for PQ, to the peak of the scene for HLG."""
    signal = torch.arange(65536, dtype=torch.float64) / 65535
    if transfer == TRANSFER_PQ:  # BT.2100, table 4
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        light = 10000 / REFERENCE_WHITE * ((power - c1).clamp(min=0) / (c2 - c3 * power)) ** (1 / m1)
    else:  # BT.2100, table 5
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)
    return light.float()


@cache
def _to_srgb() -> Tensor:
    """Return the uint8 sRGB level of each 16-bit level of light (IEC 61966-2-1)."""
    light = torch.arange(65536, dtype=torch.float64) / 65535
    level = torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (level * 255).round().to(torch.uint8)

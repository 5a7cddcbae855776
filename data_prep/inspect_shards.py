"""Look into a folder of latent shards: python data_prep/inspect_shards.py FOLDER [--verify] [--show N] [--why FILE]

Without an option: what the folder holds, and whether its latents are what their codec's constants promise.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.inspection import overview, strays, verify, why, write_sheet


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", metavar="FOLDER", type=Path, help="a folder of shards, or its manifest.json")
    options.add_argument(
        "--samples", type=int, default=512, help="samples that the statistics are measured over (default: %(default)s)"
    )
    options.add_argument(
        "--verify",
        action="store_true",
        help="read every byte and sample, name each fault; exit status 1 if there is one",
    )
    options.add_argument("--workers", type=int, help="processes for --verify (default: one for each core)")
    options.add_argument("--show", type=int, metavar="N", help="decode N samples of all buckets to a PNG")
    options.add_argument(
        "--out", type=Path, default=Path("sheet.png"), help="the PNG that --show writes (default: %(default)s)"
    )
    options.add_argument("--codec_source", help="where the codec's weights are now, if they moved since preparation")
    options.add_argument("--device", default="auto", help="where the codec computes: auto, cpu, cuda, cuda:1, ...")
    options.add_argument(
        "--why",
        metavar="FILE",
        help="say where a source went and why: a path, the name of a source or its end, or TAR/KEY",
    )
    return options


def verified(folder: Path, workers: int | None) -> bool:
    """Print every fault, then a summary; returns whether there was none."""
    manifest, faults = Manifest.load(folder, check_files=False), 0
    for fault in verify(manifest, workers):
        tqdm.write(fault)
        faults += 1
    for name in strays(manifest):
        print(f"note: {manifest.directory / name} is in no manifest: remove it if you do not know it")
    samples = sum(entry.count for entry in manifest.shards)
    print(f"{len(manifest.shards)} shards with {samples} samples: {f'{faults} faults' if faults else 'no fault'}")
    return not faults


def run(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    if options.verify and not verified(options.folder, options.workers):
        return 1
    if options.show is not None:
        manifest = Manifest.load(options.folder)
        device = available_device(options.device)
        codec = load_codec_from_spec(manifest.codec, device, options.codec_source, where=str(manifest.path))
        for damaged in write_sheet(options.out, manifest, options.show, codec):
            print(damaged)
        print(f"wrote {options.out}")
    if options.why is not None:
        print(why(Manifest.load(options.folder), options.why))
    if not options.verify and options.show is None and options.why is None:
        print(overview(Manifest.load(options.folder), options.samples))
    return 0


def main() -> None:
    """The command; exits with status 2 and one sentence when what was given cannot be used."""
    try:
        sys.exit(run(parser().parse_args()))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

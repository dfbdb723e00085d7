"""The image files of a data set: looked at by their headers first, read whole when they are packed."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from data_sharding.images import require_whole, upright_size
from data_sharding.problems import BadImage, Problems

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Of image files, in lower case, for formats whose labels do not name the file."""
_OTHER_SIZE = "image of another size than its label says"


def leaves_folder(name: str) -> bool:
    """Whether a file name points out of the folder that it is relative to, on any system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(p.is_absolute() or p.drive or ".." in p.parts for p in paths)


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have is an answer too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def look_at(
    folder: Path, name: str, problems: Problems, size: tuple[int, int] | None = None
) -> tuple[int, int, int] | None:
    """Upright width and height and the size in bytes of an image file, from its header; None where a problem that
    costs the image was noted. `size`: the width and height that the labels tell."""
    if leaves_folder(name):
        return problems.image("file name that leaves the image folder", name)
    path = folder / name
    if not is_file(path):
        return problems.image(f"missing image file in {folder}", name)
    try:
        width, height = upright_size(path, name)
        length = path.stat().st_size
    except (ValueError, OSError):
        return problems.image("image file that cannot be read", name)
    if size is not None and size != (width, height):
        return problems.image(_OTHER_SIZE, name, f"{width} x {height} px upright, labelled {size[0]} x {size[1]}")
    return width, height, length


def read_image(folder: Path, name: str, size: tuple[int, int]) -> bytes:
    """The bytes of an image file that decodes to `size` = (width, height). Raises BadImage where it does not."""
    try:
        data = (folder / name).read_bytes()
        found = require_whole(data, name)
    except OSError as error:
        raise BadImage("image file that cannot be read", name, type(error).__name__) from error
    except ValueError as error:
        raise BadImage("image file that cannot be decoded", name, str(error.__cause__ or error)) from error
    if found != size:
        raise BadImage(_OTHER_SIZE, name, f"{found[0]} x {found[1]} px upright, labelled {size[0]} x {size[1]}")
    return data


def find_images(folder: Path) -> dict[str, list[str]]:
    """The image files of a folder by their names without suffix; names sorted."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.stem, []).append(path.name)
    return found

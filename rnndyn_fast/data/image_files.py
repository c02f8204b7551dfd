"""One image file as 8-bit colour: nothing is converted that the file does not say how to convert."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from rnndyn_fast.file_io import stand_in
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import check_choice

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
BACKGROUNDS = {"white": 255, "grey": 128, "black": 0}
FITS = ("crop", "pad", "stretch")
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBX")
# What Pillow warns of is checked here, or is no matter of the pixels. (Once: filters are no thread's own.)
warnings.filterwarnings("ignore", module=r"PIL\.")
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO, _LEAST, _MOST = 258, 262, 0, 340, 341  # tags of TIFF


def read_image(path: str | os.PathLike[str], background: str = "white") -> Image:
    """An image file as 8-bit RGB, upright (EXIF).

    16-bit grey is rescaled from 0..65535 (or what the file says of its bits), floats from the limits that a TIFF declares; transparent
    pixels are laid over `background`. Colours are taken as sRGB; CMYK is converted without a profile.

    Args:
        path: a file of one of SUFFIXES.
        background: "white", "grey" (128) or "black".

    Returns:
        a PIL image of mode "RGB".

    Raises:
        FileNotFoundError: no such file, or a broken link.
        OSError: not an image, or damaged; names the file.
        ValueError: several images in one file, or values whose black and white the file does not declare; names the file.
    """
    check_choice("background", background, tuple(BACKGROUNDS))
    require("PIL")
    path = Path(path)
    if not path.exists():
        link = f": a broken link to {os.readlink(path)}" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path}: no such file{link}")
    try:
        return decode(path, background)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... by kind of damage
        if isinstance(error, OSError) and error.errno is not None:
            raise
        told = stand_in(path) or str(error).replace(repr(str(path)), "the file") or type(error).__name__
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{path}: {told}") from error


def decode(source: Path | BinaryIO, background: str = "white") -> Image:
    """What :func:`read_image` does, of a path or an open file; raises what Pillow raises."""
    require("PIL")
    from PIL import Image, ImageOps

    with Image.open(source) as file:
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and file.format != "MPO":  # (of a camera: the first is the image)
            raise ValueError(f"expected one image, the file holds {frames} (frames or pages)")
        image: Any = _eight_bits(file) if file.mode[0] in "IF" else _opaque(file, BACKGROUNDS[background])
        return ImageOps.exif_transpose(_oriented(image, file))


def _oriented(image: Any, file: Any) -> Any:
    """The image, with the orientation that the file declares."""
    orientation = file.getexif().get(0x0112)
    if orientation:
        image.getexif()[0x0112] = orientation
    return image


def _opaque(file: Any, background: int) -> Any:
    """8-bit RGB, transparent pixels over the background."""
    require("PIL")
    from PIL import Image

    if file.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in file.info:
        straight = file.convert({"La": "LA", "RGBa": "RGBA"}.get(file.mode, file.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", straight.size, (background,) * 3 + (255,)), straight).convert("RGB")
    if file.mode not in _PLAIN:
        raise ValueError(f"images of mode {file.mode} have no conversion to RGB here; save it as 8-bit RGB")
    return file.convert("RGB")


def _eight_bits(file: Any) -> Any:
    """Grey of more bits or floats as 8-bit RGB, rescaled by what the file declares."""
    require("PIL")
    from PIL import Image

    tags = getattr(file, "tag_v2", {})
    values = np.asarray(file)
    if "transparency" in file.info:
        raise ValueError("grey of 16 bits with a transparent level; save it as 8-bit RGBA")
    low, high = 0.0, 65535.0
    if file.mode == "F" or (file.mode == "I" and file.format == "TIFF"):
        if _LEAST not in tags or _MOST not in tags:
            kind = "floats" if file.mode == "F" else "integers of 32 bits"
            seen = f"{values.min():.4g} to {values.max():.4g}" if np.isfinite(values).all() else "NaN or infinity among them"
            raise ValueError(f"grey as {kind} ({seen}), and the file does not declare which are black and white; save it with 8 or 16 bits")
        low, high = (float(np.ravel(tags[tag])[0]) for tag in (_LEAST, _MOST))
    elif _BITS in tags:
        high = 2.0 ** int(np.ravel(tags[_BITS])[0]) - 1
    if not (np.isfinite(values).all() and high > low and low <= values.min() and values.max() <= high):
        raise ValueError(f"grey values beyond the limits that the file declares, {low:g} to {high:g}")
    grey = (values.astype(np.float64) - low) * (255.0 / (high - low))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255.0 - grey
    return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")


def fit(image: Image, size: int, how: str = "crop", background: str = "white") -> np.ndarray:  # [S, S, 3]
    """An RGB image as uint8 [S, S, 3], resized bilinearly with antialiasing.

    Args:
        size: S, height and width of the result.
        how: "crop": the shorter side becomes S, of the longer one the centre stays; "pad": the longer side becomes S, the rest is
            `background`; "stretch": both become S.
        background: as in :func:`read_image`.
    """
    require("PIL")
    from PIL import Image, ImageOps

    check_choice("fit", how, FITS)
    if image.size != (size, size):
        if how == "crop":
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        elif how == "pad":
            image = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=(BACKGROUNDS[background],) * 3)
        else:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)

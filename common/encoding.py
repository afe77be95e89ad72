"""The bytes of files: pictures, arrays and tables."""

import csv
import io
import re
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.inputs import open_regular

__all__ = [
    *("DPI", "LARGE_PICTURE", "MARK", "decimal", "encode", "is_ours", "pixel_count", "to_csv", "with_minus"),
    "write_large_png",
]

DPI, LEVEL = 200, 4  # dots per inch, and compression level, of pictures
LARGE_PICTURE = 25_000_000  # pixels above which a picture is written some rows at a time
MARK = "Smooth Grad-CAM"  # written into every picture, so that none is taken for a photo


def decimal(value: float, digits: int = 2) -> str:
    """The value with that many decimals, and never "-0.00"."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def with_minus(text: str) -> str:
    """The text with a minus sign before numbers below zero, as on axes; files and terminal have a hyphen there."""
    return re.sub(r"(?<![\w.)])-(?=\.?\d)", "\N{MINUS SIGN}", text)


def to_csv(rows: list[dict]) -> str:
    """Rows as comma-separated text with a header line; cells that a row lacks are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: decimal(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def pixel_count(content) -> int:
    """The number of pixels of a picture; 0 for any other content."""
    if isinstance(content, Image.Image):
        return content.width * content.height
    return content.size // 3 if isinstance(content, np.ndarray) else 0


def encode(content) -> bytes:
    """The bytes of a file: text (or bytes), a dictionary of arrays (.npz), or a uint8 RGB picture (.png)."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode(errors="backslashreplace")  # a path that is not UTF-8 becomes an escape, valid in JSON
    buffer = io.BytesIO()
    if isinstance(content, dict):
        np.savez_compressed(buffer, **content)
    else:  # about as small as with level 6, in half the time
        content = np.asarray(content) if isinstance(content, Image.Image) else content
        mark = PngInfo()
        mark.add_text("Software", MARK)
        Image.fromarray(content).save(buffer, "PNG", dpi=(DPI, DPI), compress_level=LEVEL, pnginfo=mark)
    return buffer.getvalue()


def write_large_png(path: Path, picture: np.ndarray | Image.Image) -> None:
    """Write a large uint8 RGB picture some rows at a time: Pillow would copy all of it first."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    is_image = isinstance(picture, Image.Image)
    width, height = picture.size if is_image else picture.shape[1::-1]
    packer, above, step = zlib.compressobj(LEVEL), np.zeros((1, 3 * width), np.uint8), 2**20 // width + 1
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
        file.write(chunk(b"tEXt", b"Software\0" + MARK.encode()))
        file.write(chunk(b"pHYs", struct.pack(">IIB", round(DPI / 0.0254), round(DPI / 0.0254), 1)))
        for top in range(0, height, step):
            rows = picture.crop((0, top, width, min(top + step, height))) if is_image else picture[top : top + step]
            rows = np.vstack([above, np.asarray(rows).reshape(-1, 3 * width)])
            above = rows[-1:]
            filtered = np.insert(rows[1:] - rows[:-1], 0, 2, axis=1)  # 2: minus the row above
            file.write(chunk(b"IDAT", packer.compress(filtered.tobytes())))
        file.write(chunk(b"IDAT", packer.flush()) + chunk(b"IEND", b""))


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that this tool wrote: its mark stands near the beginning or the end."""
    with suppress(OSError, ValueError), open_regular(path) as file:
        head = file.read(512)
        file.seek(max(0, path.stat().st_size - 512))
        return MARK.encode() in head + file.read(512)
    return False

"""The frames of a video file, decoded by OpenCV in a process of its own.

    path -> kind, whether it is whole    check_clip: by the bytes of its container, before any library sees them
      -> frames at 1 / fps seconds       read_clip: the child process, which can be stopped, decodes in order

FFmpeg, by which OpenCV decodes, also opens playlists, networks and devices. Here it gets a regular local file of one of
the containers in `KINDS`, by its absolute path, and may use their demuxers and the file protocol only. That it reports
errors is told, not which.

Shapes:  height, width  pixels
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from common.inputs import open_regular

__all__ = ["MOST_FRAMES", "check_clip", "read_clip"]

MOST_FRAMES = 128
FRAME_PIXELS = 1_000_000  # of a frame; a larger one is made smaller
MOST_PIXELS = 2**26  # of a frame in the file
MOST_ASPECT = 200  # the processor refuses longer frames
SECONDS, MEMORY = 300, 2**34  # of time, and bytes
MOST_BOXES = 100_000
EBML = b"\x1a\x45\xdf\xa3"
CHILD = "import json, sys; given = json.load(sys.stdin); sys.path[:] = given['import']; import common.clips as clips; "
CHILD += "clips.main(given)"
KINDS = "MP4, MOV, WebM, MKV or AVI"
LOG = 2**16  # bytes of its errors
OPENED = {  # FFmpeg's options
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": "protocol_whitelist;file|format_whitelist;mov,mp4,matroska,webm,avi",
    "OPENCV_FFMPEG_LOGLEVEL": "16",  # its errors, into a file
    "OPENCV_LOG_LEVEL": "OFF",
}


# containers


def check_clip(path: str) -> bool:
    """Whether the container counts its frames. Raises ValueError for what is no regular file in one of the containers,
    or one whose end is missing."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path) and not os.path.exists(path):  # noqa: PTH110
        raise ValueError("it is an address: download the video, and give its file")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise ValueError("it is empty")
            return _check_whole(file, size)
    except FileNotFoundError as exc:
        raise ValueError("it does not exist") from exc
    except OSError as exc:
        raise ValueError(f"it cannot be read: {exc.strerror}") from exc


def _check_whole(file: BufferedReader, size: int) -> bool:
    """`check_clip` of an open file of `size` bytes."""
    head = file.read(64)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        ends = _boxes(file, size)
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        ends = [(b"", 8 + int.from_bytes(head[4:8], "little"))]
    elif head[:4] == EBML and re.search(rb"\x42\x82.(webm|matroska)", head, re.DOTALL):
        ends = _segments(file)
    else:
        raise ValueError(f"it is no {KINDS} file")
    ends = list(ends)
    if any(end > size for _, end in ends):
        raise ValueError(f"its end is missing: {size} of {max(end for _, end in ends)} bytes are there")
    if ends[0][0] and b"moov" not in {name for name, _ in ends}:
        raise ValueError("it has no index of its frames (moov): the recording was cut off")
    return head[:4] != EBML


def _boxes(file: BufferedReader, size: int) -> Iterator[tuple[bytes, int]]:
    """(name, where it ends) of the boxes of an MP4 or MOV file (ISO/IEC 14496-12, 4.2)."""
    start = 0
    for _ in range(MOST_BOXES):
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:16], "big") if length == 1 else length or size - start
        if len(head) < 8 or length < 8:
            raise ValueError("it is damaged: a part of it has no valid length")
        start += length
        yield head[4:8], start
        if start >= size:
            return
    raise ValueError(f"it has more than {MOST_BOXES} parts")


def _segments(file: BufferedReader) -> Iterator[tuple[bytes, int]]:
    """(b"", where it ends) of the header and the segment of a Matroska file (RFC 8794); a recorded one may not say."""
    start = 0
    for _ in range(2):
        file.seek(start + 4)  # both names have four bytes
        first = file.read(1)[:1] or b"\0"
        count = 9 - first[0].bit_length()  # bytes of the length
        if count > 8:
            raise ValueError("it is damaged: a part of it has no valid length")
        number = int.from_bytes(first + file.read(count - 1), "big") & ((1 << 7 * count) - 1)
        unknown = number == (1 << 7 * count) - 1
        start += 4 + count + (0 if unknown else number)
        yield b"", start
        if unknown:
            return


# frames


def read_clip(path: str, fps: float) -> list[Image.Image]:
    """The frames that a video file shows at 0, 1 / fps, 2 / fps, … seconds, the right way up, of 1 megapixel at most.

    Raises ValueError that begins with the flag for a file that cannot be decoded as a whole, and for less than two
    frames or more than `MOST_FRAMES`. Warns if decoding meets errors.
    """
    try:
        given = {"counts": check_clip(path), "path": str(Path(path).resolve()), "fps": fps, "import": sys.path}
        return _frames_of(_decoded(given))
    except ValueError as exc:
        raise ValueError(f"--video {path}: {exc}") from exc


def _decoded(given: dict) -> tuple[dict, memoryview]:
    """The child's reply, and its frames' bytes. Raises ValueError."""
    command, text = [sys.executable, "-I", "-c", CHILD], json.dumps(given).encode()
    with tempfile.TemporaryFile() as log:
        try:
            options = {"stdout": subprocess.PIPE, "stderr": log, "timeout": SECONDS, "env": os.environ | OPENED}
            done = subprocess.run(command, input=text, **options)
        except subprocess.TimeoutExpired as exc:
            raise ValueError(f"it cannot be decoded in {SECONDS} seconds: cut it, or make its frames smaller") from exc
        log.seek(0)
        damaged = b"OPENCV:FFMPEG" in log.read(LOG)
    line, _, _ = done.stdout[:2000].partition(b"\n")
    try:
        reply = json.loads(line)
    except ValueError as exc:  # it was killed
        raise ValueError(f"decoding it ended with code {done.returncode}: is it damaged?") from exc
    if "error" in reply:
        raise ValueError(reply["error"])
    if damaged:
        from smooth_gradcam import ExplanationWarning  # the child, which needs no torch, starts without it

        message = "decoding it meets errors, so frames may be broken or missing: is it damaged?"
        warnings.warn(f"--video {given['path']}: {message}", ExplanationWarning, stacklevel=3)
    return reply, memoryview(done.stdout)[len(line) + 1 :]


def _frames_of(decoded: tuple[dict, memoryview]) -> list[Image.Image]:
    reply, data = decoded
    height, width, count = reply["height"], reply["width"], reply["count"]
    if len(data) != height * width * 3 * count:
        raise ValueError("decoding it ended early: is it damaged?")
    frames = np.frombuffer(data, np.uint8).reshape(count, height, width, 3)
    return [Image.fromarray(frame) for frame in frames]


# the child


def _timed_frames(capture, rate: float) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds from the first frame, the frame), in their order; by the frame rate if the file has no times.

    Raises ValueError if there is no rate, either.
    """
    first = last = None
    counted, index = False, 0
    while True:
        there, frame = capture.read()
        if not there:
            return
        time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        first = time if first is None else first
        time -= first
        if index == 1 and not time > 0:
            counted = True
            if not 0 < rate <= 1000:
                raise ValueError("it does not say when its frames are shown")
        time = index / rate if counted else time if last is None else max(time, last)
        yield time, frame
        last, index = time, index + 1


def _sampled(timed: Iterator[tuple[float, np.ndarray]], fps: float) -> Iterator[np.ndarray]:
    """The frames that are shown at 0, 1 / fps, 2 / fps, … seconds, up to the last frame."""
    shown, time, count = None, 0.0, 0
    for start, frame in timed:
        while shown is not None and count / fps < start - 1e-4:
            yield shown
            count += 1
        shown, time = frame, start
    while shown is not None and count / fps <= time + 1e-4:
        yield shown
        count += 1


def _decode(path: str, fps: float, counts: bool) -> list[np.ndarray]:
    """Frames as `read_clip` gives them, uint8 RGB (height, width, 3) of one size.

    `counts` is whether the container counts its frames. Raises ValueError.
    """
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise ValueError("it cannot be decoded: is it damaged, or of a codec that OpenCV does not know?")
    properties = cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT
    width, height, rate, total = map(capture.get, properties)
    if not 0 < width * height <= MOST_PIXELS or max(width, height) > MOST_ASPECT * min(width, height):
        raise ValueError(f"its frames have {width:.0f} x {height:.0f} pixels, which is not possible here")
    long = total / rate if rate > 0 and total > 0 else 0.0  # seconds, as far as the file says
    if long * fps > 2 * MOST_FRAMES:
        raise ValueError(_too_many(fps, long))
    frames, size, read = [], None, 0

    def counted(timed):
        nonlocal read
        for pair in timed:
            read += 1
            yield pair

    for frame in _sampled(counted(_timed_frames(capture, rate)), fps):
        if len(frames) == MOST_FRAMES:
            raise ValueError(_too_many(fps, long))
        scale = min(1.0, (FRAME_PIXELS / (frame.shape[0] * frame.shape[1])) ** 0.5)
        size = size or tuple(max(1, round(scale * side)) for side in frame.shape[1::-1])
        frame = frame if frame.shape[1::-1] == size else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        frames.append(np.ascontiguousarray(frame[..., ::-1]))
    if not frames or (counts and read < 0.5 * total):
        raise ValueError(f"{read} of its {max(total, 0):.0f} frames can be decoded: it is damaged")
    if len(frames) < 2:
        raise ValueError(f"one frame at --fps {fps:g}: a video has two or more, so give a larger --fps")
    return frames


def _too_many(fps: float, long: float) -> str:
    """Advice for a video of so many seconds, or of an unknown length."""
    lower = max(0.01, float(f"{0.95 * min(fps, MOST_FRAMES / long if long else fps / 2):.2g}"))
    return f"more than {MOST_FRAMES} frames at --fps {fps:g}: give a smaller one, such as --fps {lower:g}"


def main(given: dict) -> None:
    """Decode what is given, and write a line of JSON and the frames' bytes to stdout."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limits, macOS ignores them
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (8 * SECONDS, 8 * SECONDS))  # in case the parent is killed
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LOG, LOG))  # of FFmpeg's errors
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # where OpenCV writes FFmpeg's errors
        frames = []
        try:
            frames = _decode(given["path"], given["fps"], given["counts"])
            reply = {"height": frames[0].shape[0], "width": frames[0].shape[1], "count": len(frames)}
        except Exception as exc:  # OpenCV raises anything for a damaged file
            known = isinstance(exc, ValueError)
            reply = {"error": str(exc) if known else f"it cannot be decoded: {type(exc).__name__}: {exc}"[:300]}
        out.write(json.dumps(reply).encode() + b"\n")
        for frame in frames:
            out.write(frame.tobytes())

"""Frames of a video file: those of their times, the right way up, and of nothing but a whole video."""

import os
import re
import struct
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from common import clips
from common.clips import MOST_FRAMES, read_clip
from smooth_gradcam import ExplanationWarning

CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".webm": "VP80", ".mkv": "MJPG"}


def write_clip(path, frames, fps=10.0):
    """A video of uint8 RGB frames (height, width, 3)."""
    codec = cv2.VideoWriter_fourcc(*CODECS[path.suffix])
    file = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, fps, frames[0].shape[1::-1])
    for frame in frames:
        file.write(np.ascontiguousarray(frame[..., ::-1]))
    file.release()
    return path


def greys(count, size=(64, 48), first=20, step=6):
    """Frames that get lighter."""
    return [np.full((size[1], size[0], 3), first + step * i, np.uint8) for i in range(count)]


def levels(frames):
    return [float(np.asarray(frame).mean()) for frame in frames]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{suffix: a video of 30 frames in 3 seconds}."""
    folder = tmp_path_factory.mktemp("clips")
    return {suffix: write_clip(folder / f"clip{suffix}", greys(30)) for suffix in CODECS}


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_those_shown_at_their_times(whole, suffix):
    frames = read_clip(str(whole[suffix]), 2.0)
    assert [frame.size for frame in frames] == [(64, 48)] * 6
    np.testing.assert_allclose(levels(frames), [20 + 6 * i for i in (0, 5, 10, 15, 20, 25)], atol=4)


@pytest.mark.parametrize(("fps", "expected"), [(10, range(30)), (3, (0, 3, 6, 10, 13, 16, 20, 23, 26)), (0.5, (0, 20))])
def test_any_rate_takes_evenly_spaced_frames(whole, fps, expected):
    np.testing.assert_allclose(levels(read_clip(str(whole[".avi"]), fps)), [20 + 6 * i for i in expected], atol=3)


def test_frames_are_rgb(tmp_path):
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 250
    frame = np.asarray(read_clip(str(write_clip(tmp_path / "a.mp4", [red] * 20)), 2)[0]).mean((0, 1))
    assert frame[0] > 200 > 60 > max(frame[1:])


def test_a_variable_rate_counts_by_the_times_of_the_frames(tmp_path):
    path = write_clip(tmp_path / "a.mkv", greys(6, step=40))
    data = bytearray(path.read_bytes())
    for i, time in enumerate([0, 100, 200, 1000, 1100, 3000]):  # milliseconds, in the place of 0, 100, ... 500
        block = b"\x81" + struct.pack(">h", 100 * i) + b"\x80"  # of track 1, a key frame (RFC 9559, 10.2)
        assert data.count(block) == 1
        data = data.replace(block, b"\x81" + struct.pack(">h", time) + b"\x80")
    path.write_bytes(data)
    shown = [0, 2, 3, 4, 4, 4, 5]  # at 0, 0.5, ... 3 seconds
    np.testing.assert_allclose(levels(read_clip(str(path), 2.0)), [20 + 40 * i for i in shown], atol=4)


def test_frames_are_turned_upright(tmp_path):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :16] = 255  # white at the left
    path = write_clip(tmp_path / "a.mp4", [frame] * 20)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # the matrix, ISO/IEC 14496-12, 8.3.2: a quarter turn clockwise
    assert struct.unpack(">9i", data[at : at + 36])[:2] == (65536, 0)
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned = read_clip(str(path), 2.0)[0]
    assert turned.size == (48, 64)
    assert np.asarray(turned)[:12].mean() > 200 > 50 > np.asarray(turned)[20:].mean()  # white at the top


def test_large_frames_are_made_smaller(tmp_path):
    frames = read_clip(str(write_clip(tmp_path / "a.avi", greys(4, (1600, 1200)), 2)), 2)
    assert len(frames) == 4
    assert 990_000 < frames[0].width * frames[0].height < 1_010_000
    assert abs(frames[0].width / frames[0].height - 4 / 3) < 0.01


@pytest.mark.parametrize(
    ("timed", "fps", "expected"),
    [
        ([(0, "a"), (1, "b")], 1, "ab"),
        ([(0, "a"), (0.9, "b")], 1, "a"),
        ([(0, "a"), (0.4, "b"), (0.6, "c"), (3, "d")], 1, "accd"),
        ([(0, "a"), (0.1, "b"), (0.2, "c")], 5, "ac"),
        ([], 1, ""),
    ],
)
def test_at_each_time_the_frame_before_it_is_still_shown(timed, fps, expected):
    assert "".join(clips._sampled(iter(timed), fps)) == expected


# what is refused


def refused(path, fps=2.0):
    with pytest.raises(ValueError, match=re.escape(f"--video {path}: ")) as caught:
        read_clip(str(path), fps)
    return str(caught.value).removeprefix(f"--video {path}: ")


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_video_whose_end_is_missing_is_refused(whole, tmp_path, suffix, share):
    data = whole[suffix].read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    assert "end is missing" in refused(path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"hello", "it is no MP4, MOV, WebM, MKV or AVI file"),
        (b"#EXTM3U\nfile:///etc/hostname\n", "it is no MP4"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "it is no MP4"),
        (b"\0\0\0\x10ftypisom\0\0\0\0", "it has no index of its frames (moov)"),
        (b"\0\0\0\x04ftypisom\0\0\0\0", "it is damaged: a part of it has no valid length"),
        (b"\0\0\0\x08ftyp\0\0\0\x08moov", "it cannot be decoded"),
        (b"RIFF\x04\0\0\0AVI ", "it cannot be decoded"),
        (b"RIFF\x04\0\0\0WAVE", "it is no MP4"),
        (b"\x1a\x45\xdf\xa3\x84\x42\x82\x81a", "it is no MP4"),
    ],
)
def test_other_files_are_refused(tmp_path, data, why):
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    assert refused(path).startswith(why)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert refused(tmp_path / "pipe.mp4") == "it is a folder, a pipe or a device"
    assert refused(tmp_path) == "it is a folder, a pipe or a device"
    assert refused(tmp_path / "none.mp4") == "it does not exist"
    for address in ("https://example.org/a.mp4", "rtsp://a/b", "concat:a.mp4|b.mp4"):
        assert refused(address) == "it is an address: download the video, and give its file"


def test_ffmpeg_may_not_guess_another_format(tmp_path):
    """Not even if the check of the bytes let it pass: without our options it would be opened."""
    pictures = [Image.new("RGB", (64, 64), (60 * i,) * 3) for i in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=500)
    given = {"counts": False, "path": str(tmp_path / "a.gif"), "fps": 2.0, "import": sys.path}
    with pytest.raises(ValueError, match="it cannot be decoded"):
        clips._decoded(given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "OPENED", {"OPENCV_FFMPEG_LOGLEVEL": "-8"})
        assert clips._decoded(given)[0]["count"] > 1


def test_too_many_frames_are_refused_with_a_rate_that_works(whole):
    said = refused(whole[".mp4"], 100.0)
    assert said.startswith(f"more than {MOST_FRAMES} frames at --fps 100: give a smaller one, such as --fps ")
    rate = float(said.split()[-1])
    assert 0.8 * MOST_FRAMES < len(read_clip(str(whole[".mp4"]), rate)) <= MOST_FRAMES


def test_one_frame_is_no_video(whole):
    assert refused(whole[".webm"], 0.2) == "one frame at --fps 0.2: a video has two or more, so give a larger --fps"


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_frames_that_are_broken_inside_a_whole_file_are_told(whole, tmp_path, suffix, recwarn):
    data = bytearray(whole[suffix].read_bytes())
    read_clip(str(whole[suffix]), 2.0)
    assert not recwarn.list
    data[len(data) // 2 : len(data) * 3 // 5] = bytes(len(data) * 3 // 5 - len(data) // 2)
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(data)
    with pytest.warns(
        ExplanationWarning, match=re.escape(f"{path}: decoding it meets errors, so frames may be broken")
    ):
        read_clip(str(path), 2.0)


@pytest.mark.filterwarnings("ignore:.*is it damaged")
def test_damaged_videos_give_frames_or_a_reason_and_nothing_else(whole, tmp_path, capfd):
    """Whatever bytes are wrong: no other error, no word of a library."""
    rng, outcomes = np.random.default_rng(0), []
    for suffix in (".mp4", ".mkv", ".avi"):
        for share in (0.0005, 0.01, 0.2):
            data = np.frombuffer(whole[suffix].read_bytes(), np.uint8).copy()
            wrong = rng.random(len(data)) < share
            wrong[:64] = False  # its container is known
            data[wrong] = rng.integers(0, 256, wrong.sum())
            path = tmp_path / f"a{suffix}"
            path.write_bytes(data.tobytes())
            try:
                outcomes.append(len(read_clip(str(path), 2.0)))
            except ValueError as exc:
                outcomes.append(str(exc).split(":")[0])
    assert any(isinstance(outcome, str) for outcome in outcomes)
    assert {outcome for outcome in outcomes if isinstance(outcome, str)} <= {
        f"--video {tmp_path / f'a{suffix}'}" for suffix in CODECS
    }
    assert capfd.readouterr() == ("", "")


def test_decoding_that_does_not_end_is_stopped(whole, monkeypatch):
    monkeypatch.setattr(clips, "SECONDS", 0.5)
    monkeypatch.setattr(clips, "CHILD", "import time; time.sleep(60)")
    assert refused(whole[".mp4"]).startswith("it cannot be decoded in 0.5 seconds")


@pytest.mark.parametrize(
    ("child", "why"),
    [
        ("import os; os._exit(7)", "decoding it ended with code 7: is it damaged?"),
        ('print(\'{"height": 2, "width": 2, "count": 2}\')', "decoding it ended early: is it damaged?"),
    ],
)
def test_decoding_that_breaks_off_is_an_error(whole, monkeypatch, child, why):
    monkeypatch.setattr(clips, "CHILD", child)
    assert refused(whole[".mp4"]) == why

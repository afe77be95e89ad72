"""Photos, masks and lists of people who are not known: the right picture, or one line that says what is wrong."""

import hashlib
import json
import os
import re
import stat
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from PIL import EpsImagePlugin, Image, features

import common.bands
import common.files
import common.photos
import smooth_gradcam as core
from common.bands import render_heatmap, render_overlay
from common.files import write_files
from common.inputs import open_regular
from common.photos import load_mask, load_photo, object_mask, open_photo, readable
from smooth_gradcam import Look, SmoothQwenGradCAM, load_rgb
from studies.photo_list import digest, read_list
from studies.words import compute_word_maps
from visualization_utils import create_layer_comparison_grid, visualize_multiple_layers

ROOT = Path(__file__).parent.parent


RED, GREEN = (255, 0, 0), (0, 255, 0)


def two_coloured(mode="RGB"):
    """4 x 2, left half red, right half green."""
    picture = Image.new("RGB", (4, 2), RED)
    picture.paste(GREEN, (2, 0, 4, 2))
    return picture.convert(mode)


def corners(image):
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "RGBX"])
def test_colour_modes_keep_their_colours(mode):
    picture = load_rgb(two_coloured(mode))
    assert (picture.mode, picture.size) == ("RGB", (4, 2))
    assert corners(picture) == (RED, GREEN)


def test_transparency_is_laid_on_white(tmp_path):
    see_through = two_coloured("RGBA")
    see_through.putpixel((0, 0), (255, 0, 0, 0))
    assert corners(load_rgb(see_through)) == ((255, 255, 255), GREEN)
    palette = two_coloured("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert corners(load_rgb(tmp_path / "palette.png")) == ((255, 255, 255), GREEN)
    grey = Image.new("LA", (2, 2), (0, 128))
    assert load_rgb(grey).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("1", [False, True]),
        ("L", [0, 255]),
        ("I;16", [0, 65535]),
        ("I;16B", [0, 65535]),
        ("I", [0, 65535]),
        ("I", [0, 255]),
        ("F", [0, 1]),
        ("F", [0, 255]),
    ],
)
def test_grey_values_reach_from_black_to_white(mode, values):
    picture = Image.new(mode, (2, 1))
    picture.putpixel((1, 0), values[1])
    assert corners(open_photo(picture)) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        (np.float32, [0, np.nan], "has grey values nan to nan: they must be finite, 0 to 65535"),
        (np.float32, [0, np.inf], "has grey values 0 to inf: they must be finite, 0 to 65535"),
        (np.float32, [-0.5, 1], "has grey values -0.5 to 1: they must be finite, 0 to 65535"),
        (np.float32, [0, 7e4], "has grey values 0 to 70000: they must be finite, 0 to 65535"),
        (np.int32, [-1, 255], "has grey values -1 to 255: they must be finite, 0 to 65535"),
        (np.int32, [0, 65536], "has grey values 0 to 65536: they must be finite, 0 to 65535"),
        (np.float32, [0.5] * 199 + [250], "has a few grey values up to 250, nearly all up to 1: clip them"),
        (np.float32, [200] * 199 + [5e4], "has a few grey values up to 50000, nearly all up to 255: clip them"),
        (np.int32, [200] * 199 + [300], "has a few grey values up to 300, nearly all up to 255: clip them"),
    ],
)
def test_grey_values_that_have_no_black_and_white_are_named(dtype, values, message):
    with pytest.raises(ValueError, match=f"^the image {message}$"):
        open_photo(Image.fromarray(np.array([values], dtype)))


def test_dark_part_of_a_bright_picture_stays_dark():
    """Where only some of the grey values are small, they are on the scale of the others."""
    deep = np.array([[100] * 98 + [65535] * 2], np.int32)
    assert corners(open_photo(Image.fromarray(deep))) == ((0, 0, 0), (255, 255, 255))


def test_array_is_taken_as_it_is():
    array = np.asarray(two_coloured())
    picture = load_rgb(array)
    assert (picture.mode, picture.size, corners(picture)) == ("RGB", (4, 2), (RED, GREEN))
    assert np.asarray(picture).tolist() == array.tolist()
    assert load_rgb(array[:, ::-1]).getpixel((0, 0)) == GREEN


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 4), (4, 2, 1), (3, 4, 2), (1, 4, 2, 3), (0, 2, 3), (4, 0, 3)])
def test_array_of_another_kind_is_named(shape):
    message = re.escape(f" {shape} must be uint8 (height, width, 3), RGB")
    with pytest.raises(ValueError, match=f"^an image array of uint8{message}$"):
        load_rgb(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"^an image array of float32 \(4, 2, 3\) must be uint8"):
        load_rgb(np.zeros((4, 2, 3), np.float32))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "F"])
def test_picture_without_pixels_is_named(mode, size):
    message = re.escape(f"image of size {size} must be a path, a PIL image with pixels, or a uint8 array")
    with pytest.raises(ValueError, match=message):
        load_rgb(Image.new(mode, size))


def test_array_is_explained_and_drawn_as_the_picture_it_is(model, processor, image):
    drawn = [
        SmoothQwenGradCAM(model, processor, 0, answer="cat").generate_cam(each, "What is it?", use_smooth=False)
        for each in (image, np.asarray(image))
    ]
    np.testing.assert_array_equal(*drawn)


def test_sixteen_bit_png_keeps_its_grey(tmp_path):
    Image.fromarray(np.full((3, 3), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert load_rgb(tmp_path / "deep.png").getpixel((1, 1)) == (100, 100, 100)


def test_animated_file_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_rgb(tmp_path / "moving.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize(("orientation", "first"), [(1, RED), (3, GREEN), (6, RED), (8, GREEN)])
def test_exif_rotation_is_applied_once_and_for_all(tmp_path, orientation, first):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_coloured().save(tmp_path / "turned.png", exif=exif)
    picture = load_rgb(tmp_path / "turned.png")
    assert picture.size == ((4, 2) if orientation < 5 else (2, 4))
    assert picture.getpixel((0, 0)) == first
    assert load_rgb(picture).tobytes() == picture.tobytes()
    assert load_rgb(picture).size == picture.size


def test_callers_image_is_left_as_it_is():
    own = two_coloured("RGBA")
    own.getexif()[0x0112] = 6
    before = (own.mode, own.size, own.tobytes(), dict(own.getexif()))
    assert load_rgb(own).size == (2, 4)
    assert (own.mode, own.size, own.tobytes(), dict(own.getexif())) == before


def test_what_is_no_image_is_named(tmp_path, monkeypatch):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("not a picture")
    make_image(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, why in (("empty.png", "of one of"), ("words.png", "of one of"), ("half.png", ".damaged")):
        with pytest.raises(ValueError, match=f"^the image {tmp_path / name} cannot be read as an image {why}"):
            load_rgb(tmp_path / name)
    for path in (tmp_path, os.devnull):
        with pytest.raises(ValueError, match=f"^{path} is a folder, a pipe or a device, not an image file$"):
            load_rgb(path)
    with pytest.raises(ValueError, match=f"^the image {tmp_path}/missing.png does not exist$"):
        load_rgb(str(tmp_path / "missing.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are a bomb to Pillow
    with pytest.raises(ValueError, match="whole.png is too large: .*4096 pixels.* exceeds limit of 2000 pixels"):
        load_rgb(tmp_path / "whole.png")
    for other in (None, 5, b"photo.png", [[0, 1]]):
        message = f"^image of type {type(other).__name__} must be a path, a PIL image with pixels, or a uint8 array$"
        with pytest.raises(ValueError, match=message):
            load_rgb(other)


# what is opened


EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
(victim.txt) (w) file dup (written) writestring closefile
showpage
"""


@pytest.fixture
def no_programs(monkeypatch):
    """Whoever starts a program fails."""

    def refuse(*args, **_):
        pytest.fail(f"a program is started: {args}")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)


@pytest.mark.parametrize("load", [load_rgb, open_photo, load_photo, lambda path: load_mask(path, (10, 10))])
def test_postscript_under_a_photos_name_is_refused_and_starts_nothing(tmp_path, monkeypatch, no_programs, load):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_text(EPS)
    with pytest.raises(ValueError, match="photo.jpg cannot be read as an image") as error:
        load("photo.jpg")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_postscript_that_the_caller_has_opened_but_not_loaded_is_refused(tmp_path, no_programs):
    (tmp_path / "photo.jpg").write_text(EPS)
    with (
        Image.open(tmp_path / "photo.jpg") as opened,
        pytest.raises(ValueError, match="of format EPS, not one of JPEG"),
    ):
        load_rgb(opened)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF"])
def test_photos_of_usual_formats_are_opened_whatever_they_are_called(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    two_coloured().resize((64, 32), Image.Resampling.NEAREST).save(tmp_path / "photo.dat", kind)
    picture = load_rgb(tmp_path / "photo.dat")
    assert (picture.mode, picture.size) == ("RGB", (64, 32))
    np.testing.assert_allclose(corners(picture), (RED, GREEN), atol=30)
    with Image.open(tmp_path / "photo.dat") as opened:
        assert load_rgb(opened).tobytes() == picture.tobytes()
    assert load_rgb(picture).tobytes() == picture.tobytes()


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "JPEG2000"])
def test_other_formats_are_not_opened(tmp_path, kind):
    two_coloured().resize((64, 32)).save(tmp_path / "photo.png", kind)
    with pytest.raises(ValueError, match="photo.png cannot be read as an image"):
        load_rgb(tmp_path / "photo.png")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_core_draws_no_grey_values_whose_white_it_does_not_know(mode):
    with pytest.raises(ValueError, match=f"grey values of mode {mode}: scale them to 8 bits .see common/photos.py"):
        load_rgb(Image.new(mode, (4, 4), 1))


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight():
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_rgb(Image.fromarray(deep)))[..., 0], expected)


def heif(major, *brands):
    body = b"ftyp" + major + b"\0\0\0\0" + b"".join(brands)
    return (len(body) + 4).to_bytes(4, "big") + body + b"\0\0\0\x08free" + bytes(40)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"])
@pytest.mark.parametrize("generic", [b"", b"mif1", b"msf1"])
def test_every_brand_of_heic_is_named(tmp_path, brand, generic):
    (tmp_path / "photo.jpg").write_bytes(heif(generic, b"miaf", brand) if generic else heif(brand, b"mif1"))
    for load in (open_photo, load_photo, lambda path: load_mask(path, (4, 4))):
        with pytest.raises(ValueError, match="photo.jpg is a HEIC photo: convert it to JPEG, e.g. with pillow-heif$"):
            load(str(tmp_path / "photo.jpg"))


@pytest.mark.parametrize("known", [True, False])
def test_avif_is_named_only_where_pillow_lacks_it(tmp_path, monkeypatch, known):
    (tmp_path / "photo.avif").write_bytes(heif(b"mif1", b"miaf", b"avif"))
    monkeypatch.setattr(features, "check", lambda name: known)
    with pytest.raises(ValueError, match="cannot be read as an image" if known else "is an AVIF photo: convert it"):
        open_photo(tmp_path / "photo.avif")


def test_file_that_only_looks_like_heic_further_in_is_no_heic(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x10ftypmp42\0\0\0\0" + b"heic" * 8)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        open_photo(tmp_path / "photo.jpg")


# regular files only


def never_ends(tmp_path):
    """A pipe that nobody writes to, and a device."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    return tmp_path / "pipe.jsonl", tmp_path / "zero.jsonl"


def test_pipes_and_devices_are_not_read(tmp_path):
    for path in never_ends(tmp_path):
        for read in (load_rgb, open_photo, lambda path: load_mask(path, (4, 4)), open_regular):
            with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
                read(path)
        with pytest.raises(ValueError, match=f"^{path} is a folder, a pipe or a device$"):
            read_list([str(path)])
        assert digest(path) == ""


def test_file_that_becomes_a_pipe_after_it_was_looked_at_does_not_block(tmp_path, monkeypatch):
    pipe, _ = never_ends(tmp_path)
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_rgb(pipe)
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: True)
    with open_regular(pipe) as file:
        assert file.read() in (b"", None)


def test_digest_does_not_hold_the_file(tmp_path):

    (tmp_path / "a").write_bytes(b"12345678" * 2**20)
    tracemalloc.start()
    found = digest(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
    assert found == hashlib.sha256(b"12345678" * 2**20).hexdigest()


def test_lists_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    with (tmp_path / "a.jsonl").open("wb") as file:  # takes no place on the disk
        file.truncate(2**33)
    with pytest.raises(ValueError, match=r"a.jsonl has 8192 MB: lists of up to 1024 MB are read$"):
        read_list([str(tmp_path / "a.jsonl")])


# names that are not UTF-8


def test_names_that_are_not_text_are_readable_and_differ():
    assert readable("caf\udce9.png") == "caf\\xe9.png"
    assert readable("a/café.png") == "a/café.png"


def test_texts_with_such_a_name_are_written_and_read_again(tmp_path):

    write_files(tmp_path, {"a.json": json.dumps({"image": "caf\udce9 é.png"}, ensure_ascii=False)})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"image": "caf\udce9 é.png"}


# large photos


def test_large_pictures_are_in_memory_one_at_a_time(tmp_path, monkeypatch):
    """The next is drawn once the one before is written."""
    monkeypatch.setattr(common.files, "LARGE_PICTURE", 3)
    alive, most, write_png = [], [], common.files.write_large_png

    def draw():
        alive.append(None)
        return np.zeros((9, 9, 3), np.uint8)

    def write(path, picture):
        most.append(len(alive))
        write_png(path, picture)
        alive.pop()

    monkeypatch.setattr(common.files, "write_large_png", write)
    write_files(tmp_path, {f"{i}.png": draw for i in range(9)})
    assert most == [1] * 9


def test_full_disk_names_the_need_of_a_large_picture(tmp_path, monkeypatch):
    def full(path, picture):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.files, "LARGE_PICTURE", 3)
    monkeypatch.setattr(common.files, "write_large_png", full)
    with pytest.raises(OSError, match=f"^no space left for a.png in {tmp_path}/out: it takes up to 0.3 MB, "):
        write_files(tmp_path / "out", {"a.png": np.zeros((300, 300, 3), np.uint8)})
    assert list(tmp_path.iterdir()) == []


def test_only_photos_beyond_a_limit_are_made_smaller_for_the_processor(model, processor, monkeypatch):
    photo, cap = make_image(1960, 1400), processor.image_processor.size["longest_edge"]
    assert photo.width * photo.height > 16 * cap
    whole = core.prepare_inputs(model, processor, [photo], "What is it?")
    monkeypatch.setattr(core, "LARGE", photo.width * photo.height)
    seen, reduce = [], Image.Image.reduce
    monkeypatch.setattr(Image.Image, "reduce", lambda image, factor: seen.append(factor) or reduce(image, factor))
    core.prepare_inputs(model, processor, [photo], "What is it?")
    assert seen == []
    monkeypatch.setattr(core, "LARGE", photo.width * photo.height - 1)
    large = core.prepare_inputs(model, processor, [photo], "What is it?")
    assert len(seen) == 1
    assert photo.width * photo.height / seen[0] ** 2 >= 4 * cap
    assert large["image_grid_thw"].tolist() == whole["image_grid_thw"].tolist()
    assert (large["pixel_values"] - whole["pixel_values"]).abs().mean() < 0.02


def test_pictures_are_drawn_in_little_more_memory_than_they_take():
    photo, cam = Image.new("RGB", (3000, 2000)), np.random.default_rng(0).random((20, 30), np.float32)
    render_overlay(photo, cam, Look())
    tracemalloc.start()
    for draw in (render_overlay, lambda photo, cam, look: render_heatmap(cam, photo.size[::-1], look)):
        tracemalloc.reset_peak()
        draw(photo, cam, Look())
        assert tracemalloc.get_traced_memory()[1] < 1.6 * 3 * 3000 * 2000
    tracemalloc.stop()


def test_documented_functions_take_grey_values_of_any_kind(model, processor, tmp_path):
    """The core alone refuses them."""
    grey = np.linspace(0, 1, 112 * 168, dtype=np.float32).reshape(112, 168)
    eight = np.round(255 * grey).astype(np.uint8)
    kinds = [
        Image.fromarray(grey),
        Image.fromarray(eight.astype(np.int32)),
        Image.fromarray(eight.astype(np.uint16) * 257),
    ]
    expected = load_rgb(Image.fromarray(eight)).tobytes()
    for i, image in enumerate(kinds):
        create_layer_comparison_grid(
            model, processor, image, "What?", [0], tmp_path / str(i), answer="cat", num_samples=1
        )
        assert compute_word_maps(model, processor, image, "What?", [0], answer="cat", num_samples=1)
        visualize_multiple_layers(
            model, processor, image, "What?", [0], tmp_path / "multi", answer="cat", num_samples=1
        )
        with Image.open(tmp_path / "multi/original_image.png") as drawn:
            assert drawn.tobytes() == expected


# the object's mask


def white_on_black():
    """8 x 6 pixels, white at the top left in 3 of 8 columns and 2 of 6 rows."""
    mask = Image.new("L", (8, 6), 0)
    mask.paste(255, (0, 0, 3, 2))
    return mask


TOP_LEFT = np.zeros((6, 8), bool)
TOP_LEFT[:2, :3] = True


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "F", "I;16"])
def test_white_is_the_object_in_every_mode(tmp_path, mode):
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(white_on_black()).astype(np.uint16) * 257)
    else:
        mask = white_on_black().convert("RGB").convert(mode)
    np.testing.assert_array_equal(load_mask(mask, (8, 6)), TOP_LEFT)
    if mode not in ("CMYK", "F"):
        mask.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png", (8, 6)), TOP_LEFT)


def test_mask_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    white_on_black().rotate(90, expand=True).save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.png", (8, 6)), TOP_LEFT)


def test_object_is_what_is_lighter_than_mid_grey():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert load_mask(mask, (4, 1)).tolist() == [[False, False, True, True]]


def test_transparent_parts_of_a_mask_are_white():
    mask = Image.new("RGBA", (8, 6), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 3, 2))
    np.testing.assert_array_equal(load_mask(mask, (8, 6)), TOP_LEFT)


@pytest.mark.parametrize("size", [(6, 8), (8, 7), (16, 12)])
def test_mask_of_another_size_names_both(size):
    expected = rf"the mask has 8 x 6 pixels, the photo {size[0]} x {size[1]}\b"
    with pytest.raises(ValueError, match=expected):
        load_mask(white_on_black(), size)


@pytest.mark.parametrize("colour", ["black", "white", "#010101"])
def test_mask_without_object_or_without_the_rest_is_refused(colour):
    with pytest.raises(ValueError, match="all white or all black"):
        load_mask(Image.new("RGB", (8, 6), colour), (8, 6))


# objects of lists


def test_objects_of_coco_are_their_pixels():
    size = (8, 6)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:7] = True
    square = [2, 1, 7, 1, 7, 4, 2, 4]
    assert (object_mask({"box": [2, 1, 5, 3]}, size) == expected).all()
    assert (object_mask({"segmentation": [square]}, size) == expected).all()
    both = object_mask({"segmentation": [[0, 0, 2, 0, 2, 2, 0, 2], [5, 3, 8, 3, 8, 6, 5, 6]]}, size)
    assert both[0, 0]
    assert both[5, 7]
    assert not both[5, 0]
    for given, reason in (
        ({"box": [1, 2, 3]}, "the box cannot be read"),
        ({"box": "abcd"}, "the box cannot be read"),
        ({"box": "1234"}, "the box cannot be read"),
        (
            {"box": [1, 1, float("inf"), 3]},
            r"cannot be read \(the box has a number that is not finite\): give \[x",
        ),
        ({"box": [1, 1, float("nan"), 3]}, "the box cannot be read"),
        ({"box": [1e308, 1, 1e308, 3]}, "the box cannot be read"),
        ({"box": ["a", "b", "c", "d"]}, "the box cannot be read"),
        ({"box": [10**400, 1, 2, 3]}, "the box cannot be read"),
        ({"box": [True, True, True, 5]}, "the box must be a list of numbers"),
        ({"box": [5, 1, 6, 3]}, "it reaches beyond the photo, which has 8 x 6 pixels the right way up"),
        ({"box": [-20, -20, 23, 23]}, "it reaches beyond the photo"),
        ({"segmentation": [[1, 2, 3, 4, float("nan"), 6]]}, "a polygon has a number that is not finite"),
        ({"segmentation": [[1, 2, 3, 4, 1e12, 6]]}, "it reaches beyond the photo"),
        ({"segmentation": [[]]}, "a polygon of 0 numbers"),
        ({"segmentation": [[1, 2, 3, 4]]}, "a polygon of 4 numbers"),
        ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "a polygon must be a list of numbers"),
        ({"segmentation": [square] * 1001}, "1001 polygons, where up to 1000 are drawn"),
        ({"mask": "no.png"}, "the mask no.png: .*does not exist"),
        ({"box": [3, 3, 0, 0]}, "the box covers none"),
        ({"box": [0, 0, 8, 6]}, "the box covers all"),
        ({"segmentation": [[1, 2, 3]]}, "the segmentation cannot be read"),
        ({"segmentation": 3}, "the segmentation cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            object_mask(given, size)


def test_run_lengths_need_pycocotools_and_the_photos_size():
    part = {"size": [6, 8], "counts": [13, 3, 3, 3, 26]}
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install pycocotools"):
            object_mask({"segmentation": part}, (8, 6))
        return
    pixels = object_mask({"segmentation": part}, (8, 6))  # column by column
    assert (pixels.T.ravel() == np.repeat([False, True, False, True, False], part["counts"])).all()
    with pytest.raises(ValueError, match="run lengths are of 8 x 6 pixels"):
        object_mask({"segmentation": part}, (8, 7))

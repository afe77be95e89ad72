"""Where in a video the answer comes from: a map of each temporal patch, as a strip and as an animation.

    Video -> Reading                    read_video: its photos are the first frames of the temporal patches, of two each
      -> TokenMaps of each patch        explain: all from the same passes, pooled together
      -> strip, animation               draw_video

Shapes:  H, W  rows and columns of image tokens of a frame     height, width  pixels
"""

import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from transformers.video_utils import VideoMetadata

from common.bands import render_overlay
from common.encoding import MARK, decimal
from common.evidence import explain_with_evidence
from common.files import output_folder
from common.page import GAP, HEAD, MARGIN, PAGE, WIDTHS, Page, Paper, best_columns, header, panel_width, shrink
from common.passes import passes_of
from common.photos import open_photo
from common.progress import show_progress
from smooth_gradcam import (
    PLAIN,
    Look,
    Reading,
    Settings,
    TokenMaps,
    answered,
    check_family,
    check_processor,
    conversation,
    find_target,
    get_model_layers,
    prepare_inputs,
    render_cam,
    resolve_layers,
    unwrapped,
)
from visualization_utils import (
    WEAK,
    caption,
    check_drawing,
    draw_layer,
    footer,
    full_colour,
    method_title,
    settings_text,
    strength,
    strongest_of,
    text_rows,
)

__all__ = [
    *("Video", "animate", "create_video_maps", "draw_video", "frames_of_a_patch", "made_of", "read_video"),
    *("strip_figure", "times_of"),
]

STRIP_HEIGHT = 6.0  # inches that the frames of a strip take at most
SIDE = 640  # pixels of an animation's longer side


@dataclass(frozen=True)
class Video:
    """Two or more frames in their order, each what `load_rgb` opens, all of one size; `fps` of them are a second.

    Raises ValueError for anything else.
    """

    frames: Iterable
    fps: float = 2.0

    def __post_init__(self):
        if type(self.fps) not in (int, float) or not 0.01 <= self.fps <= 1000:
            raise ValueError(f"fps={self.fps!r} must be frames per second, 0.01 to 1000")
        if not isinstance(self.frames, Iterable) or isinstance(self.frames, (str, Image.Image)):
            raise ValueError(f"frames of type {type(self.frames).__name__} must be a list of photos")
        frames = tuple(map(open_photo, self.frames))
        if len(frames) < 2 or len({frame.size for frame in frames}) > 1:
            sizes = ", ".join(f"{width} x {height}" for width, height in dict.fromkeys(frame.size for frame in frames))
            raise ValueError(f"a video of {len(frames)} frames ({sizes}): give two or more, all of one size")
        object.__setattr__(self, "frames", frames)


def read_video(model, processor, video: Video, prompt: str, answer=None, max_new_tokens: int = 128) -> Reading:
    """`read` for a video: a reading with a map of each temporal patch, which is two frames; all frames are used.

    The photos of the reading are the first frames of the temporal patches. Arguments and errors are those of `read`.
    """
    model = unwrapped(model)
    check_family(model)
    check_processor(processor, "video_processor")
    chat, *_ = conversation([video], prompt, "video")
    count = len(video.frames)
    metadata = VideoMetadata(total_num_frames=count, fps=video.fps, frames_indices=list(range(count)))
    frames = np.stack([np.asarray(frame) for frame in video.frames])
    keywords = {"videos": [frames], "video_metadata": [metadata], "fps": video.fps, "do_sample_frames": False}
    inputs = prepare_inputs(model, processor, (), chat, **keywords)
    photos = video.frames[:: processor.video_processor.temporal_patch_size]
    return answered(model, processor, photos, chat, inputs, "video", answer, max_new_tokens)


def animate(
    frames: Iterable[Image.Image], maps: list[np.ndarray], fps: float, look: Look = PLAIN, peak: float | None = None
) -> bytes:
    """An animated WebP that repeats: on each frame the overlay of its temporal patch's (H, W) map.

    The value `peak` has full colour, for None the maximum of all maps; each map is shown on an equal share of the
    frames, in their order.
    """
    frames, peak = list(frames), max(float(cam.max()) for cam in maps) if peak is None else peak
    pictures = []
    for i, frame in enumerate(frames):
        small = frame.copy()
        small.thumbnail((SIDE, SIDE))
        pictures.append(Image.fromarray(render_cam(small, maps[i * len(maps) // len(frames)], look, peak)[0]))
    buffer = io.BytesIO()
    keywords = {"save_all": True, "append_images": pictures[1:], "loop": 0, "quality": 80, "xmp": MARK.encode()}
    pictures[0].save(buffer, "WEBP", duration=round(1000 / fps), **keywords)
    return buffer.getvalue()


def times_of(count: int, step: float) -> tuple[str, ...]:
    """The times of pictures that are `step` seconds apart, with decimals that tell them apart."""
    digits = next((digits for digits in (1, 2) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6), 2)
    return tuple(f"{decimal(i * step, digits if step > 0.02 else 3)} s" for i in range(count))


def _unneeded(maps: TokenMaps, layer: int, strongest: float) -> bool:
    """Whether the words need none of this temporal patch, but some of another: then its zeros are no lack of a map."""
    return maps.settings.method == "needed" and strongest > 0 and maps.blank.get(layer) == "zero everywhere"


def frames_of_a_patch(reading: Reading) -> int:
    """The frames that share a map."""
    return reading.processor.video_processor.temporal_patch_size


def made_of(reading: Reading, video: Video) -> str:
    """The video's frames and their size, for the small print."""
    (height, width), first = reading.grids[0], reading.photos[0]
    text = f"video of {len(video.frames)} frames, {video.fps:g} a second, {first.width} × {first.height} px"
    return f"{text}, as {len(reading.grids)} × {width} × {height} image tokens"


def strip_figure(
    reading: Reading, patches: list[TokenMaps], layer: int, video: Video, look: Look, paper: Paper
) -> Page:
    """The overlay of each temporal patch on its first frame, in their order, each with its time and maximum."""
    first, strongest, heads = patches[0], strongest_of(patches), text_rows(patches[0])
    look = replace(look, scale="all")
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    title = f"{method_title(first.settings)} by time, layer {layer}"
    y = header(page, MARGIN, MARGIN, title, heads) + GAP
    aspect = reading.photos[0].width / reading.photos[0].height
    seconds = frames_of_a_patch(reading) / video.fps
    unneeded = [_unneeded(maps, layer, strongest) for maps in patches]
    labels = [
        (time, "none needed" if unneeded[i] else strength(maps, layer, strongest))
        for i, (time, maps) in enumerate(zip(times_of(len(patches), seconds), patches, strict=True))
    ]
    room = max(page.label_width(*label) for label in labels)
    most = max(1, int((page.inner + GAP) / (room + GAP)))
    columns = best_columns(aspect, len(patches), most, page.inner, STRIP_HEIGHT, 1, 1)
    rows = -(-len(patches) // columns)
    width = panel_width(aspect, columns, rows, page.inner, STRIP_HEIGHT, 1, 1)
    pitch, height = max(width, room) + GAP, width / aspect
    left = (page.width - columns * pitch + GAP) / 2
    for i, (frame, maps, label) in enumerate(zip(reading.photos, patches, labels, strict=True)):
        middle, top = left + i % columns * pitch + (pitch - GAP) / 2, y + i // columns * (HEAD + height + GAP)
        page.label(middle, top, *label)
        small = shrink(frame, width, height)
        if unneeded[i]:
            picture = render_overlay(small, maps.maps[layer], look)
        else:
            picture = draw_layer(small, maps, layer, True, look, strongest)
        page.picture(middle - width / 2, top + HEAD, width, height, picture)
    y += rows * (HEAD + height + GAP) + GAP
    text = caption(first, [layer], f"layer {layer}", look)
    text += " Above each: when its first frame is shown."
    if any("weak" in largest for _, largest in labels):
        text += f" Weak: below {100 * WEAK:.0f} % of the strongest."
    made = f"{settings_text(first.settings)}; {made_of(reading, video)}"
    return page.finish(footer(page, y, first.settings.method, text, made, look))


def draw_video(
    reading: Reading, patches: list[TokenMaps], layer: int, video: Video, look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: content}: the strip, the animation, and the raw maps (temporal patches, H, W) in maps.npz."""
    maps, strongest = [patch.maps[layer] for patch in patches], strongest_of(patches)
    peak = full_colour(patches[0], layer, replace(look, scale="all"), strongest)
    arrays = {"maps": np.stack(maps), "layer": np.array(layer), "fps": np.array(video.fps)}
    draw = functools.partial(strip_figure, reading, patches, layer, video, look, paper)
    return paper.figure("video_strip", draw) | {
        "video.webp": animate(video.frames, maps, video.fps, look, peak),
        "maps.npz": arrays | {"evidence": np.array(patches[0].evidence[:2])},  # p, p without the video
    }


def create_video_maps(
    model, processor, frames, prompt: str, layer_idx=None, save_dir="cam_results_video", *, fps=2.0,
    num_samples=5, noise_std=0.1, answer=None, target=None, target_occurrence=1, max_new_tokens=128,
    quiet=False, look=PLAIN, paper=PAGE, **settings,
) -> list[TokenMaps]:  # fmt: skip
    """A map of each temporal patch of a video, which is two frames, at a decoder layer; None is the middle layer.

    `frames` are paths, PIL images or uint8 arrays (height, width, 3) of one size, `fps` of them a second; the model
    sees all of them. Writes video_strip.png (a panel for each temporal patch), video.webp (the frames with their maps,
    animated) and maps.npz. All maps have one scale. The other arguments are those of `compute_token_maps`, with the
    method "auto" by default.

    Returns the TokenMaps of each temporal patch in turn, with the evidence of all of them. Raises ValueError for bad
    arguments, and what `read`, `explain` and `output_folder` raise.
    """
    check_drawing(look, paper)
    total = get_model_layers(model)[1]
    (layer,) = resolve_layers([total // 2 if layer_idx is None else layer_idx], total)
    video, settings = Video(frames, fps), Settings(num_samples, noise_std, **{"method": "auto"} | settings)
    copies = {"progress": show_progress(quiet), "passes": passes_of(settings.contrast)}
    with output_folder(save_dir, inputs=frames) as write:
        reading = read_video(model, processor, video, prompt, answer, max_new_tokens)
        span = find_target(reading, target, target_occurrence)
        patches = explain_with_evidence(reading, [span], [layer], settings, **copies)
        write(draw_video(reading, patches, layer, video, look, paper))
    return patches

"""Several pictures of one prompt, or the temporal patches of a video, explained as one.

    TokenMaps of each picture           explain: pooled together
      -> TokenMaps of all as one        joined of common/evidence.py: their image tokens one after the other, (1, N)
      -> maps of each picture           Pictures.split
      -> figures, animation             draw_pictures of pictures_figure.py; words: pictures_words.py

What is said of a map, its maximum, its evidence and what has full colour, is that of all pictures as one: a picture
that contributes less is darker.

Shapes:  N  image tokens of all pictures     H, W  rows and columns of one's
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.bands import render_heatmap, render_overlay
from common.clips import read_clip
from common.families import cap_pixels
from common.page import grey_panel
from common.photos import load_photo, readable
from smooth_gradcam import Look, Reading, TokenMaps, read
from studies.video import Video, frames_of_a_patch, made_of, read_video, times_of
from visualization_utils import full_colour

__all__ = ["Pictures", "Source"]

SHARES_SAID = 6  # pictures whose shares a line has


class Source(NamedTuple):
    """What --together or --video shows the model in one prompt: checked and opened before the model is loaded."""

    paths: tuple[str, ...]
    photo: list[Image.Image] | Video

    @classmethod
    def of(cls, args) -> "Source":
        """The photos or the video of these flags. Raises ValueError naming the flag."""
        if args.video is None:
            return cls(tuple(args.photos), [load_photo(path) for path in args.photos])
        return cls((args.video,), Video(read_clip(args.video, args.fps), args.fps))

    @property
    def names(self) -> tuple[str, ...]:
        """The files' names, or their paths where names are the same."""
        names = [readable(Path(path).name) for path in self.paths]
        return tuple(names if len(set(names)) == len(names) else map(readable, self.paths))

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    def cap(self, processor, max_pixels: int) -> None:
        """Lower the processor's cap on the pixels of a video's frame, never raise it. Raises ValueError."""
        if isinstance(self.photo, Video):
            own = getattr(processor, "video_processor", None)
            if not type(own).__name__.startswith("Qwen"):
                name = type(processor).__name__
                raise ValueError(f"--video: a {name} reads no videos here: Qwen2-VL, Qwen2.5-VL and Qwen3-VL do")
            frames = len(self.photo.frames) if "Qwen3" in type(own).__name__ else 1  # whose cap is of all together
            cap_pixels(own, max_pixels * frames)

    def read(self, *given) -> Reading:
        """`read`, or `read_video`, of arguments that have the photo of this source."""
        return (read_video if isinstance(self.photo, Video) else read)(*given)

    def pictures(self, reading: Reading) -> "Pictures":
        """Those of the reading of this source."""
        if not isinstance(self.photo, Video):
            return Pictures(reading, self.names, self.name)
        times = times_of(len(reading.grids), frames_of_a_patch(reading) / self.photo.fps)
        return Pictures(reading, times, self.name, self.photo)

    def seen_lines(self, reading: Reading) -> list[str]:
        """What the model sees, and of which photos the processor shows it more or less than there is."""
        lines, photos = [f"seen: {self.pictures(reading).made_of}"], [] if isinstance(self.photo, Video) else self.photo
        for name, photo, shown in zip(self.names, photos, reading.photos, strict=False):
            if photo.size != shown.size:
                sizes = " of ".join(f"{width} x {height}" for width, height in (shown.size, photo.size))
                lines.append(f"seen: {name}: {sizes} pixels: that is what is explained")
        return lines


class Pictures(NamedTuple):
    """The pictures of a reading: what they are called, and of what."""

    reading: Reading
    names: tuple[str, ...]  # of each: its file's, or the time from which it is shown
    file_name: str  # of the video, or of all photos
    video: Video | None = None

    @property
    def labels(self) -> list[str]:
        """What stands over each."""
        return list(self.names) if self.video else [f"{i} {name}" for i, name in enumerate(self.names, 1)]

    def split(self, maps: TokenMaps, layer) -> list[np.ndarray]:
        """The (H, W) map of each picture."""
        ends = np.cumsum([height * width for height, width in self.reading.grids])[:-1]
        parts = np.split(maps.maps[layer].ravel(), ends)
        return [part.reshape(grid) for part, grid in zip(parts, self.reading.grids, strict=True)]

    def shares(self, maps: TokenMaps, layer) -> list[float]:
        """The share of the map that lies in each picture; zeros where there is no map."""
        sums = [float(cam.sum()) for cam in self.split(maps, layer)]
        return [own / (sum(sums) or 1) for own in sums]

    def draw(self, maps: TokenMaps, layer, overlay: bool, look: Look, strongest: float, i: int, photo) -> np.ndarray:
        """Picture `i`, given in the size in which it is to be drawn, under the map, or its heatmap."""
        if layer in maps.blank:
            return grey_panel(*photo.size, f"{maps.blank[layer]}:\nno map")
        cam, peak = self.split(maps, layer)[i], full_colour(maps, layer, look, strongest)
        return render_overlay(photo, cam, look, peak) if overlay else render_heatmap(cam, photo.size[::-1], look, peak)

    @property
    def made_of(self) -> str:
        """The pictures' sizes, for the small print."""
        if self.video is None:
            grids = " + ".join(f"{width} × {height}" for height, width in self.reading.grids)
            return f"{len(self.names)} photos in one prompt, {grids} image tokens"
        return made_of(self.reading, self.video)

    def lines(self, maps: TokenMaps) -> list[str]:
        """How the map of each layer is shared among the pictures: the largest shares."""
        lines = []
        for layer in (layer for layer in maps.maps if layer not in maps.blank):
            shares = self.shares(maps, layer)
            most = sorted(sorted(range(len(shares)), key=lambda i: -shares[i])[:SHARES_SAID])
            said = ", ".join(f"{100 * shares[i]:.0f} % {'at' if self.video else 'in'} {self.names[i]}" for i in most)
            more = f", less in each of the {len(shares) - len(most)} others" if len(shares) > len(most) else ""
            lines.append(f"layer {layer}: of the map {said}{more}")
        return lines

    def arrays(self, maps: list[TokenMaps]) -> dict[str, np.ndarray]:
        """The raw maps of parts of the answer, float32, with the grids and names of the pictures.

        Of a video `maps` (parts, layers, temporal patches, H, W), of photos `maps_1` (parts, layers, H, W), `maps_2`
        and so on.
        """
        cams = [[self.split(one, layer) for layer in one.maps] for one in maps]
        arrays = {"grids": np.array(self.reading.grids), "pictures": np.array(self.names)}
        if self.video is not None:
            return arrays | {"maps": np.array(cams, np.float32), "fps": np.array(self.video.fps)}
        parts = (np.array([[own[i] for own in one] for one in cams], np.float32) for i in range(len(self.names)))
        return arrays | {f"maps_{i}": part for i, part in enumerate(parts, 1)}

    def raw(self, maps: TokenMaps, about: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What --save_raw writes `about` a map, with the maps as `arrays` has them, but without the axis of parts."""
        own = {name: part[0] if name.startswith("maps") else part for name, part in self.arrays([maps]).items()}
        return {name: value for name, value in about.items() if name not in ("maps", "grid")} | own

"""Draws the pictures of the pages; they are kept beside it, and a test compares them with what it
draws.

python docs/pictures.py [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor, nn

import dni_fx

BLUE, ORANGE, GREEN, PURPLE, GREY, DARK = (
    "#3b6ea8",
    "#c9701f",
    "#3f8f5c",
    "#7a55a5",
    "#8a8f98",
    "#22272e",
)
PALE = {BLUE: "#dce8f5", ORANGE: "#fbe6d2", GREEN: "#dcefe2", PURPLE: "#e9e0f3", GREY: "#eceef1"}


class Picture:
    """Shapes of one picture, in pixels from the upper left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, colour: str, *lines: str, round: float = 5
    ) -> None:
        """A rectangle with centred lines of text."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}" '
            f'fill="{PALE[colour]}" stroke="{colour}" stroke-width="1.4"/>'
        )
        for k, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 5 + 17 * (k - (len(lines) - 1) / 2), line, "middle")

    def text(
        self,
        x: float,
        y: float,
        line: str,
        anchor: str = "start",
        colour: str = DARK,
        size: int = 13,
    ) -> None:
        """One line of text on its base line."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}">{escape(line)}</text>'
        )

    def arrow(
        self, points: Iterable[tuple[float, float]], colour: str, dashed: bool = False
    ) -> None:
        """A line through points with a head at its end."""
        places = list(points)
        (x0, y0), (x1, y1) = places[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        head = [(x1, y1), *((x1 - 9 * dx + s * dy, y1 - 9 * dy - s * dx) for s in (4.5, -4.5))]
        places[-1] = (x1 - 7 * dx, y1 - 7 * dy)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.shapes += [
            f'<polyline points="{_points(places)}" fill="none" stroke="{colour}" '
            f'stroke-width="1.8"{dash}/>',
            f'<polygon points="{_points(head)}" fill="{colour}"/>',
        ]

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A thin grey line."""
        self.shapes.append(
            f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" '
            f'stroke="{GREY}" stroke-width="1"/>'
        )

    def __str__(self) -> str:
        head = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'font-family="Helvetica, Arial, Liberation Sans, sans-serif" role="img">\n'
            f"<title>{escape(self.title)}</title>"
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        return "\n".join([head, ground, *self.shapes, "</svg>", ""])


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.4g},{y:.4g}" for x, y in places)


def draw_locks() -> Picture:
    """Three stages on three devices: what each does when, with and without locks."""
    picture = Picture(760, 390, "When each of three stages works, locked and decoupled")
    colours = (BLUE, ORANGE, GREEN, PURPLE)
    left, unit, high = 90, 40, 30

    def row(top: float, stage: int) -> float:
        return top + 40 * stage

    def bar(top: float, stage: int, start: float, length: float, batch: int, what: str) -> None:
        picture.box(
            left + unit * start,
            row(top, stage),
            unit * length,
            high,
            colours[batch % 4],
            what,
            round=2,
        )

    def frame(top: float, title: str) -> None:
        picture.text(12, top - 14, title, size=14)
        for stage in range(3):
            picture.text(12, row(top, stage) + 20, f"stage_{stage}")
            picture.line(
                left, row(top, stage) + high + 5, left + 16 * unit, row(top, stage) + high + 5
            )

    frame(
        46, "Backpropagation: a stage waits for the forward and the backward of all stages after it"
    )
    for batch, start in enumerate((0, 9)):
        for stage in range(3):
            if start + stage < 16:
                bar(46, stage, start + stage, 1, batch, "F")
            back = start + 3 + 2 * (2 - stage)
            if back + 2 <= 16:
                bar(46, stage, back, 2, batch, "B")
    frame(
        222, "Decoupled: it asks its source (S) for the gradient, updates, and takes the next batch"
    )
    for stage in range(3):
        for batch in range(4):
            start = stage + 3.6 * batch
            source = 0.6 if stage < 2 else 0.0
            bar(222, stage, start, 1, batch, "F")
            if source:
                bar(222, stage, start + 1, source, batch, "S")
            bar(222, stage, start + 1 + source, 2, batch, "B")
    picture.arrow([(left, 364), (left + 16 * unit, 364)], GREY)
    picture.text(left + 16 * unit, 382, "time", "end", GREY)
    picture.text(left, 382, "a colour for each batch", colour=GREY)
    return picture


def draw_interface() -> Picture:
    """Two stages, a source between them, and what passes."""
    picture = Picture(760, 330, "A stage, the source at its interface, and the stage behind it")
    picture.box(110, 40, 170, 90, BLUE, "stage k", "h = f(x; θ)")
    picture.box(480, 40, 170, 90, GREEN, "stage k + 1")
    picture.box(295, 215, 170, 74, ORANGE, "source", "ĝ = M(h, context; φ)")
    picture.arrow([(20, 62), (110, 62)], DARK)
    picture.text(62, 52, "x", "middle")
    picture.arrow([(280, 62), (480, 62)], DARK)
    picture.text(380, 52, "1: value h, detached", "middle")
    picture.arrow([(650, 62), (740, 62)], DARK)
    picture.arrow([(345, 62), (345, 215)], DARK)
    picture.text(353, 160, "2: ask")
    picture.arrow([(295, 252), (195, 252), (195, 130)], ORANGE)
    picture.text(28, 190, "3: ĝ is pulled back", colour=ORANGE)
    picture.text(28, 208, "at once: θ learns", colour=ORANGE)
    picture.arrow([(110, 108), (20, 108)], BLUE, dashed=True)
    picture.text(12, 128, "to the source", colour=BLUE, size=12)
    picture.text(12, 143, "before", colour=BLUE, size=12)
    picture.arrow([(565, 130), (565, 252), (465, 252)], GREEN, dashed=True)
    picture.text(578, 190, "4: gradient of h from there:", colour=GREEN)
    picture.text(578, 208, "the target, φ learns", colour=GREEN)
    picture.arrow([(380, 322), (380, 289)], GREY)
    picture.text(390, 318, "context, such as the labels", colour=GREY)
    return picture


def draw_windows() -> Picture:
    """Two windows of a sequence."""
    picture = Picture(
        760, 285, "Two windows of a recurrent model, with a source for the state between them"
    )
    for k, (x, colour) in enumerate(((90, BLUE), (450, GREEN))):
        picture.box(x, 60, 220, 80, colour, f"window {k + 1}: T steps of the model")
        picture.arrow([(x + 110, 190), (x + 110, 140)], DARK)
        picture.text(x + 118, 184, "T inputs")
        picture.arrow([(x + 110, 60), (x + 110, 22)], DARK)
        picture.text(x + 118, 34, "loss of T outputs")
    picture.arrow([(20, 82), (90, 82)], DARK)
    picture.text(20, 72, "state")
    picture.arrow([(310, 82), (450, 82)], DARK)
    picture.text(380, 72, "state, detached", "middle")
    picture.arrow([(670, 82), (740, 82)], DARK)
    picture.box(300, 215, 160, 60, ORANGE, "source", "predicts ĝ")
    picture.arrow([(345, 82), (345, 215)], DARK)
    picture.arrow([(300, 245), (260, 245), (260, 140)], ORANGE)
    picture.text(60, 232, "ĝ, for all losses after", colour=ORANGE)
    picture.text(60, 250, "the window, × factor", colour=ORANGE)
    picture.arrow([(450, 118), (415, 118), (415, 215)], GREEN, dashed=True)
    picture.text(475, 240, "the next window's gradient of its first", colour=GREEN)
    picture.text(475, 258, "state, its own ĝ included: the target", colour=GREEN)
    return picture


class Net(nn.Module):
    """A value of the first block skips the second; drawn as an example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A U-Net of one level."""
        stem = self.stem(x)
        return self.head(torch.cat([stem, self.up(self.middle(self.down(stem)))], 1))


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("pictures"), metavar="DIR"
    )
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (
        ("locks", draw_locks()),
        ("interface", draw_interface()),
        ("windows", draw_windows()),
    ):
        (folder / f"{name}.svg").write_text(str(picture), encoding="utf-8")
    images = torch.zeros(8, 3, 32, 32)
    plan = dni_fx.plan_cuts(Net(), (images,), cuts=["down", "middle"], costs="analytic")
    plan.draw(folder / "plan.svg")


if __name__ == "__main__":
    main()

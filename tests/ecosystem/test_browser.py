"""A browser shows drawn pages and opens what is folded."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dni_fx.drawing import draw_plan
from dni_fx.drawing.shapes import colour_of
from dni_fx.plan import CutPlan

from ..plans.drawings import chain_plan, draw, encoder_plan, plan_of, unet_plan


def chromium(profile: Path, page: Path, *options: str, fragment: str = "") -> str:
    """Run headless Chromium on a file; what it prints."""
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium in PATH: apt-get install chromium")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=3000",
        f"--user-data-dir={profile}",
    ]
    command = [binary, *flags, *options, page.as_uri() + fragment]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


@pytest.mark.parametrize("suffix", ["svg", "html"])
@pytest.mark.parametrize(
    "make", [unet_plan, encoder_plan, lambda: plan_of("two_towers"), lambda: plan_of("residual")]
)
def test_a_browser_shows_the_picture(
    make: Callable[[], CutPlan], suffix: str, tmp_path: Path
) -> None:
    image = pytest.importorskip("matplotlib.image")
    plan = make()
    draw_plan(plan, tmp_path / f"plan.{suffix}")
    shot = tmp_path / "shot.png"
    options = ["--window-size=2000,1200", f"--screenshot={shot}"]
    chromium(tmp_path / "profile", tmp_path / f"plan.{suffix}", *options)
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (1200, 2000, 3)
    for stage in range(2):
        colour = [int(colour_of(stage)[k : k + 2], 16) for k in (1, 3, 5)]
        assert (abs(pixels - colour).sum(-1) < 12).sum() > 300, f"boxes and lines of stage_{stage}"
    assert (pixels.sum(-1) < 150).sum() > 500, "text"


@pytest.mark.parametrize(
    "make", [unet_plan, encoder_plan, lambda: plan_of("two_towers"), lambda: long_names_plan()]
)
def test_no_text_lies_over_another_or_leaves_its_box(
    make: Callable[[], CutPlan], tmp_path: Path
) -> None:
    check = """<script>
        const wrong = [], inside = (a, b) => a.left > b.left - 1 && a.right < b.right + 1;
        const all = [...document.querySelectorAll("#picture text")].map(
          t => [t, t.getBoundingClientRect()]);
        for (const [t, r] of all) {
          const box = t.parentElement.querySelector("rect");
          if (box && box.width.baseVal.value > 100 && !t.matches(".halo")
              && !inside(r, box.getBoundingClientRect()))
            wrong.push(`${t.textContent} leaves its box`);
          for (const [u, s] of all)
            if (u !== t && r.left < s.right - 1 && s.left < r.right - 1
                && r.top < s.bottom - 3 && s.top < r.bottom - 3)
              wrong.push(`${t.textContent} over ${u.textContent}`);
        }
        document.body.innerHTML = `<p>${all.length} texts; wrong: ${wrong.join("; ")}</p>`;
        </script></body>"""
    page = tmp_path / "plan.html"
    page.write_text(draw(make(), page).replace("</body>", check), encoding="utf-8")
    told = re.search(
        r"<p>(\d+) texts; wrong: (.*?)</p>",
        chromium(tmp_path / "profile", page, "--dump-dom"),
        re.DOTALL,
    )
    assert told is not None
    assert int(told[1]) > 20
    assert told[2] == ""


def long_names_plan() -> CutPlan:
    """Names, kinds and shapes longer than a box is wide."""
    plan = chain_plan(
        12, scope=lambda k: (f"encoder.{'very_' * 12}long.{k}",), model="WithLongNames"
    )
    assert plan.report is not None
    nodes = tuple(
        replace(
            n, operator="MultiHeadLatentAttentionWithALongName", shape=(128, 1024, 14, 14, 1024)
        )
        if n.scope
        else n
        for n in plan.report.nodes
    )
    return replace(plan, report=replace(plan.report, nodes=nodes))


def test_a_click_on_a_folded_box_opens_it_and_all_around_it(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    text = draw(chain_plan(1000), page)
    assert "<details open" not in chromium(tmp_path / "profile", page, "--dump-dom")
    click = (
        "<script>setTimeout(() => document.querySelector('#picture a')"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true})), "
        "100)</script></body>"
    )
    page.write_text(text.replace("</body>", click), encoding="utf-8")
    shown = chromium(tmp_path / "profile", page, "--dump-dom")
    assert re.findall(r'<details id="([^"]*)" open', shown) == ["inside-1"]


def test_a_link_to_an_inner_box_opens_all_around_it(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    text = draw(chain_plan(10_000), page)
    inner = re.search(r'<details id="inside-1">.*?<details id="([^"]*)">', text, re.DOTALL)
    assert inner is not None
    shown = chromium(tmp_path / "profile", page, "--dump-dom", fragment=f"#{inner[1]}")
    assert re.findall(r'<details id="([^"]*)" open', shown) == ["inside-1", inner[1]]

import math

import numpy as np
import pytest
import torch
from PIL import Image

from minipref.runtime import draw

BLUE = np.array([0x00, 0x72, 0xB2])  # the first colour of the palette


def pixels(image, colour, near=12):
    """-> (N, 2): row and column of the pixels of about this colour."""
    return np.argwhere(np.abs(np.asarray(image).astype(int) - colour).max(-1) <= near)


def panel(*series, **options):
    return draw.curves([draw.Panel("title", "x", "y", list(series), **options)])


def line(x, y, **options):
    return draw.Series("", x, y, **options)


def test_to_image_repeats_pixels():
    x = torch.rand(3, 4, 5)
    a = np.asarray(draw.to_image(x, 3))
    assert a.shape == (12, 15, 3)
    assert (a[::3, ::3] == (x * 255).round().byte().permute(1, 2, 0).numpy()).all() and (a[1] == a[0]).all()
    out_of_range = torch.tensor([-1.0, 2.0, math.nan]).view(1, 1, 3)
    assert np.asarray(draw.to_image(out_of_range))[0, :, 0].tolist() == [0, 255, 0]


def test_grid_shows_each_picture_at_its_place():
    colours = [(200, 30, 40), (20, 160, 60), (10, 60, 220)]
    red, green, blue = (torch.tensor(c).view(3, 1, 1).expand(3, 32, 32) / 255 for c in colours)
    rows = [("first", torch.stack([red, green])), ("second row", [blue]), ("mask", [torch.full((1, 7, 8), 0.2)])]
    image = draw.grid(rows, cell=96, title="A title", columns=["one", "two"])
    where = [pixels(image, c, 0) for c in colours]
    assert all(len(w) == 96 * 96 and np.ptp(w, 0).tolist() == [95, 95] for w in where)
    r, g, b = (w.min(0) for w in where)
    assert r[0] == g[0] and r[0] + 96 < b[0] and r[1] == b[1] and r[1] + 96 < g[1]
    below = np.asarray(image)[b[0] + 98 :, b[1] : b[1] + 96]  # the mask, grey, and nothing else but white
    assert (below == 51).all(-1).sum() == 84 * 96


def test_grid_reduces_what_is_large_and_takes_no_labels():
    image = draw.grid([("", [torch.zeros(3, 100, 200)])], cell=50)
    assert np.ptp(pixels(image, (0, 0, 0), 0), 0).tolist() == [24, 49]


def test_an_increasing_series_rises():
    for y_log in (False, True):
        at = pixels(panel(line([0, 1, 2], torch.tensor([0.1, 1.0, 10.0])), y_log=y_log), BLUE)
        first, last = at[at[:, 1].argmin()], at[at[:, 1].argmax()]
        assert last[0] < first[0] - 150
        middle = at[np.abs(at[:, 1] - (first[1] + last[1]) / 2).argmin()]
        assert (abs(middle[0] - (first[0] + last[0]) / 2) < 3) == y_log  # equal ratios are equal steps


def test_nan_leaves_a_gap_and_a_lone_point_a_dot():
    y = [1.0] * 20
    whole = pixels(panel(line(range(20), y)), BLUE)
    y[5:10], y[11:16] = [math.nan] * 5, [math.nan] * 5  # point 10 stands alone
    broken = pixels(panel(line(range(20), y)), BLUE)
    assert (np.diff(np.unique(whole[:, 1])) == 1).all()
    assert (np.diff(np.unique(broken[:, 1])) > 80).sum() == 2
    dot = pixels(panel(line([1], [2])), BLUE)
    assert 3 <= np.ptp(dot, 0).max() <= 7


def test_scatter_and_band_are_drawn():
    dots = panel(line([0, 1], [0, 1], points=True))
    joined = panel(line([0, 1], [0, 1]))
    assert len(pixels(dots, 0.7 * BLUE + 0.3 * 255)) < len(pixels(joined, BLUE)) / 4
    shaded = pixels(panel(line([0, 1], [1, 1], band=([0, 0], [2, 2]))), 0.18 * BLUE + 0.82 * 255, 3)
    assert np.ptp(shaded, 0).min() > 150


def test_odd_series_do_not_fail():
    nan = math.nan
    series = [line([], []), line([0, 1], [nan, nan]), line([3, 3], [0, 0]), line([1, 2], [-1, 0])]
    series.append(line([0, nan, 2], [1, 2, nan], band=([0, 1, 1], [2, 3, 3])))
    for y_log in (False, True):
        for s in series:
            assert panel(s, y_log=y_log, h_lines=[(0.5, "half"), (nan, "absent")]).width > 300
    crossing = [draw.Series(f"curve {k}", range(99), np.sin(np.arange(99) / 9 + k)) for k in range(9)]
    assert draw.curves([draw.Panel("é − × γ", "", "", crossing)] * 4).size == (840, 620)


@pytest.mark.parametrize("lo, hi", [(0, 1), (-0.3, 0.3), (3, 2000), (1e-7, 3e-7), (99.5, 100.25), (-5e6, 3e6)])
def test_ticks_are_nice_and_within_the_range(lo, hi):
    at = draw.ticks(lo, hi)
    steps = np.diff(at)
    assert 3 <= len(at) <= 8 and lo - 1e-12 <= at[0] and at[-1] <= hi * (1 + 1e-9) and np.allclose(steps, steps[0])
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9), 3) in (1, 2, 5)
    assert len(set(draw.numbers(at))) == len(at)


def test_log_ticks_and_numbers():
    assert np.allclose(draw.log_ticks(0.005, 20), [0.01, 0.1, 1, 10])
    assert np.allclose(draw.log_ticks(0.9, 30), [1, 2, 5, 10, 20])
    assert len(draw.log_ticks(3.0, 3.3)) >= 3 and len(draw.log_ticks(1e-30, 1e30)) <= 7
    assert draw.numbers([0, 0.1, 0.2, 0.25]) == ["0", "0.1", "0.2", "0.25"]
    assert draw.numbers([0, 5000, 20000]) == ["0", "5k", "20k"] and draw.numbers([2e-5, 1.5e-5]) == ["2e-5", "1.5e-5"]
    assert draw.plain("é − 3 × γ 漢") == "e - 3 x gamma ?"


def test_beside_and_stack():
    a, b = Image.new("RGB", (4, 6), "red"), Image.new("RGB", (3, 2), "blue")
    assert draw.beside([a, b], 5).size == (12, 6) and draw.beside([a, b], 5).getpixel((9, 1)) == (0, 0, 255)
    assert draw.stack([a, b], 5).size == (4, 13) and draw.stack([a, b], 5).getpixel((2, 11)) == (0, 0, 255)
    assert draw.stack([a, b], 5).getpixel((3, 11)) == (255, 255, 255)


def test_save_is_atomic(tmp_path):
    path = tmp_path / "new" / "figure.png"
    image = draw.curves([draw.Panel("", "", "", [line([0, 1], [0, 1])])], path)
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
    assert (np.asarray(Image.open(path)) == np.asarray(image)).all()
    before = path.read_bytes()

    class Broken:
        def save(self, file, format):
            file.write(b"half")
            raise OSError("broken")

    with pytest.raises(OSError):
        draw.save(Broken(), path)
    assert path.read_bytes() == before

"""A benchmark's table: means over words, intervals over photos."""

import numpy as np
import pytest

from studies.benchmark import basis, summarise, to_latex, to_table
from studies.tables import interval

CENTRE = "centre", ""


def test_interval_resamples_photos_and_not_words():
    values, photos = np.array([1.0, 1, 1, 1, 0, 0]), np.array(list("aaaabc"))
    mean, low, high = interval(values, photos)
    assert mean == pytest.approx(4 / 6)
    assert low == 0  # only b and c are drawn, which words alone would hardly give
    assert high == 1
    assert interval(np.ones(4), np.array(list("abcd"))) == (1, 1, 1)


def test_table_has_means_over_the_words_that_have_the_measure():
    def row(method, pointing, difference=None):
        found = {"method": method, "layer": "7", "pointing": pointing}
        return found if difference is None else found | {"difference": difference}

    found = [
        ("a", [row("gradcam", 1.0, 0.5), row("product", 0.0)]),
        ("a", [row("gradcam", 0.0), row("product", 0.0)]),
        ("b", [row("gradcam", 1.0, 0.7), row("product", 1.0)]),
    ]
    gradcam, product = summarise(found)
    assert (gradcam["words"], gradcam["photos"]) == (3, 2)
    assert gradcam["pointing"] == pytest.approx(2 / 3)
    assert gradcam["difference"] == pytest.approx(0.6)
    assert (gradcam["pointing_words"], gradcam["difference_words"]) == (3, 2)
    assert basis([gradcam, product]) == "ins. - del. of 2 words; "
    assert not basis([product])
    assert "difference" not in product
    head, first, second = to_table([gradcam, product])
    assert head.split() == ["method", "layer", "pointing", "ins.", "-", "del."]
    assert first.startswith("gradcam  7      0.67 (0.50-1.00)  0.60 (0.50-0.70)")
    assert second.split() == ["product", "7", "0.33", "(0.00-1.00)"]
    assert "doubted" not in gradcam  # whose words have no evidence
    latex = to_latex([gradcam, product], "95 % of photos_1, ins. - del.")
    assert "{$-$0.60}" in to_latex([gradcam | {"difference": -0.6}], "")
    assert "\\caption{95 \\% of photos\\_1, ins. $-$ del.}" in latex
    assert "gradcam & 7 & \\textbf{0.67}" in latex
    assert "product & 7 & 0.33" in latex
    assert " & -- \\\\" in latex


def test_table_tells_how_many_words_are_doubted_and_has_its_maps_first():
    def rows(method, p, kept, doubt):
        evidence = {"p": p, "kept": kept} | ({"doubt": doubt} if doubt else {})  # an empty cell leaves nothing
        return [{"method": method, "layer": layer, "near": 1.0} | evidence for method, layer in ((method, "7"), CENTRE)]

    found = [
        ("a", rows("needed", 0.9, 0.1, "")),
        ("b", rows("needed", 0.1, 0.9, "no")),
        ("c", rows("gradcam", 1, 0, "")),
    ]
    table = summarise(found)
    assert [(line["method"], line["words"], line["doubted"]) for line in table] == [
        ("needed", 2, 1), ("gradcam", 1, 0), ("centre", 3, 1)
    ]  # fmt: skip
    assert [(line["p"], line["kept"]) for line in table[:2]] == [pytest.approx((0.5, 0.5)), (1, 0)]
    assert to_table(table)[0].split() == ["method", "layer", "near"]  # the evidence is in benchmark.csv

"""The page is self-contained, escaped, accessible and whole or absent; the figures draw what they
were given, at a legible size."""

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from synthpi.core import figures as core_figures
from synthpi.studies import figures, page as report
from synthpi.studies.tissue.images import quality_section
from synthpi.studies.tissue.verdict import verdict
from synthpi.data.phantoms import pair_phantoms
from synthpi.pairs.quality import damage, pair_quality
from synthpi.studies.page import Report

NASTY = "<img src=x onerror=alert(1)> & \"quoted\" 'single' {{ 7*7 }}"


class Page(HTMLParser):
    "Tags with their attributes, text by enclosing tag, and whether every tag is closed"

    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def texts(self, tag):
        return [data for name, data in self.text if name == tag and data.strip()]


def drawing():
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([1, 2])
    plt.close(fig)
    return fig


@pytest.fixture
def saved(tmp_path):
    r = (
        Report(NASTY, NASTY)
        .section(NASTY, NASTY + "\n\n- " + NASTY)
        .numbers([(NASTY, NASTY, NASTY), ("1", "one")])
    )
    r.figure(drawing(), "first", NASTY, alt=NASTY)
    r.table(pd.DataFrame({NASTY: [NASTY, "b"], "x": [1.23456, np.nan]}), NASTY, digits=2)
    r.section("Two").figure(drawing(), "second", "Another", alt="A line")
    return tmp_path / "run", r.save(tmp_path / "run")


def test_the_page_asks_for_nothing(saved):
    html = saved[1].read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "default-src 'none'" in next(
        m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "source", "form"}
        for key in ("src", "href", "srcset", "action", "poster", "background"):
            if key in attrs:
                assert re.match(r"data:image/png;base64,|#s\d+$", attrs[key])
    style = "".join(page.texts("style"))
    assert (
        "prefers-color-scheme: dark" in style
        and "@media print" in style
        and "max-width: 900px" in style
    )
    assert not re.search(
        r"url\(|@import|https?:|//\w", style + "".join(page.texts("script")).replace("// ", "")
    )


def test_strings_stay_strings(saved):
    page = Page(saved[1].read_text(encoding="utf-8"))
    # ours only
    assert len(page.all("img")) == 2 and len(page.all("script")) == 1
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    shown = "".join(data for _, data in page.text)
    # title 2, subtitle, heading 2, text 2, card 3, figure caption, column, cell, table caption
    assert shown.count(NASTY) == 14
    assert page.all("img")[0]["alt"] == NASTY


def test_figures_are_the_files(saved):
    folder, path = saved
    embedded = [
        base64.b64decode(img["src"].split(",")[1])
        for img in Page(path.read_text(encoding="utf-8")).all("img")
    ]
    assert embedded == [
        (folder / "figures" / f"{name}.png").read_bytes() for name in ("first", "second")
    ]
    assert all(Image.open(io.BytesIO(data)).width > 300 for data in embedded)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["figures/first.png", "figures/second.png", "report.html"]


def test_contents_lead_to_the_sections(saved):
    page = Page(saved[1].read_text(encoding="utf-8"))
    assert (
        [a["href"] for a in page.all("a")]
        == ["#" + s["id"] for s in page.all("section")]
        == ["#s1", "#s2"]
    )
    assert [b for b in page.texts("b") if b != "Contents"] == ["Figure 1.", "Table 1.", "Figure 2."]


def test_table_rounds_what_it_shows_and_keeps_what_it_sorts_by(saved):
    html = saved[1].read_text(encoding="utf-8")
    assert re.search(r'data-v="1.23456"\s*class="number">1.23<', html) and re.search(
        r'data-v=""\s*class="number">–<', html
    )


def test_an_index_with_a_name_is_a_column_and_missing_keys_are_dashes(tmp_path):
    frame = pd.DataFrame({"n": [3, 4]}, index=pd.Index(["a", "b"], name="class"))
    html = (
        Report("t")
        .section("s")
        .table(frame, "c")
        .table([{"a": 1}, {"b": True}], "c")
        .save(tmp_path)
        .read_text(encoding="utf-8")
    )
    assert Page(html).texts("button") == ["class", "n", "a", "b"]
    assert Page(html).texts("td") == ["3", "4", "–", "yes"] and Page(html).texts("th") == [
        "a",
        "b",
        "1",
        "–",
    ]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda r: Report("t").table([{"a": 1}], "c"), "before the first section"),
        (lambda r: r.table([], "c"), "shape"),
        (lambda r: r.figure(drawing(), "../up", "c", alt="a"), "'../up'"),
        (lambda r: r.figure(drawing(), "x", "c", alt=" "), "no alt text"),
        (
            lambda r: r.figure(drawing(), "x", "c", alt="a").figure(drawing(), "x", "c", alt="a"),
            "two figures",
        ),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Report("t").section("s"))


def test_long_cells_wrap_and_a_box_that_goes_on_says_so(tmp_path):
    html = (
        Report("t")
        .section("s")
        .table([{"arm": "a", "what": "x" * 40}, {"arm": "b", "what": "y" * 41}], "c")
        .save(tmp_path)
        .read_text(encoding="utf-8")
    )
    assert [attrs.get("class") for attrs in Page(html).all("td")] == [None, "long"]
    style, script = "".join(Page(html).texts("style")), "".join(Page(html).texts("script"))
    assert "Scroll sideways" in style and all(
        f".{name} " in style and f'toggle("{name}"' in script for name in ("more", "wide")
    )
    printed = style[style.index("@media print") :]
    assert "mask-image: none" in printed and ".wide + ::before { content: none; }" in printed


def test_a_failed_save_keeps_the_old_page(tmp_path, monkeypatch):
    path = Report("old").section("s").save(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(report, "_PAGE", "half {{ title }} {{ missing.attribute }}")
    with pytest.raises(Exception, match="missing"):
        Report("new").section("s").save(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_report_is_the_same_file(tmp_path):
    pages = [
        Report("t")
        .section("s")
        .figure(drawing(), "f", "c", alt="a")
        .save(tmp_path / k)
        .read_bytes()
        for k in "ab"
    ]
    assert pages[0] == pages[1]


# The study's figures

CLASSES = ["ADI", "a_long_$name", "<LYM>", "MUC", "TUM"]
ARMS = [
    *core_figures._LOOKS,
    "trident_shuffled",
    "trident_blank",
    "trident_third_view",
    "trident_haematoxylin",
]


def record(mean):
    return {
        "accuracy": {
            "mean": mean,
            "ci": [mean - 0.1, mean + 0.05],
            "per_seed": [mean, mean + 0.01],
        },
        "per_class_recall": dict.fromkeys(CLASSES, mean),
    }


def every_figure():
    records = {arm: record(0.3 + 0.05 * k) for k, arm in enumerate(ARMS)}
    history = pd.DataFrame(
        {
            "step": range(50),
            "loss": np.linspace(9, 1, 50),
            "invariance": np.linspace(1, 0.1, 50),
            "variance": np.zeros(50),
            "covariance": 1.0,
        }
    )
    yield figures.plot_losses(
        {arm: history[["step", "loss"]] if arm == "supervised" else history for arm in ARMS[3:]}
    )
    yield figures.plot_accuracy(records)
    yield figures.plot_recall({arm: r["per_class_recall"] for arm, r in records.items()}, CLASSES)
    yield figures.plot_confusion({arm: np.diag(range(1, 6)) for arm in ARMS[:3]}, CLASSES)
    yield figures.plot_confusion({arm: np.eye(2) for arm in ARMS[3:6]}, ["lung_aca", "lung_scc"])
    yield figures.pair_gallery(
        [np.zeros((8, 8, 3), np.uint8)] * 12, [Image.new("L", (8, 8))] * 12, ["$x_1"] * 12
    )
    yield figures.plot_augmentation(
        {arm: {"weak": record(0.5), "strong": record(0.6)} for arm in ARMS[3:7]}
    )


@pytest.mark.parametrize(
    "fig",
    list(every_figure()),
    ids=("losses accuracy recall confusion two-classes gallery augmentation").split(),
)
def test_figures_are_legible_closed_and_inside_their_edges(fig):
    fig.draw_without_rendering()
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) >= 8
    # closed; others may be open where a notebook ran before
    assert fig not in map(plt.figure, plt.get_fignums())
    (width, height), box = fig.get_size_inches(), fig.get_tightbbox()
    assert box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01


def test_accuracy_draws_the_intervals_in_the_order_given():
    ax = figures.plot_accuracy({"trident": record(0.7), "mean_rgb": record(0.4)}).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "trident",
        "mean_rgb",
    ] and ax.yaxis_inverted()
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_linewidth() == 2] == [
        [0.7 - 0.1, 0.7 + 0.05],
        [0.4 - 0.1, 0.4 + 0.05],
    ]
    # chance among five classes
    assert ax.lines[-1].get_xdata()[0] == 0.2
    assert (
        figures.plot_accuracy({"a": {"balanced_accuracy": {"mean": 0.5}}}, key="balanced_accuracy")
        .axes[0]
        .lines[1]
        .get_xdata()[0]
        == 0.5
    )


def test_the_place_is_named_for_a_reader():
    assert (
        figures.plot_accuracy({"a": {"position_r2": {"mean": 0.5}}}, key="position_r2", chance=0)
        .axes[0]
        .get_xlabel()
        .startswith("R² of the place (")
    )
    assert (
        figures.plot_accuracy(
            {"a": {"accuracy_stain_shift": {"mean": 0.5}}}, key="accuracy_stain_shift"
        )
        .axes[0]
        .get_xlabel()
        .startswith("accuracy stain shift (")
    )


def test_a_reader_sees_the_name_and_the_colour_stays_that_of_the_arm():
    names, bars = {"trident": "TriDeNT"}, {"trident": {"x": 0.5}, "mean_rgb": {"x": 0.4}}
    plain, named = (figures.plot_recall(bars, ["x"], names=n).axes[0] for n in (None, names))
    assert [t.get_text() for t in named.get_yticklabels()] == ["TriDeNT", "mean_rgb"]
    assert [b.get_facecolor() for b in named.patches] == [b.get_facecolor() for b in plain.patches]


def test_recall_without_a_class_is_a_dash():
    fig = figures.plot_recall({"a": {"x": 0.5}}, ["x", "y"])
    assert [t.get_text() for ax in fig.axes for t in ax.texts] == [" 0.50", "–"]


def test_losses_smooth_and_survive_a_term_at_zero():
    history = pd.DataFrame(
        {"step": [0, 1, 2, 3], "loss": [4.0, 2.0, 2.0, 4.0], "variance": [0.0] * 4}
    )
    fig = figures.plot_losses({"a": history}, smooth=0.5)
    assert fig.axes[0].lines[0].get_ydata().tolist() == [4, 3, 2, 3]
    fig.draw_without_rendering()


def test_a_missing_setting_is_one_point():
    fig = figures.plot_augmentation(
        {"a": {"weak": {"mean": 0.4}, "strong": {"mean": 0.5}}, "b": {"strong": record(0.6)}}
    )
    assert [list(line.get_ydata()) for line in fig.axes[0].lines if line.get_label() in "ab"] == [
        [0.4, 0.5],
        [0.6],
    ]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["weak", "strong"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: figures.plot_accuracy({}), "0 arms"),
        (
            lambda: figures.plot_confusion({"a": np.eye(3)}, CLASSES),
            r"shape (3, 3); expected (5, 5)",
        ),
        (lambda: figures.pair_gallery([], []), "0 primary and 0"),
        (lambda: figures.pair_gallery([1, 2], [1]), "2 primary and 1"),
    ],
)
def test_figures_refuse(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# The section on synthetic images


def judged_section(tmp_path, how):
    pairs = pair_phantoms(24, 8)
    second = damage([np.uint8(m > 0) * 255 for m in pairs.mask], how)
    records = [
        {"primary": x, "privileged": y, "true": m, "group": g}
        for x, y, m, g in zip(pairs.image, second, pairs.mask, pairs.patient_id)
    ]
    r = Report("t")
    quality_section(
        r,
        {
            "tiles": (pair_quality(records, kind="mask", um_per_px=0.5, n_boot=50), records, None),
            "pairs": (pair_quality(records, true="true", kind="mask", n_boot=50), records, None),
        },
    )
    return r, r.save(tmp_path).read_text(encoding="utf-8"), records


def test_quality_is_told_in_two_tables_and_two_galleries(tmp_path):
    r, page, records = judged_section(tmp_path, "shifted")
    assert (
        set(r.pngs) == {"worst_tiles", "worst_pairs"}
        and r.n_tables == 2
        and "COLLAPSED" not in page
        and "training aids, not findings" in page
    )
    rows = Page(page).texts("th")
    assert {"dice", "ssim", "kid", "edges", "nuclear_stain", "nuclei_rank"} <= set(rows)
    found = pair_quality(records, true="true", kind="mask", n_boot=50).table.loc["dice"]
    assert f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" in page and found[
        "says"
    ].split(";")[0].replace("|", "")[:20] in page.replace("|", "")
    # what looked, and what was left out, stand below the table
    assert "simulated tissue only" in page and "Nuclei were not counted" in page
    assert (
        "not how often" in page
        and "were invented" in page
        and "What is true is not known here" in page
    )


def test_collapse_is_said_aloud(tmp_path):
    _, page, _ = judged_section(tmp_path, "collapsed")
    assert page.count("COLLAPSED") == 2 and "draws nearly the same whatever it is given" in page


def test_what_was_not_judged_is_said_with_its_reason():
    r = Report("t")
    quality_section(r, {"tiles": (None, [], "pair 0 has 24 pixels")})
    assert "not judged, because pair 0 has 24 pixels" in str(r.sections) and not r.pngs


# The verdict of a study of tiles


def ratio(base, low, high, augmentation="chosen", tiles="as they are", model="trident"):
    return {
        "base": base,
        "model": model,
        "augmentation": augmentation,
        "tiles": tiles,
        "ratio": (low + high) / 2,
        "ci": [low, high],
        "text": f"{(low + high) / 2:.2f} [{low:.2f}, {high:.2f}]",
    }


def study_of(*ratios, groups=8, seeds=3, tiles=400, **accuracy):
    accuracy = {
        "mean_rgb": 0.3,
        "colour_histogram": 0.4,
        "random_encoder": 0.5,
        "siamese_unprivileged": 0.7,
        "trident": 0.8,
        **accuracy,
    }
    return {
        "arms": {
            n: {"accuracy": {"mean": m, "ci": [m - 0.02, m + 0.02]}}
            for n, m in accuracy.items()
            if m
        },
        "seeds": list(range(seeds)),
        "data": {"groups": {"test": groups}, "tiles": {"test": tiles}},
        "error_reduction": list(ratios),
    }


HELPS, HARMS, OPEN = (
    ratio("siamese_unprivileged", low, high) for low, high in ((1.24, 1.41), (0.6, 0.9), (0.9, 1.2))
)
BEATS = ratio("random_encoder", 1.5, 2.5)


def test_yes_needs_groups_seeds_and_more_than_no_training():
    said = verdict(study_of(HELPS, BEATS))
    assert (
        said.startswith("**Yes, on these tiles:** with each arm")
        and "hint" not in said
        and "calls it a finding" not in said
    )
    assert (
        "Against *Untrained encoder*, the best arm without training, TriDeNT's error ratio is 2.00 "
        "[1.50, 2.50]. " in said + " "
    )


@pytest.mark.parametrize(
    "changes, ratios, lacking",
    [
        ({"groups": 7}, (BEATS,), "7 test groups"),
        ({"seeds": 2}, (BEATS,), "2 training seeds"),
        ({"groups": 4, "seeds": 1}, (BEATS,), "4 test groups, 1 training seed"),
        ({"groups": 1}, (BEATS,), "1 test group"),
        # printed as [1.00, 1.12]
        (
            {},
            (ratio("random_encoder", 1.001, 1.12),),
            "not shown to be better than *Untrained encoder*, which was not trained",
        ),
        ({}, (), "not shown to be better than *Untrained encoder*, which was not trained"),
        (
            {},
            (
                ratio("random_encoder", 1.5, 2.5, tiles="stain-shifted"),
                ratio("random_encoder", 1.5, 2.5, "weak"),
            ),
            "not shown to be better than *Untrained encoder*, which was not trained",
        ),
        (
            {"colour_histogram": 0.6},
            (BEATS, ratio("colour_histogram", 0.9, 1.2)),
            "not shown to be better than *Colour histogram*, which was not trained",
        ),
        (
            {"mean_rgb": 0.6},
            (BEATS,),
            "not shown to be better than *Mean colour*, which was not trained",
        ),
        (
            {"mean_rgb": 0, "colour_histogram": 0, "random_encoder": 0},
            (),
            "no arm without training in the study",
        ),
    ],
)
def test_less_is_a_hint_that_names_what_is_lacking(changes, ratios, lacking):
    said = verdict(study_of(HELPS, *ratios, **changes))
    assert (
        said.startswith(
            f"**A hint, not a finding** ({lacking}): the second image seems to help; with each arm"
        )
        and "**Yes" not in said
    )
    assert said.endswith(
        " This report calls it a finding from 8 test groups and 3 training seeds on, if TriDeNT "
        "also makes fewer errors than the best arm without training."
    )


def test_harm_needs_groups_and_seeds_but_no_baseline():
    assert verdict(study_of(HARMS)).startswith(
        "**No, on these tiles it does harm:** "
    )
    said = verdict(study_of(HARMS, seeds=1))
    assert said.startswith(
        "**A hint, not a finding** (1 training seed): the second image seems to do harm; "
    ) and said.endswith("8 test groups and 3 training seeds on.")


@pytest.mark.parametrize(
    "row",
    [OPEN, ratio("siamese_unprivileged", 1.004, 1.2), ratio("siamese_unprivileged", 0.8, 0.996)],
)
def test_an_interval_that_holds_1_as_printed_is_open(row):
    said = verdict(study_of(row, BEATS, groups=4, seeds=1))
    assert (
        said.startswith("**No difference was shown:** ")
        and "contains 1" in said
        and "the best arm without training" in said
        and "hint" not in said
    )


def test_the_ratio_to_no_training_is_told_in_every_case():
    def told(*rows, **k):
        return verdict(study_of(OPEN, *rows, **k))

    assert "2.00 [1.50, 2.50]." in told(BEATS)
    assert "[0.90, 1.20]: it is not shown that training helped at all." in told(
        ratio("random_encoder", 0.9, 1.2)
    )
    assert "[0.50, 0.90]: training made it worse." in told(ratio("random_encoder", 0.5, 0.9))
    assert (
        "The best arm without training is *Mean colour*, 60.0 % [58.0, 62.0]; the results have no "
        "ratio" in told(BEATS, mean_rgb=0.6)
    )
    assert "without training" not in told(mean_rgb=0, colour_histogram=0, random_encoder=0)
    assert "Every test tile is a group of its own" in told(
        groups=400
    ) and "group of its own" not in told(groups=399)


def test_other_settings_and_tiles_are_told_and_a_study_without_the_pair_says_so():
    said = verdict(
        study_of(
            HELPS,
            BEATS,
            ratio("siamese_unprivileged", 0.95, 1.05, "strong"),
            ratio("siamese_unprivileged", 1.1, 1.3, tiles="stain-shifted"),
            supervised=0.9,
        )
    )
    assert (
        "With strong colour augmentation of both, the ratio is 1.00 [0.95, 1.05]." in said
        and "On test tiles in other stains it is 1.20 [1.10, 1.30]." in said
        and "that of *Supervised*, 90.0 %" in said
    )
    assert verdict(study_of(BEATS)).startswith("The study has no pair")

"""report.html and comparison.html: one file each, with all figures, that loads nothing."""

import base64
import html.parser
import io
import pathlib
import re
import shlex

import numpy as np
import PIL.Image
import pytest

from dd_jax.evaluation import metrics
from dd_jax.experiment import build, configuration, figures, pages, reporting
from dd_jax.results import _html, page, plots, published
from dd_jax.results.pictures import example_images, pictures
from dd_jax.results.report import DEFENDED, REFERENCE, forget_stage, read_report, write_report
from dd_jax.results.tables import Row, measured_columns

ROOT = pathlib.Path(__file__).parent.parent
SIZES = np.random.default_rng(0).gamma(3, 0.5, 50)
EPSILONS = [0.0, 0.1, 0.2]
BY_AUTOATTACK = {"norm": "linf", "epsilon": 0.1, "version": "standard"}
HOSTILE = '<script>alert("1 & 2")</script>'


def figures_of(shift):
    """What a report holds of a net, each figure different."""
    names = ("rho_l2", "l2", "rho_linf", "l2_carlini_wagner", "rho_l2_ddn", "l2_ddn", "l1_fmn")
    return {
        "num_examples": 50,
        "accuracy": 0.9,
        "deepfool_success": 1.0,
        "accuracy_pgd": 0.25 + shift,
        "ddn_curve": metrics.robustness_curve("ddn", SIZES + shift),
        "fmn_linf_curve": metrics.robustness_curve("fmn_linf", SIZES / 10 + shift),
        "fgsm_curve": {"epsilons": EPSILONS, "success": [0.1, 0.5 - shift, 0.95]},
        "autoattack": [BY_AUTOATTACK | {"robust_accuracy": 0.5 + shift, "num_examples": 40}],
        "deepfool_disagreements": 3,
    } | {name: 0.1 * (i + 1) + shift for i, name in enumerate(names)}


MEASURED = {REFERENCE: figures_of(0.01), DEFENDED: figures_of(0.02)}


class Page(html.parser.HTMLParser):
    """What a page consists of. Fails where a tag is not closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in _html.EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def of(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        overrides = ["data.train_limit=200", "data.test_limit=50", "seed=17", "defense.norm=linf"]
        overrides = [f"--config.{override}" for override in overrides]
        config = configuration.read(str(ROOT / "configs/digits_mlp.py"), overrides)
    return build.build_run(config, tmp_path_factory.mktemp("a run") / "it's")


@pytest.fixture(scope="module")
def report(run):
    row = published.TABLE["mnist", "mlp"]["deep_defense"]._asdict()
    facts = run.facts._replace(published={"deep_defense": row})
    names = ("deepfool", "ddn")
    made = reporting.make_report(run._replace(facts=facts), MEASURED, names=names)
    return made._replace(remarks=[*made.remarks, HOSTILE])


EXAMPLES = [
    (
        np.eye(12)[:, :, None],
        [
            plots.Example("reference", np.full((12, 12, 3), 0.5), "7", 0.125),
            plots.Example("deep_defense", np.ones((12, 12)), HOSTILE, 0.25),
        ],
        "3",
    )
]


@pytest.fixture(scope="module")
def written(run, report):
    """The text of a run's page, and the files that were drawn for it."""
    (run.workdir / "plots").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "fooling_examples", lambda nets: EXAMPLES)
        path = pages.write_run_page(run, report)
    assert path == run.workdir / "report.html"
    assert sorted(file.name for file in run.workdir.iterdir()) == ["plots", "report.html"]
    return path.read_text()


def assert_needs_nothing(text):
    """No address of anything outside of the page, and no script."""
    parsed = Page(text)
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style and "@import" not in style
    (policy,) = [a for a in parsed.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return parsed


def test_a_page_needs_no_network_and_no_script(written):
    parsed = assert_needs_nothing(written)
    assert written.startswith("<!DOCTYPE html>") and parsed.of("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in written and len(parsed.of("h1")) == 1
    assert HOSTILE in parsed.text and "&lt;script&gt;" in written


def test_it_holds_every_figure_of_the_report(written, report):
    text = Page(written).text
    rows = [Row(stage, measured) for stage, measured in report.measured.items()]
    columns = measured_columns(rows)
    assert {"rho_l2_ddn", "accuracy_autoattack_linf_0.1_standard"} < {x.name for x in columns}
    for row in rows:
        for column in columns:
            value = row.measured.get(column.name, row.measured["autoattack"][0]["robust_accuracy"])
            assert column.form.format(value) in text and column.heading in text
    assert "0.220 (1.640)" in text and "in brackets: the paper's" in text
    assert report.remarks[0] in text and "disagree on 3 of 50 images" in text
    for name, value in report.config.items():
        assert f"{name} {value!r}" in text
    for part in (report.device, report.python, *report.packages.values(), "seed 17"):
        assert part in text


def test_curves_are_there_as_pictures_and_as_numbers(written):
    parsed = Page(written)
    text = parsed.text
    for shift, label in ((0.01, "reference"), (0.02, "deep_defense")):
        sizes = np.sort([float(f"{size:.6g}") for size in SIZES + shift])
        assert f"{np.mean(sizes > 1):.2%}" in text, label
        assert f"{sizes[24]:.4g}" in text and f"{0.5 - shift:.2%}" in text
    assert "Robust accuracy in l_2 by DDN, 50 images" in text
    assert f"{label} l_inf 0.1 standard 52.00% 40" in text
    alts = [image["alt"] for image in parsed.of("img")]
    assert all(len(alt) > 20 or alt.startswith("Original") for alt in alts)
    assert sum("Nets: reference, deep_defense." in alt for alt in alts) == 2


def test_images_are_whole_and_say_what_they_are_taken_for(written):
    parsed = Page(written)
    images = []
    for image in parsed.of("img"):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            opened.load()
            given = (
                int(image.get("width", opened.size[0])),
                int(image.get("height", opened.size[1])),
            )
            assert given == opened.size
            images.append((image["alt"], opened.size, opened.convert("RGB").getpixel((0, 1))))
    assert images[-3:] == [
        ("Original: class 3", (12, 12), (0, 0, 0)),
        ("Reference: taken for 7, rho_2 0.125", (12, 12), (127, 127, 127)),
        (f"Deep Defense: taken for {HOSTILE}, rho_2 0.250", (12, 12), (255, 255, 255)),
    ]


def test_it_can_be_read_without_seeing_it(written):
    parsed = Page(written)
    assert len(parsed.of("table")) == len(parsed.of("caption"))
    assert {cell.get("scope") for cell in parsed.of("th")} == {"col", "row"}
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and set(levels[1:]) == {2}


def test_the_same_report_gives_the_same_page_and_is_not_written_again(run, report, written):
    path = run.workdir / "report.html"
    before = path.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "fooling_examples", lambda nets: EXAMPLES)
        pages.write_run_page(run, report)
        assert path.read_text() == written and path.stat().st_mtime_ns > before
        patch.setattr(pages, "fooling_examples", None)  # Would fail.
        assert pages.write_run_page(run, report, again=False) == path
        with pytest.raises(TypeError):
            pages.write_run_page(run, report._replace(seed=3), again=False)
    assert not list(run.workdir.glob("*partial*"))


def command_line(text):
    return shlex.split(text.replace("\\\n", " "))


def test_the_commands_make_the_same_run(run, report):
    """The configuration that the command stands for is the run's, whichever file it came from."""
    training, evaluation = pages.run_commands(run, report)
    words = command_line(training)
    assert words[:6] == ["python", "-m", "dd_jax", "train", "--config", "digits_mlp"]
    assert words[6:8] == ["--workdir", str(run.workdir)]
    assert len(words) == 8 + 4  # What differs from the file.
    config = configuration.read("digits_mlp", words[8:])
    assert configuration.flatten(config) == report.config
    lenet = report._replace(config=report.config | {"model.name": "lenet", "seed": 3})
    words = command_line(pages.run_commands(run, lenet)[0])
    config = configuration.read(words[5], words[8:])
    assert configuration.flatten(config) == lenet.config
    wanted = f"--workdir {run.workdir} --measure deepfool ddn"
    assert " ".join(command_line(evaluation)).endswith(wanted)
    only = report._replace(names=["deepfool"])
    assert len(pages.run_commands(run, only)) == 1
    assert pages.run_commands(run, only._replace(limit=7))[1].endswith(" --limit 7")


def test_options_that_the_defense_does_not_take_are_left_out(run, report):
    """They would be refused, and change nothing."""
    config = report.config | {"defense.name": "clean", "defense.correct_scale": 99.0}
    words = command_line(pages.run_commands(run, report._replace(config=config))[0])
    assert "--config.defense.name=clean" in words and "99" not in " ".join(words)
    assert configuration.read(words[5], words[8:]).defense.name == "clean"


def test_a_net_that_is_trained_again_takes_its_page_with_it(run, report, written, tmp_path):
    write_report(report, tmp_path)
    (tmp_path / "report.html").write_text(written)
    for stage in (REFERENCE, DEFENDED):
        (tmp_path / f"robustbench_{stage}_linf_0.1.json").write_text("{}")
    forget_stage(tmp_path, DEFENDED)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["report.json", f"robustbench_{REFERENCE}_linf_0.1.json"]
    assert list(read_report(tmp_path).measured) == [REFERENCE]


def test_a_comparison_has_a_page_too(run, report, tmp_path):
    other = report._replace(config=report.config | {"defense.correct_scale": 7.5})
    nets = [
        figures.Net("reference", "reference", run, REFERENCE, report),
        figures.Net("deep_defense", "deep_defense", run, DEFENDED, report),
        figures.Net("deep_defense (b)", "deep_defense", run, DEFENDED, other),
    ]
    rows = [Row(net.label, net.measured) for net in nets]
    pages.write_comparison_page(nets, rows, ["a note"], EXAMPLES, tmp_path)
    parsed = assert_needs_nothing((tmp_path / "comparison.html").read_text())
    text = parsed.text
    assert "2 runs of mlp on digits" in text and "a note" in text and HOSTILE in text
    assert "deep_defense (b) defense.correct_scale=7.5" in text
    assert f"compare {shlex.quote(str(run.workdir))} " in text and "dd_jax train" in text
    for name in ("robust_accuracy_over_epsilon", "robustness_over_accuracy", "fooling_examples"):
        assert (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}.pdf").exists()
    assert len(parsed.of("img")) == 3 + 3
    assert text.count("52.00%") >= 2 and "0.220" in text


def test_without_pictures_and_examples_there_is_still_a_page(report):
    text = page.run_page(report, page.Contents([], [], ["true"]))
    parsed = assert_needs_nothing(text)
    assert parsed.of("img") == [] and page.NO_EXAMPLES in parsed.text and "true" in parsed.text
    assert (
        page.CONFIRMED
        in Page(page.run_page(report._replace(remarks=[]), page.Contents([], [], []))).text
    )


def test_html_is_escaped_once_and_only_where_it_is_text():
    inner = _html.element("b", "1 < 2", class_="x y", aria_label='"quoted"', title=None)
    assert inner == '<b class="x y" aria-label="&quot;quoted&quot;">1 &lt; 2</b>'
    assert _html.element("p", inner, None, 3) == f"<p>{inner}3</p>"
    assert _html.element("img", "left out", alt="a&b") == '<img alt="a&amp;b">'


def test_what_was_not_drawn_is_not_shown():
    assert pictures([], {}) == [] and pictures([pathlib.Path("other.png")], {}) == []
    shown = example_images(
        np.zeros((2, 3)), [plots.Example("mine", np.ones((2, 3)), 1, 0.5)], "0", {}
    )
    assert [image.caption for image in shown] == [
        "Original: class 0",
        "mine: taken for 1, rho_2 0.500",
    ]

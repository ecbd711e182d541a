"""A sweep's runs side by side: what is measured, whose figures stand where, which figures are
drawn.
"""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import evaluation, log
from dd_jax.experiment import build, comparison, configuration, figures, runs, sweeps
from dd_jax.experiment.configuration import ConfigurationError
from dd_jax.results.report import read_report

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
    "data.train_limit=200",
    "data.test_limit=40",
    "reference.num_epochs=3",
    "reference.batch_size=50",
    "reference.learning_rate=0.05",
    "defense.num_steps=2",
    "defense.correct_scale=10",
    "fine_tuning.num_epochs=2",
    "fine_tuning.learning_rate=0.002",
    "fine_tuning.batch_size=50",
    "evaluation.batch_size=20",
    "evaluation.num_steps=5",
    "evaluation.epoch_examples=20",
    "evaluation.pgd_num_steps=3",
    "evaluation.curve_num_points=4",
    "evaluation.carlini_wagner_examples=3",
    "evaluation.carlini_wagner_num_steps=5",
    "evaluation.carlini_wagner_num_binary_search_steps=2",
    "evaluation.minimum_norm_examples=4",
    "evaluation.minimum_norm_num_steps=3",
)
METHODS = ("deep_defense", "clean")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The directories of two runs that share their reference, not measured beyond training's own
    measurement.
    """
    workdir = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        for name, overrides in sweeps.expand(
            [f"defense.name={','.join(METHODS)}"], [f"--config.{x}" for x in TINY], workdir
        ):
            config = configuration.read(str(ROOT / "configs/digits_mlp.py"), overrides)
            parts = build.build_run(config, workdir / name)
            configuration.claim_directory(config, workdir / name)
            runs.run_stages(parts)
    return [workdir / name for name in METHODS]


@pytest.fixture(scope="module")
def compared(swept, tmp_path_factory):
    """The folder of a comparison, what it printed, and which nets were measured for it."""
    out, measured = tmp_path_factory.mktemp("out"), []
    with pytest.MonkeyPatch.context() as patch:
        original, write = comparison.measure_state, comparison.add_to_report
        patch.setattr(
            comparison,
            "measure_state",
            lambda *a, **k: measured.append(k["name"]) or original(*a, **k),
        )
        patch.setattr(
            comparison, "add_to_report", lambda *a: measured.append(a[0].workdir.name) or write(*a)
        )
        printed = comparison.compare(swept, out)
    return out, printed, measured


def test_every_net_is_measured_once_the_shared_reference_too(swept, compared):
    out, _, measured = compared
    assert measured == ["reference", "defended", "deep_defense", "defended", "clean"]
    full = [read_report(workdir) for workdir in swept]
    assert full[0].measured["reference"] == full[1].measured["reference"]
    but_autoattack = [name for name in evaluation.NAMES if name != "autoattack"]
    assert all(report.names == but_autoattack for report in full)
    assert (swept[1] / "plots/success_over_epsilon.png").exists() and (
        swept[1] / "plots/single_run.pdf"
    ).exists()


def test_the_table_holds_what_was_measured_in_the_paper_s_order(swept, compared):
    out, printed, _ = compared
    table = (out / "table.txt").read_text()
    assert table.strip() in printed
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["reference", "clean", "deep_defense"]
    found = json.loads((out / "comparison.json").read_text())["figures"]
    measured = read_report(swept[0]).measured
    for name, wanted in (
        ("reference", measured["reference"]),
        ("deep_defense", measured["defended"]),
    ):
        assert found[name] == wanted | {
            k: v for k, v in found[name].items() if k.startswith("accuracy_fgsm")
        }
    assert found["deep_defense"]["accuracy_fgsm_1.0"] <= 0.5  # By its meaning.
    assert 0.5 < found["deep_defense"]["accuracy_fgsm_0.2"] <= found["deep_defense"]["accuracy"]
    assert {"rho_2 DDN", "l_2 DDN", "rho_inf FMN", "l_inf FMN", "l_1 FMN"} < set(
        re.split(r"\s{2,}", lines[0])
    )
    assert found["deep_defense"]["fmn_l1_curve"]["num_examples"] == 4
    assert f"epsilon_ref = {measured['defended']['epsilon_half']:.4g}, where half" in table
    assert "40 test images (C&W: the first 3; DDN, FMN: the first 4) of digits" in table
    assert (out / "table.md").read_text().count("\n| ") == 4


def test_all_of_the_paper_s_figures_are_drawn(compared):
    out, _, _ = compared
    names = (
        "success_over_epsilon",
        "robust_accuracy_over_epsilon",
        "robustness_over_accuracy",
        "fooling_examples",
        "training_over_epochs",
    )
    assert {path.name for path in out.glob("*.p*")} == {
        f"{name}.{kind}" for name in names for kind in ("png", "pdf")
    }


def test_the_examples_fool_the_nets_they_are_drawn_for(swept, compared):
    parts = [build.open_run(workdir) for workdir in swept]
    nets = comparison.list_nets(parts, [read_report(workdir) for workdir in swept])
    shown = figures.fooling_examples(nets)
    assert [label for _, _, label in shown] == ["0", "1", "2", "3"]
    image, examples, label = shown[0]
    assert [example.method for example in examples] == ["reference", "clean", "deep_defense"]
    for net, example in zip(nets, examples, strict=True):
        logits = net.run.model.apply(
            {"params": build.restore_state(net.run, net.stage).params},
            jnp.asarray(example.image[None]),
        )
        assert str(int(np.argmax(logits))) == example.label != label
        difference = np.linalg.norm(example.image - image) / np.linalg.norm(image)
        assert example.ratio == pytest.approx(difference, rel=1e-4)


def test_curves_over_epochs_are_the_log_s(swept, compared):
    parts = build.open_run(swept[0])
    net = figures.Net("deep_defense", "deep_defense", parts, "defended", read_report(swept[0]))
    lines = [
        line for line in log.read_lines(swept[0]) if line["stage"] == "defended" and "test" in line
    ]
    assert [point[0] for point in figures.epochs(net)] == [1.0, 2.0]
    assert [point[1:] for point in figures.epochs(net)] == [
        (line["test"]["accuracy"], line["test"]["rho_l2"]) for line in lines
    ]


def test_a_reference_counts_once_and_nets_are_told_apart_by_their_weights(
    swept, compared, monkeypatch
):
    parts = [build.open_run(workdir) for workdir in swept]
    both = [read_report(workdir) for workdir in swept]
    assert [net.label for net in comparison.list_nets(parts, both)] == [
        "reference",
        "clean",
        "deep_defense",
    ]
    restore = comparison.restore_state

    def other_weights(run, stage):
        state, changed = restore(run, stage), run.workdir.name == "clean"
        return state._replace(params=jax.tree.map(lambda leaf: leaf + 1e-7 * changed, state.params))

    monkeypatch.setattr(comparison, "restore_state", other_weights)
    nets = comparison.list_nets(parts, both)
    assert [net.label for net in nets] == [
        "reference",
        "reference (clean)",
        "clean",
        "deep_defense",
    ]


def test_strengths_are_noted_where_they_differ(swept, compared):
    parts, report = build.open_run(swept[0]), read_report(swept[0])
    net = figures.Net("deep_defense", "deep_defense", parts, "defended", report)
    facts = parts.facts._replace(strength=33.0)
    stronger = net._replace(label="other", run=parts._replace(facts=facts))
    of = lambda *nets: [value for *_, value in figures.strengths(nets)["deep_defense"]]
    assert of(net) == [None] and of(net, net) == [None, None] and of(net, stronger) == [10.0, 33.0]
    without = report._replace(measured={"reference": {}, "defended": {"accuracy": 1.0}})
    assert figures.strengths([net._replace(report=without)]) == {}


def test_half_of_the_images_wrong_without_an_attack_is_said(swept, compared):
    parts, report = build.open_run(swept[0]), read_report(swept[0])
    at = lambda epsilon: report._replace(measured={"defended": {"epsilon_half": epsilon}})
    said = [
        comparison.fgsm_accuracies(
            [figures.Net("deep_defense", "deep_defense", parts, "defended", at(epsilon))],
            limit=None,
        )[1]
        for epsilon in (0.0, None)
    ]
    assert "is at 50 % or below without an attack" in said[0] and "does not fall to 50 %" in said[1]


def test_a_subset_is_enough_for_what_it_shows(swept, compared, tmp_path):
    for workdir in swept:
        shutil.copytree(workdir, tmp_path / workdir.name)
        (tmp_path / workdir.name / "report.json").unlink()
    copies = [tmp_path / workdir.name for workdir in swept]
    printed = comparison.compare(copies, tmp_path / "out", names=("deepfool",), limit=20)
    assert "PASS" not in printed and "epsilon_ref" not in printed and "20 test images of" in printed
    assert not (tmp_path / "out/success_over_epsilon.png").exists()
    assert (tmp_path / "out/robustness_over_accuracy.png").exists()


def test_runs_of_other_nets_or_data_are_refused(swept, compared, tmp_path):
    other = shutil.copytree(swept[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["data"]["test_limit"] = 39
    (other / "config.json").write_text(json.dumps(config))
    config["evaluation"]["pgd_epsilon"] = 0.25
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigurationError,
        match=r"differ in data.test_limit, evaluation.pgd_epsilon; only runs whose",
    ):
        comparison.compare([swept[0], other], tmp_path / "out")
    with pytest.raises(ConfigurationError, match="is not a run directory"):
        comparison.compare([swept[0], tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_before_anything_is_measured(
    swept, compared, tmp_path, monkeypatch
):
    monkeypatch.setattr(comparison, "measure_state", None)
    with pytest.raises(
        ConfigurationError, match=r"--out .*file cannot be made .*; it must be a directory"
    ):
        (tmp_path / "file").write_text("")
        comparison.compare(swept, tmp_path / "file", limit=20)
    unfinished = shutil.copytree(swept[1], tmp_path / "unfinished")
    shutil.rmtree(unfinished / "checkpoints/reference/12")
    with pytest.raises(ConfigurationError, match="unfinished has no finished reference net"):
        comparison.compare([swept[0], unfinished], tmp_path / "out", limit=20)
    monkeypatch.setattr(comparison, "all_names", lambda run: ("deepfool",))
    with pytest.raises(
        ConfigurationError, match="pass cannot be measured of .*, whose inputs are no images"
    ):
        comparison.compare(swept, tmp_path / "out", names=("deepfool", "pass"))

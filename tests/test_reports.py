"""Reports: everything that one needs to quote a figure, the paper's beside it."""

import importlib.metadata
import json
import pathlib

import jax
import pytest

from dd_jax import configuration, experiment, published, reports

ROOT = pathlib.Path(__file__).parent.parent
BEFORE = {
    "num_examples": 50,
    "accuracy": 0.9831,
    "rho_l2": 0.15321,
    "l2": 1.0876,
    "deepfool_success": 0.875,
    "deepfool_steps": 2.5,
}
AFTER = BEFORE | {"accuracy": 0.9912, "rho_l2": 0.34567, "l2": 2.3456, "deepfool_success": 1.0}
MEASURED = {experiment.REFERENCE: BEFORE, experiment.DEFENDED: AFTER}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        overrides = ["--config.data.train_limit=200", "--config.data.test_limit=50", "--config.seed=17"]
        config = configuration.read(str(ROOT / "configs/digits_mlp.py"), overrides)
    return experiment.build(config, tmp_path_factory.mktemp("run"))


def on(parts, **names):
    """The same run under another name of data set, net or defense."""
    config = parts.config.copy_and_resolve_references()
    for section, name in names.items():
        config[section].name = name
    return parts._replace(config=config)


def test_a_report_says_what_was_measured_and_with_what(parts):
    report = reports.make_report(parts, MEASURED)
    assert report["measured"] == MEASURED and report["published"] == {}
    assert (report["model"], report["defense"], report["seed"]) == ("mlp", "deep_defense", 17)
    assert report["data"].startswith("digits (scikit-learn, 8x8x1 enlarged to 28x28x1; first 200 of 1437 train images;")
    assert report["input_space"] == "none (pixels as they are; 0..255 becomes 0..1)"
    assert report["config"]["fine_tuning.batch_size"] == parts.config.fine_tuning.batch_size
    assert report["config"] == configuration.flatten(parts.config)
    assert f"({jax.default_backend()}, {jax.device_count()} device(s))" in report["device"]
    assert report["packages"]["jax"] == jax.__version__
    assert set(report["packages"]) == set(reports.PACKAGES) and report["python"].startswith("3.")


def test_the_papers_figures_stand_beside(parts):
    report = reports.make_report(on(parts, data="mnist", model="lenet"), MEASURED)
    assert report["published"]["reference"] == published.TABLE["mnist", "lenet"]["reference"]._asdict()
    assert report["published"]["deep_defense"]["l2_deepfool"] == 2.05
    assert set(report["published"]) == {"reference", "deep_defense"}
    clean = reports.make_report(on(parts, data="mnist", model="lenet", defense="clean"), MEASURED)
    assert set(clean["published"]) == {"reference"}
    assert published.lookup("mnist", "nin", "reference") is None
    assert published.lookup("cifar10", "nin", "deep_defense").rho_linf_fgs == 2.15e-2


def test_the_papers_defense_is_better_than_its_reference_everywhere():
    """A guard against rows mixed up; PASS is better when lower."""
    for rows in published.TABLE.values():
        for field, reference, defended in zip(
            published.Figures._fields, rows["reference"], rows["deep_defense"], strict=True
        ):
            if reference is not None:
                assert (defended < reference) == (field == "similarity_pass"), (rows, field)


def test_the_table_has_both_rows_and_the_papers_figures_in_brackets(parts):
    lines = reports.table(reports.make_report(on(parts, data="mnist"), MEASURED)).splitlines()
    assert lines[0].split() == ["accuracy", "rho_2", "l_2", "DeepFool", "success"]
    assert lines[1].split() == ["reference", "98.31%", "0.1532", "1.088", "(0.810)", "87.50%"]
    assert lines[2].split() == ["deep_defense", "99.12%", "0.3457", "2.346", "(1.640)", "100.00%"]
    assert {len(line) for line in lines[:3]} == {len(lines[0])} and lines[3] == "(in brackets: the paper's)"
    assert lines[4].startswith("50 test images of digits (") and lines[4].endswith("seed 17") and len(lines) == 5
    assert "inputs: none (pixels as they are" in lines[4]
    assert "brackets" not in reports.table(reports.make_report(parts, MEASURED))


def test_fewer_images_for_the_slow_attack_are_said(parts):
    measured = {stage: row | {"carlini_wagner_examples": 20} for stage, row in MEASURED.items()}
    assert reports.conditions({**reports.make_report(parts, measured)}).startswith(
        "50 test images (C&W: the first 20) of"
    )


def test_a_report_is_read_back_and_what_is_none_is_none(parts, tmp_path):
    assert reports.read(tmp_path) is None and reports.read(tmp_path / "nowhere") is None
    reports.write(report := reports.make_report(parts, MEASURED, names=("deepfool", "pgd"), limit=7), tmp_path)
    assert reports.read(tmp_path) == report and (report["names"], report["limit"]) == (["deepfool", "pgd"], 7)
    (tmp_path / "report.json").write_text("{")
    assert reports.read(tmp_path) is None


def test_a_report_is_written_whole_and_replaces_the_old_one(parts, tmp_path):
    (tmp_path / "report.json").write_text("old")
    report = reports.make_report(parts, MEASURED)
    path = reports.write(report, tmp_path)
    assert path == tmp_path / "report.json" and json.loads(path.read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_run_from_a_checkout_that_was_not_installed_has_a_report_too(parts, monkeypatch):
    version = importlib.metadata.version

    def version_of_others(package):
        if package == "dd_jax":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", version_of_others)
    packages = reports.make_report(parts, MEASURED)["packages"]
    assert packages["dd_jax"] == "not installed" and packages["jax"] == jax.__version__

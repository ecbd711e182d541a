"""Reports: everything that one needs to quote a figure, the paper's beside it."""

import importlib.metadata
import json
import pathlib

import jax
import pytest

from dd_jax.experiment import build, configuration, plans, reporting
from dd_jax.results import published
from dd_jax.results import report as reports
from dd_jax.results.report import DEFENDED, REFERENCE, read_report

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
MEASURED = {REFERENCE: BEFORE, DEFENDED: AFTER}


@pytest.fixture(scope="module")
def config():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        overrides = [
            "--config.data.train_limit=200",
            "--config.data.test_limit=50",
            "--config.seed=17",
        ]
        return configuration.read(str(ROOT / "configs/digits_mlp.py"), overrides)


@pytest.fixture(scope="module")
def parts(config, tmp_path_factory):
    return build.build_run(config, tmp_path_factory.mktemp("run"))


def changed(config, **names):
    """The configuration with another name of data set, net or defense."""
    config = config.copy_and_resolve_references()
    for section, name in names.items():
        config[section].name = name
    return config


def on(parts, config, **names):
    """The same run under another name of data set, net or defense."""
    facts = plans.make_facts(changed(config, **names), parts.feed, parts.preprocessing)
    return parts._replace(facts=facts)


def looked_up(data, model, method, **options):
    return published.lookup(
        data, model, method, **{"input_space": published.INPUT_SPACES[data, model], **options}
    )


def test_a_report_says_what_was_measured_and_with_what(parts, config):
    report = reporting.make_report(parts, MEASURED)
    assert report.measured == MEASURED and report.published == {}
    assert (report.model, report.defense, report.seed) == ("mlp", "deep_defense", 17)
    assert report.data.startswith(
        "digits (scikit-learn, 8x8x1 enlarged to 28x28x1; first 200 of 1437 train images;"
    )
    assert report.input_space == "none (pixels as they are; 0..255 becomes 0..1)"
    assert report.config["fine_tuning.batch_size"] == config.fine_tuning.batch_size
    assert report.config == configuration.flatten(config)
    assert f"({jax.default_backend()}, {jax.device_count()} device(s))" in report.device
    assert report.packages["jax"] == jax.__version__
    assert set(report.packages) == set(reporting.PACKAGES) and report.python.startswith("3.")


def test_the_papers_figures_stand_beside(parts, config):
    report = reporting.make_report(on(parts, config, data="mnist", model="lenet"), MEASURED)
    assert report.published["reference"] == published.TABLE["mnist", "lenet"]["reference"]._asdict()
    assert report.published["deep_defense"]["l2_deepfool"] == 2.05
    assert set(report.published) == {"reference", "deep_defense"}
    clean = reporting.make_report(
        on(parts, config, data="mnist", model="lenet", defense="clean"), MEASURED
    )
    assert set(clean.published) == {"reference"}
    assert published.lookup("mnist", "nin", "reference", input_space="none") is None
    assert looked_up("cifar10", "nin", "deep_defense").rho_linf_fgsm == 2.15e-2


def test_the_papers_figures_stand_only_beside_what_compares_with_them(config):
    """Sizes in another input space, or PGD of another epsilon, do not."""
    config = changed(config, data="mnist", model="lenet")
    assert plans.paper_row(config, "deep_defense").accuracy_pgd == 0.6454
    config.evaluation.pgd_epsilon = 0.2
    assert plans.paper_row(config, "deep_defense").accuracy_pgd is None
    config.data.preprocessing = "none"
    assert plans.paper_row(config, "deep_defense") is None


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs").glob("[!_d]*.py")])
def test_configurations_measure_what_the_paper_measures(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    config = configuration.read(str(ROOT / "configs" / f"{name}.py"))
    row = plans.paper_row(config, "deep_defense")
    if name == "cifar_published":  # Nets of others.
        assert row is None
    else:
        assert row == published.TABLE[config.data.name, config.model.name]["deep_defense"]


def test_the_published_table_is_the_papers():
    """Every digit, written down a second time: accuracies in percent, as printed."""
    for nets, lines in PAPERS_TABLE.items():
        methods = published.TABLE[nets]
        for (method, row), line in zip(methods.items(), lines, strict=True):
            figures = [None if text == "-" else float(text) for text in line.split()]
            if figures[3] is not None:
                figures[3] = round(figures[3] / 100, 6)
            assert list(row) == figures, (nets, method)


PAPERS_TABLE = {
    ("mnist", "mlp"): (
        ".81 .0540 .84 1.19 .8534",
        ".80 .0578 .83 1.18 .8542",
        "1.17 .0946 1.17 4.11 .8280",
        "1.64 .153 1.58 33.18 .8181",
    ),
    ("mnist", "lenet"): (
        "1.48 .129 1.40 26.17 .9074",
        "1.50 .150 1.58 23.06 .8981",
        "1.90 .205 1.71 50.67 .8810",
        "2.05 .236 1.84 64.54 .8760",
    ),
    ("cifar10", "convnet"): (
        ".18 .00527 .29 21.34 -",
        ".24 .00802 .33 27.91 -",
        ".21 .00637 .31 27.08 -",
        ".36 .0158 .47 45.05 -",
    ),
    ("cifar10", "nin"): (
        ".30 .0105 .41 34.41 -",
        ".31 .0107 .41 36.59 -",
        ".37 .0176 .48 45.51 -",
        ".40 .0215 .50 51.07 -",
    ),
    ("imagenet2012", "alexnet"): (".29 .000546 - - -", ".45 .00087 - - -"),
    ("imagenet2012", "resnet18"): (".69 .000696 - - -", "1.03 .00108 - - -"),
}


def test_the_papers_defense_is_better_than_its_reference_everywhere():
    """A guard against rows mixed up; PASS is better when lower."""
    for rows in published.TABLE.values():
        for field, reference, defended in zip(
            published.Figures._fields, rows["reference"], rows["deep_defense"], strict=True
        ):
            if reference is not None:
                assert (defended < reference) == (field == "similarity_pass"), (rows, field)


def test_the_table_has_both_rows_and_the_papers_figures_in_brackets(parts, config):
    mnist = on(parts, config, data="mnist")
    lines = reports.table(reporting.make_report(mnist, MEASURED)).splitlines()
    assert lines[0].split() == ["accuracy", "rho_2", "l_2", "DeepFool", "success"]
    assert lines[1].split() == ["reference", "98.31%", "0.1532", "1.088", "(0.810)", "87.50%"]
    assert lines[2].split() == ["deep_defense", "99.12%", "0.3457", "2.346", "(1.640)", "100.00%"]
    assert {len(line) for line in lines[:3]} == {len(lines[0])} and lines[
        3
    ] == "(in brackets: the paper's)"
    assert (
        lines[4].startswith("50 test images of digits (")
        and lines[4].endswith("seed 17")
        and len(lines) == 5
    )
    assert "inputs: none (pixels as they are" in lines[4]
    assert "brackets" not in reports.table(reporting.make_report(parts, MEASURED))


def test_fewer_images_for_the_slow_attack_are_said(parts):
    measured = {stage: row | {"carlini_wagner_examples": 20} for stage, row in MEASURED.items()}
    assert reports.conditions(reporting.make_report(parts, measured)).startswith(
        "50 test images (C&W: the first 20) of"
    )


def test_a_report_is_read_back_and_what_is_none_is_none(parts, tmp_path):
    assert read_report(tmp_path) is None and read_report(tmp_path / "nowhere") is None
    report = reporting.make_report(parts, MEASURED, names=("deepfool", "pgd"))
    reports.write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert (report.names, report.limit) == (["deepfool", "pgd"], None)
    for damaged in ("{", "[]", '{"names": []}', '{"measured": 1, "names": [], "config": {}}'):
        (tmp_path / "report.json").write_text(damaged)
        assert read_report(tmp_path) is None


def test_reports_from_before_are_read_under_the_names_of_today(parts, tmp_path):
    before = reporting.make_report(parts, {REFERENCE: {"num_examples": 1, "fgs_success": 0.5}})
    old = before._asdict() | {"names": ["deepfool", "fgs"]}
    old["config"] = {"evaluation.fgs_max_epsilon": 1.0, "seed": 17}
    old["measured"][REFERENCE]["fgs_curve"] = {"epsilons": [0.0], "success": [0.1]}
    old = {name: value for name, value in old.items() if name not in ("remarks", "xla_flags")}
    (tmp_path / "report.json").write_text(json.dumps(old))
    report = read_report(tmp_path)
    assert report.names == ["deepfool", "fgsm"] and report.remarks == []
    assert report.config == {"evaluation.fgsm_max_epsilon": 1.0, "seed": 17}
    curve = {"epsilons": [0.0], "success": [0.1]}
    wanted = {"num_examples": 1, "fgsm_success": 0.5, "fgsm_curve": curve}
    assert report.measured == {REFERENCE: wanted}


def test_a_report_adds_to_what_was_measured_before_and_one_on_fewer_images_stands_apart(
    parts, config, tmp_path
):
    there = parts._replace(workdir=tmp_path)
    add = lambda run, *arguments, **options: reporting.add_to_report(
        run, reporting.make_report(run, *arguments, **options)
    )
    add(there, MEASURED, names=("deepfool",))
    more = {
        stage: {"num_examples": 50, "accuracy": 0.5, "accuracy_pgd": 0.25} for stage in MEASURED
    }
    whole, path = add(there, more, names=("pgd",))
    assert path == tmp_path / "report.json" and read_report(tmp_path) == whole
    fewer, path = add(there, more, names=("pgd",), limit=7)
    assert path.name == "report_first_7.json" and read_report(tmp_path, 7) == fewer
    assert fewer.measured == more
    both = read_report(tmp_path)
    assert both.measured["defended"] == AFTER | {"accuracy": 0.5, "accuracy_pgd": 0.25}
    assert both.names == ["deepfool", "pgd"] and both.limit is None
    other = changed(config)
    other.evaluation.num_steps = 3  # Measured otherwise: nothing is kept.
    facts = plans.make_facts(other, parts.feed, parts.preprocessing)
    add(there._replace(facts=facts), more, names=("pgd",))
    assert read_report(tmp_path).measured == more


def test_figures_of_two_machines_in_one_report_name_both(parts):
    now = reporting.make_report(parts, MEASURED)
    there = now._replace(device="a card", xla_flags="", packages={**now.packages, "jax": "0.0"})
    there = there._replace(measured={DEFENDED: {"accuracy_pgd": 0.25}})
    here = now._replace(xla_flags="--flag=1")
    both = reports.merged(there, here)
    assert both.device == f"a card; {now.device}" and both.python == now.python
    assert both.xla_flags == "-; --flag=1"
    assert both.packages == {**now.packages, "jax": f"0.0; {now.packages['jax']}"}
    again = reports.merged(both, here)
    assert (again.device, again.xla_flags) == (both.device, both.xla_flags)
    # Nothing is left of what was measured there, or its report names no machine.
    assert reports.merged(there._replace(measured={DEFENDED: BEFORE}), here) == here
    unknown = there._replace(device=None, packages=None, xla_flags="--flag=1")
    assert reports.merged(unknown, here).device == now.device


def test_a_report_from_before_a_measurement_had_options_keeps_its_figures(parts, tmp_path):
    """The options' first values change nothing of what was measured; other values would."""
    report = reporting.make_report(parts, MEASURED)
    names = ("evaluation.minimum_norm_examples", "evaluation.minimum_norm_num_steps")
    old = {name: value for name, value in report.config.items() if name not in names}
    reports.write_report(report._replace(config=old), tmp_path)
    facts = parts.facts._replace(config=report.config | dict(zip(names, (500, 1000), strict=True)))
    there = parts._replace(workdir=tmp_path, facts=facts)
    more = {stage: {"num_examples": 50, "accuracy": 0.5, "l2_ddn": 1.0} for stage in MEASURED}
    whole, _ = reporting.add_to_report(there, reporting.make_report(there, more, names=("ddn",)))
    assert whole.measured["defended"] == AFTER | {"accuracy": 0.5, "l2_ddn": 1.0}
    reports.write_report(report._replace(config=old), tmp_path)
    facts = facts._replace(config=facts.config | {names[1]: 20})
    other = there._replace(facts=facts)
    whole, _ = reporting.add_to_report(other, reporting.make_report(other, more, names=("ddn",)))
    assert whole.measured == more


def test_autoattack_s_results_add_up_and_are_measured_or_not(parts, tmp_path):
    there = parts._replace(workdir=tmp_path)
    entry = {"norm": "linf", "epsilon": 0.1, "version": "standard", "accuracy": 0.75}
    entry |= {"robust_accuracy": 0.5, "num_examples": 20, "seed": 0, "remarks": []}
    entries = [entry | {"epsilon": epsilon} for epsilon in (0.1, 0.2)]
    for each in entries:
        measured = {stage: row | {"autoattack": [each]} for stage, row in MEASURED.items()}
        whole, _ = reporting.add_to_report(there, reporting.make_report(there, measured))
    assert (
        whole.measured["reference"]["autoattack"]
        == entries
        == (read_report(tmp_path).measured["defended"]["autoattack"])
    )
    assert reports.has_figures(whole, DEFENDED, ("deepfool", "autoattack"))
    assert not reports.has_figures(
        reporting.make_report(parts, MEASURED), DEFENDED, ("autoattack",)
    )
    assert "acc. AA linf 0.2" in reports.table(whole)
    assert reports.conditions(whole).startswith("50 test images (AutoAttack: the first 20) of")


def test_which_attacks_were_given_fewer_images_is_said(parts):
    fewer = {"carlini_wagner_examples": 20, "ddn_examples": 20, "fmn_linf_examples": 10}
    measured = {stage: row | fewer | {"ddn_success": 1.0} for stage, row in MEASURED.items()}
    said = reports.conditions(reporting.make_report(parts, measured))
    assert said.startswith("50 test images (C&W, DDN: the first 20; FMN: the first 10) of")
    assert "; DDN, FMN: 1000 steps; seed" in said


def test_seeds_and_pgd_s_epsilon_are_said(parts):
    measured = {stage: row | {"accuracy_pgd": 0.5} for stage, row in MEASURED.items()}
    first = reporting.make_report(parts, measured)
    assert reports.conditions(first, first._replace(seed=3)).endswith(
        "; PGD: linf, epsilon 0.1, 40 steps; seeds 3, 17"
    )


def test_a_report_is_written_whole_and_replaces_the_old_one(parts, tmp_path):
    (tmp_path / "report.json").write_text("old")
    report = reporting.make_report(parts, MEASURED)
    path = reports.write_report(report, tmp_path)
    assert path == tmp_path / "report.json"
    assert json.loads(path.read_text()) == report._asdict()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["report.json", "report.json.damaged"]
    reports.write_report(report, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_from_a_checkout_that_was_not_installed_has_a_report_too(parts, monkeypatch):
    version = importlib.metadata.version

    def version_of_others(package):
        if package == "dd_jax":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", version_of_others)
    packages = reporting.make_report(parts, MEASURED).packages
    assert packages["dd_jax"] == "not installed" and packages["jax"] == jax.__version__

"""The reproduction of Table 2: what its search tries and chooses, and that search, final runs and page go
on where they were stopped. Tiny runs on digits.
"""

import argparse
import importlib.metadata
import json
import math
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import reproduce_autoattack as autoattack
from benchmarks import reproduce_final as final
from benchmarks import reproduce_judges as judges
from benchmarks import reproduce_page as page
from benchmarks import reproduce_processes as processes
from benchmarks import reproduce_search as search
from benchmarks import reproduce_tradeoffs as tradeoffs
from configs import default, mnist_mlp
from dd_jax.experiment import build, configuration
from dd_jax.experiment.configuration import ConfigurationError

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
    "data.name=digits",
    "data.train_limit=200",
    "data.test_limit=30",
    "reference.num_epochs=2",
    "reference.batch_size=50",
    "fine_tuning.batch_size=50",
    "fine_tuning.max_steps=2",
    "evaluation.batch_size=40",
    "evaluation.num_steps=5",
    "evaluation.pgd_num_steps=2",
    "evaluation.carlini_wagner_num_steps=4",
    "evaluation.carlini_wagner_num_binary_search_steps=1",
    "evaluation.carlini_wagner_examples=10",
)
TWO = ("clean", "deep_defense")


@pytest.fixture(autouse=True, scope="module")
def setting():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield


def figures(accuracy, l2, rho_linf=0.1):
    return {"accuracy": accuracy, "l2": l2, "rho_linf": rho_linf, "accuracy_pgd": 0.5}


def trial(accuracy, l2, **settings):
    return {"figures": figures(accuracy, l2), "settings": settings}


REFERENCE = figures(0.98, 1.0)


def test_the_best_trial_that_is_as_accurate_as_the_reference_is_chosen():
    lines = [trial(0.981, 1.5), trial(0.98, 1.6), trial(0.9799, 3.0), {"figures": None}]
    assert search.choose(lines, REFERENCE) is lines[1]
    # None is as accurate: a gain of sqrt(1.21) = 1.1 against one of 1.2 less a point of accuracy.
    lines = [trial(0.9799, 1.21), trial(0.97, 1.44)]
    assert search.choose(lines, REFERENCE) is lines[0]
    assert search.promise(lines[1], REFERENCE) == pytest.approx(1.2 - 1.0)
    assert search.promise({"figures": None}, REFERENCE) == -math.inf


def test_the_gain_is_the_geometric_mean_of_both_norms():
    assert search.gain(figures(0.9, 2.0, 0.8), REFERENCE) == pytest.approx(4.0)


def test_the_figure_of_the_trials_has_those_that_no_other_beats():
    trials = [
        {"figures": {"accuracy": accuracy, "rho_l2": rho}}
        for accuracy, rho in [(0.99, 0.1), (0.98, 0.3), (0.985, 0.2), (0.98, 0.2), (0.97, 0.3)]
    ]
    trials += [{"figures": {"accuracy": 0.94, "rho_l2": 9.0}}, {"figures": None}, trials[0]]
    assert tradeoffs.front(trials, 0.95) == [(0.98, 0.3), (0.985, 0.2), (0.99, 0.1)]


@pytest.mark.parametrize("net", ["mlp", "lenet", "convnet"])
@pytest.mark.parametrize("defense", search.DEFENSES)
def test_every_trial_is_within_its_space_and_none_is_made_twice(net, defense):
    space, lines, first = search.space_of(net, defense), [], search.beginnings(net, defense)
    for number in range(12):
        settings = search.next_settings(first, defense, lines, REFERENCE, space)
        assert settings.keys() == space.keys()
        for name, value in settings.items():
            values, (low, high) = space[name]
            assert value in values if values else low <= value <= high
        assert settings not in [line["settings"] for line in lines]
        search.read_config(net, defense, settings, None)  # The configuration takes them.
        lines.append({"settings": settings, "figures": figures(0.97 + number / 1000, 1.0)})
    parents = [lines[-1]["settings"], lines[-2]["settings"]]
    moved = search.next_settings(first, defense, lines, REFERENCE, space)
    changes = [sum(moved[name] != parent[name] for name in moved) for parent in parents]
    assert min(changes) <= search.NUM_CHANGES
    assert moved == search.next_settings(first, defense, lines, REFERENCE, space), (
        "Resumed, it is the same."
    )


def test_the_search_of_lenet_begins_with_what_was_chosen_for_the_mlp(tmp_path):
    chosen = {"clean": {"settings": {search.RATE: 0.25}}}
    (tmp_path / "chosen_mlp.json").write_text(json.dumps({"defenses": chosen}))
    assert search.beginnings("lenet", "clean", tmp_path) == [{search.RATE: 0.25}]
    with pytest.raises(FileNotFoundError, match="--search, then --choose"):
        search.beginnings("lenet", "clean", tmp_path / "none")


def test_a_line_that_was_cut_off_is_left_out_and_spoils_no_other(tmp_path):
    path = tmp_path / "lines.jsonl"
    search.append_line(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2')
    search.append_line(path, {"a": 3})
    assert search.read_lines(path) == [{"a": 1}, {"a": 3}]
    assert search.read_lines(tmp_path / "none") == []


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search and final runs of two defenses; what was said while they ran."""
    workdir, said = tmp_path_factory.mktemp("reproduce"), []
    held_out = (*TINY, "data.validation_images=60")
    make = lambda: search.Search("mlp", workdir, workdir, None, held_out, robustness_images=20)
    make().run(1, TWO, said.append)
    return workdir, make, said


def test_a_search_goes_on_and_measures_on_held_out_images(searched):
    workdir, make, said = searched
    before = (workdir / "search_mlp.jsonl").read_text()
    again = []
    make().run(1, TWO, again.append)
    assert len(said) == 2 and again == []
    assert (workdir / "search_mlp.jsonl").read_text() == before
    lines = search.read_lines(workdir / "search_mlp.jsonl")
    assert [line["defense"] for line in lines] == ["reference", *TWO]
    for line in lines:
        assert line["train_images"] == 140
        assert line["figures"]["num_examples"] == 60
        assert line["figures"]["robustness_images"] == 20
        assert "the last 60 of 200 training images in place of the test images" in line["data"]
    assert [path.name for path in (workdir / "search/mlp").iterdir()] == ["reference"]


def test_a_run_does_not_depend_on_what_the_nets_file_chose_for_its_own_defense():
    # Or a reference that was trained before the choice could not be used after it.
    searched = {name for space in search.SPACES.values() for name in space}
    values = lambda config: {name: configuration.flatten(config)[name] for name in searched}
    theirs, defaults = values(mnist_mlp.get_config()), values(default.get_config())
    for net in ("mlp", "lenet"):
        assert values(search.read_config(net, "clean", {}, None)) == defaults != theirs
    own = search.read_config("mlp", "clean", {"fine_tuning.num_epochs": 20}, None)
    assert own.fine_tuning.num_epochs == 20


def test_a_reference_that_has_seen_held_out_images_is_refused(searched, tmp_path):
    workdir, _, _ = searched
    source = f"reference.source={workdir / 'search/mlp/reference'}"
    for held_out, limit in ((61, 200), (60, 190)):
        others = (f"data.validation_images={held_out}", f"data.train_limit={limit}")
        config = search.read_config("mlp", "clean", {}, None, *TINY, source, *others)
        run = build.build_run(config, tmp_path)
        with pytest.raises(ConfigurationError, match="has seen images that it is measured on"):
            run.load_reference()
    with pytest.raises(ConfigurationError, match="validation_images is 200; it must be below"):
        config = search.read_config("mlp", "clean", {}, None, *TINY, "data.validation_images=200")
        build.build_run(config, tmp_path)


def test_final_runs_go_on_and_the_page_has_their_figures(searched):
    workdir, _, _ = searched
    with pytest.raises(FileNotFoundError, match="--choose"):
        final.read_choice("lenet", workdir)
    chosen = final.write_choice("mlp", workdir)["defenses"]
    assert list(chosen) == list(TWO)
    subset = workdir / "subset.npz"
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1), dtype=np.uint8)
    np.savez(subset, test_images=images, test_labels=np.arange(7, dtype=np.uint8))
    said = []
    make = lambda: final.Finals("mlp", workdir, workdir, None, TINY, subset, said.append)
    make().run([0])
    lines = final.results_of("mlp", workdir)
    assert [line["defense"] for line in lines] == ["reference", *TWO] and len(said) == 3
    for line in lines:
        assert line["figures"]["num_examples"] == 30
        assert line["figures"]["carlini_wagner_examples"] == 10
        assert line["exact_subset"]["num_examples"] == 7
        assert "in place of the test images" not in line["data"]
    make().run([0])
    assert len(said) == 3, "Nothing is measured twice."
    # Nor where the run directories are gone; what is missing then needs the reference's.
    elsewhere = final.Finals("mlp", workdir / "other", workdir, None, TINY, subset, said.append)
    elsewhere.run([0])
    assert len(said) == 3
    # A line that is lost is measured anew from the run directory, and is the same.
    results = workdir / "results_mlp.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(FileNotFoundError, match="no reference net, though .*--workdir"):
        elsewhere.run([0])
    # It names the machine of the figures, which the report has kept, and this one.
    name = f"{TWO[-1]}-{search.digest(lines[-1]['settings'])}/report.json"
    report = workdir / "final/mlp/seed_0" / name
    report.write_text(json.dumps(json.loads(report.read_text()) | {"device": "a card"}))
    make().run([0])
    again = final.results_of("mlp", workdir)[-1]
    assert again["figures"] == lines[-1]["figures"]
    assert lines[-1]["device"] == search.machine()["device"]
    assert again["device"] == f"a card, since its last start {lines[-1]['device']}"
    assert configuration.load(
        final.directory(workdir, "mlp", 0, "clean", chosen["clean"]["settings"])
    )

    text = page.write_page(workdir).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| deep_defense | 1 |"))
    assert f"{again['figures']['l2']:.3f}" in row and f"{again['figures']['pass']:.4f}" in row
    assert f"l2 >= 1.900 | {again['figures']['l2']:.3f}, **missed**" in text
    assert "- mlp, seeds without a final run: reference [1, 2], clean [1, 2], parseval [0," in text
    assert "- mlp, fewer than 1 trials: parseval (0), " in text
    assert "- lenet: nothing was chosen yet" in text
    assert "](tradeoffs_mlp.png)" in text and (workdir / "tradeoffs_mlp.png").stat().st_size > 1000
    content = json.loads((workdir / "results.json").read_text())["mlp"]
    assert content["final"]["deep_defense"]["l2"]["mean"] == again["figures"]["l2"]


def test_autoattack_measures_every_final_net_once_and_the_page_shows_it(searched, monkeypatch):
    workdir, _, _ = searched
    if not (workdir / "chosen_mlp.json").exists():
        final.write_choice("mlp", workdir)
    final.Finals("mlp", workdir, workdir, None, TINY).run([0])
    asked = []

    def measure(evaluator, state, *, names, name, save_in):
        asked.append((evaluator.autoattack.norm, evaluator.autoattack.epsilon, names, name))
        withstand = len(asked) / 10
        return {"autoattack": [{"robust_accuracy": withstand, "num_examples": 20, "remarks": []}]}

    monkeypatch.setattr(autoattack, "measure_state", measure)
    options = dict(seeds=[0], num_images=20, workdir=workdir, results=workdir, data_dir=None)
    arguments = argparse.Namespace(**options, defenses=search.DEFENSES)
    for _ in range(2):
        for ball in autoattack.BALLS["mlp"]:
            autoattack.attack_nets("mlp", *ball, arguments)
    stages = ["reference", "defended", "defended"]
    assert [each[3] for each in asked] == 2 * stages, "Each net once in each of two balls."
    assert asked[0] == ("l2", 1.5, ("autoattack",), "reference")
    assert asked[3][:2] == ("linf", 0.1)
    arguments.defenses = ["deep_defense"]
    chosen = [key["defense"] for key, _, _ in final.final_nets("mlp", arguments)]
    assert chosen == ["reference", "deep_defense"]
    text = page.write_page(workdir).read_text()
    assert "| deep_defense | 1 | 30.00% | 60.00% |" in text and "first 20 test images" in text
    assert page.autoattack_table(search.read_lines(workdir / "autoattack_mlp.jsonl"), []) == []


def test_the_page_shows_mean_and_range_over_the_seeds_beside_the_papers(tmp_path):
    lines = [
        {"seed": seed, "figures": {"l2": l2}, "published": {"deep_defense": {"l2_deepfool": 1.64}}}
        for seed, l2 in ((0, 1.8), (1, 2.0), (2, 2.2))
    ]
    text = page.main_table({"deep_defense": lines})
    assert "| deep_defense | 3 | 2.000; 1.800 to 2.200 (1.640) |" in text
    assert page.targets("mlp", {"deep_defense": {}}) == []


def test_a_net_without_trials_has_what_the_other_net_on_the_same_data_chose(tmp_path):
    reference = {"defense": "reference", "data": "digits", "figures": REFERENCE, "seconds": 1.0}
    search.append_line(tmp_path / "search_mlp.jsonl", reference)
    search.append_line(tmp_path / "search_lenet.jsonl", reference)
    settings = search.beginnings("mlp", "clean")[2]
    chosen = {d: {"settings": search.beginnings("mlp", d)[2]} for d in search.DEFENSES}
    content = {"net": "mlp", "defenses": chosen}
    (tmp_path / "chosen_mlp.json").write_text(json.dumps(content))
    tried = trial(0.98, 1.5) | {"defense": "deep_defense", "trial": 0}
    search.append_line(tmp_path / "search_lenet.jsonl", tried)
    choice = final.write_choice("lenet", tmp_path)
    assert choice["defenses"]["clean"]["settings"] == settings
    assert choice["defenses"]["deep_defense"]["num_trials"] == 1
    table = page.chosen_table(choice)
    assert "| clean | none: mlp's choice | - | - | - | - | - | learning_rate 0.01," in table
    assert "| deep_defense | 0 | 98.00% | 1.500 |" in table


def test_nets_of_an_earlier_choice_stand_apart_with_their_options():
    def line(seed, l2, rate):
        shared = {"defense": "clean", "settings": {search.RATE: rate}, "published": {}}
        return shared | {"seed": seed, "figures": figures(0.9, l2)}

    now, before = line(0, 5.0, 0.5), [line(0, 1.0, 0.25), line(1, 2.0, 0.25)]
    text, table = page.earlier_table([now, *before], [now])
    assert "chosen before" in text
    assert "| clean with learning_rate 0.25 | 2 | 90.00% | 1.500; 1.000 to 2.000 |" in table
    assert "5.000" not in table and page.earlier_table([now], [now]) == []


def test_options_of_a_net_without_a_search_are_set_by_hand_and_the_page_says_so(tmp_path):
    with pytest.raises(ValueError, match="no trials of nin to choose from: run --search"):
        final.write_choice("nin", tmp_path)
    clean = {"settings": {search.RATE: 0.5}, "trial": None, "figures": None, "num_trials": 0}
    chosen = {"net": "nin", "data": None, "reference": None, "note": "They are guesses."}
    (tmp_path / "chosen_nin.json").write_text(json.dumps(chosen | {"defenses": {"clean": clean}}))
    text = page.write_page(tmp_path).read_text()
    assert "No trials were made. They are guesses." in text
    assert "| clean | none | - | - | - | - | - | learning_rate 0.5 |" in text


def test_without_pixels_the_judges_bounds_are_the_range_of_the_inputs_also_under_jit():
    inputs = jnp.asarray([[-1.5, 2.5], [0.0, 1.0]])
    problem = judges.Problem(lambda x: x, inputs, None, None, None, 0.1, 0.1, 1)
    seen = []
    jax.jit(lambda x: seen.append(judges.box_of(problem)) or x)(inputs)
    assert seen == [(-1.5, 2.5)]


def test_the_judges_limits_are_within_them():
    assert judges.agree("accuracy", 0.85, 0.855) and judges.agree("accuracy", 0.09, 0.085)
    assert not judges.agree("accuracy", 0.85, 0.8551)
    assert judges.agree("l2", 2.0, 2.04) and not judges.agree("l2", 2.0, 2.0401)


def test_the_page_says_why_an_outside_judge_differs_where_its_own_figures_show_it():
    def line(attack, ours, theirs):
        shared = {"defense": "clean", "seed": 0, "figure": "l2", "version": "1", "images": 200}
        agrees = judges.agree("l2", ours, theirs)
        return shared | {"attack": attack, "dd_jax": ours, "foolbox": theirs, "agrees": agrees}

    same = {"same_class": {"dd_jax": 0.9, "foolbox": 0.91, "agrees": True, "share": 0.78}}
    farther = line("C&W", 1.0, 1.05) | same | {"note": "Trained again."}
    lines = [line("DDN", 1.0, 1.0), farther, line("DeepFool", 1.0, 1.019)]
    text, note, table, reason = page.judges_table(lines)
    assert note == "Trained again."
    assert "| clean | 0 | C&W | 200 | l2 | 1.0000 | 1.0500 | +5.00% | **no** |" in table
    assert "78.0% of the images that both attacks move to the same class" in reason
    assert "dd_jax's is 0.9000 and foolbox's 0.9100. On the others foolbox's leads" in reason
    # Theirs is the better attack.
    (said,) = page.reasons([line("C&W", 1.0, 0.9) | same])
    assert "On the others dd_jax's leads to classes that are farther away, in the mean." in said
    # They differ there, too: then the class is not the reason.
    other = {"same_class": same["same_class"] | {"agrees": False}}
    assert page.reasons([line("C&W", 1.0, 1.05), line("C&W", 1.0, 1.05) | other]) == []
    assert page.judges_table([]) == []
    # Of several lines about a net and an attack the one of the most images, of a final net alone.
    finals = [{"seed": 0, "defense": "clean", "settings": {}}]
    few = [each | {"settings": {}} for each in lines]
    more, other = few[0] | {"images": 500}, few[1] | {"settings": {"a": 1}}
    kept = page.of_most_images([more, *few, other], finals)
    assert kept == [few[1], more, few[2]]
    softer = line("DDN", 1.0, 1.1) | {
        "softer": {"dd_jax": 0.9, "foolbox": 0.9, "agrees": True, "by": 5.0}
    }
    assert "divided by 5, which changes no class, dd_jax's is 0.9000" in page.reasons([softer])[0]
    softer["softer"]["agrees"] = False  # Then large logits are not the reason.
    assert not any("divided by" in reason for reason in page.reasons([softer]))
    to_the_end = {"all_steps": {"dd_jax": 0.205, "foolbox": 0.205, "agrees": True}}
    (said,) = page.reasons([line("PGD", 0.185, 0.205) | to_the_end])
    assert "which foolbox's takes, dd_jax's leaves 20.50%, and foolbox's 20.50%." in said


def test_the_judge_compares_sizes_again_where_both_attacks_lead_to_the_same_class(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "foolbox is not asked here")
    # Three affine classes; the nearest other one is class 1, class 2 is farther away.
    logits_fn = lambda x: jnp.stack([jnp.ones(len(x)), x[:, 0], x[:, 1] / 2], axis=1)
    inputs, wanted = jnp.zeros((4, 2)), jnp.zeros(4, int)
    problem = judges.Problem(logits_fn, inputs, wanted, wanted, None, 0.1, 0.1, 1)
    near, far = jnp.asarray([[1.1, 0.0]] * 4), jnp.asarray([[0.0, 2.2]] * 4)
    mixed = near.at[3].set(far[3])
    find = lambda theirs: judges.compared(problem, "l2", lambda _, x: near, lambda _: theirs)
    found = find(mixed)
    assert found["foolbox"] == pytest.approx(1.25 * found["dd_jax"])
    same = found["same_class"]
    assert same["dd_jax"] == same["foolbox"] == pytest.approx(1.1)
    assert same["share"] == 0.75 and same["agrees"] and not found["agrees"]
    assert "same_class" not in find(near * 1.01)  # They agree.
    assert "same_class" not in find(far)  # No image to compare.


@pytest.mark.parametrize(
    ("attack", "agree_to_the_end", "found"),
    [
        ("PGD", True, "all_steps"),
        ("PGD", False, "softer"),
        ("DDN", True, "softer"),
        ("C&W", True, ""),
    ],
)
def test_the_judge_looks_for_a_reason(attack, agree_to_the_end, found, monkeypatch):
    problem = judges.Problem(lambda x: 10 * x, jnp.ones((1, 2)), *[None] * 3, 0.1, 0.1, 1)

    def compared(problem, figure, ours, theirs):
        is_softer = float(problem.logits_fn(jnp.ones(()))) == 2
        agrees = is_softer or agree_to_the_end
        return {"dd_jax": 1.0, "foolbox": 1.0, "agrees": agrees, "success_dd_jax": 1.0}

    monkeypatch.setattr(judges, "compared", compared)
    kept = {"dd_jax": 1.0, "foolbox": 1.0, "agrees": True}
    wanted = {"softer": {"softer": kept | {"by": 5.0}}, "all_steps": {"all_steps": kept}, "": {}}
    assert judges.reason(problem, attack) == wanted[found]


def test_references_have_processes_of_their_own_before_the_defenses():
    first, then = processes.shares(["mlp", "nin"], [0, 2], TWO, search=False)
    assert [name for name, _ in first] == [
        f"{net}-{seed}-reference" for seed in (0, 2) for net in ("mlp", "nin")
    ]
    assert first[1][1] == ("--nets", "nin", "--seeds", "0", "--defenses")
    assert len(then) == 8
    assert then[-1] == (
        "nin-2-deep_defense",
        ("--nets", "nin", "--seeds", "2", "--defenses", "deep_defense"),
    )
    first, then = processes.shares(["mlp"], [0, 2], TWO, search=True)
    assert first == [("mlp-reference", ("--nets", "mlp", "--defenses"))]
    assert [own for _, own in then] == [("--nets", "mlp", "--defenses", name) for name in TWO]


def run_in_processes(tmp_path, monkeypatch, program, waves):
    """run_shares, two at a time, where every process is that program of Python instead."""
    original = processes.subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess,
        "Popen",
        lambda command, **options: original(
            [sys.executable, "-c", program, *command[3:]], **options
        ),
    )
    return processes.run_shares(2, waves, ["--search"], tmp_path)


def test_processes_go_in_waves_and_one_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    program = (
        "import os, sys\n"
        "print(*sys.argv[1:], os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])\n"
        "print(os.environ['JAX_COMPILATION_CACHE_DIR'])\n"
        "print(sorted(os.listdir('LOGS')))\n"
        "sys.exit('b' in sys.argv)".replace("LOGS", str(tmp_path / "logs"))
    )
    waves = [[("first", ("a",))], [("second", ("b",)), ("third", ("c",))]]
    assert run_in_processes(tmp_path, monkeypatch, program, waves) == ["second"]
    said = (tmp_path / "logs/third.log").read_text().splitlines()
    assert said[:2] == ["--search c false", str(tmp_path / "cache")]
    assert "'first.log'" in said[2]
    assert (tmp_path / "logs/first.log").read_text().splitlines()[2] == "['first.log']"
    assert "second ended with 1" in capsys.readouterr().err


def test_processes_are_asked_to_end_and_no_other_is_begun(tmp_path, monkeypatch):
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    waves = [[("first", ())], [("second", ())]]
    before = signal.getsignal(signal.SIGTERM)
    assert run_in_processes(tmp_path, monkeypatch, program, waves) == ["first", "second"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "logs/second.log").read_text()

"""The page of `python -m benchmarks.reproduce`: README.md, results.json and the figures of the search in
benchmarks/reproduction/.

Measured beside published, mean and range over the seeds, the targets and whether they are met, what was
searched and chosen, what outside judges say, time and machine. Everything comes from the lines of results
beside it; nothing is written by hand.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import reproduce_tradeoffs
from benchmarks.reproduce_final import (
    CARLINI_WAGNER_IMAGES,
    JPEG_COPY,
    SEEDS,
    read_choice,
    results_of,
)
from benchmarks.reproduce_search import (
    BEGINS_AS,
    CONFIGS,
    DEFENSES,
    RESULTS,
    ROBUSTNESS_IMAGES,
    Figures,
    Line,
    gain,
    read_lines,
)
from dd_jax.results.report import REFERENCE

ORDER = (REFERENCE, *DEFENSES)


class Column(NamedTuple):
    """A figure of the table: its heading, its name, its form, and the paper's name for it."""

    heading: str
    name: str
    form: str
    published: str = ""


COLUMNS = (
    Column("accuracy", "accuracy", "{:.2%}"),
    Column("rho_2", "rho_l2", "{:.4f}"),
    Column("l_2 DeepFool", "l2", "{:.3f}", "l2_deepfool"),
    Column("rho_inf FGS", "rho_linf", "{:.4f}", "rho_linf_fgsm"),
    Column("eps. 50 %", "epsilon_half", "{:.4f}"),
    Column("l_2 C&W", "l2_carlini_wagner", "{:.3f}", "l2_carlini_wagner"),
    Column("acc. PGD", "accuracy_pgd", "{:.2%}", "accuracy_pgd"),
    Column("PASS", "pass", "{:.4f}", "similarity_pass"),
)
SUCCESSES = ("deepfool_success", "fgsm_success", "carlini_wagner_success")
# Of the issue that asked for this page; the mean over the seeds is held against them.
TARGETS = {
    "mlp": {"l2": 1.90, "rho_linf": 0.153, "l2_carlini_wagner": 1.58, "accuracy_pgd": 0.45},
    "lenet": {"l2": 2.35, "rho_linf": 0.236, "l2_carlini_wagner": 1.84, "accuracy_pgd": 0.75},
}
TARGET_OF = ("deep_defense", "deep_defense_fgsm")


def write_page(results: pathlib.Path = RESULTS) -> pathlib.Path:
    """Writes README.md, results.json and tradeoffs_NET.png from whatever lines there are; returns the
    page's path.
    """
    parts, content = [INTRODUCTION], {}
    for net in CONFIGS:
        if (results / f"chosen_{net}.json").exists():
            section, content[net] = net_section(net, results)
            parts.append(section)
    parts.append(missing(results))
    path = results / "README.md"
    path.write_text("\n\n".join(parts).rstrip() + "\n")
    (results / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    return path


def net_section(net: str, results: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """All about one net, as text and as what results.json holds of it."""
    choice, lines = read_choice(net, results), results_of(net, results)
    by_method = {m: of for m in ORDER if (of := [x for x in lines if x["defense"] == m])}
    parts = [f"## {net}"]
    summary = {method: summarized(of) for method, of in by_method.items()}
    if by_method:
        parts += [conditions(lines), main_table(by_method)]
        parts += successes(by_method) + targets(net, summary) + exact_table(by_method)
        parts += earlier_table(read_lines(results / f"results_{net}.jsonl"), lines)
        parts += autoattack_table(read_lines(results / f"autoattack_{net}.jsonl"), lines)
        parts.append(times(by_method))
    trials = read_lines(results / f"search_{net}.jsonl")
    parts += [searched(net, choice, trials), chosen_table(choice)]
    parts += tradeoffs(net, results)
    judged = of_most_images(read_lines(results / f"judges_{net}.jsonl"), lines)
    parts += judges_table(judged)
    return "\n\n".join(parts), {"chosen": choice, "final": summary, "judges": judged}


def missing(results: pathlib.Path) -> str:
    """What was not run yet, net by net."""
    said = []
    for net in CONFIGS:
        if not (results / f"chosen_{net}.json").exists():
            said.append(f"- {net}: nothing was chosen yet")
            continue
        lines, choice = results_of(net, results), read_choice(net, results)["defenses"]
        counts = {method: choice.get(method, {}).get("num_trials", 0) for method in DEFENSES}
        most = max(counts.values())
        fewer = [f"{method} ({count})" for method, count in counts.items() if count < most]
        if fewer:
            said.append(f"- {net}, fewer than {most} trials: {', '.join(fewer)}")
        done = {(line["defense"], line["seed"]) for line in lines}
        open_runs = [
            f"{method} {seeds}"
            for method in ORDER
            if (seeds := [seed for seed in SEEDS if (method, seed) not in done])
        ]
        if open_runs:
            said.append(f"- {net}, seeds without a final run: {', '.join(open_runs)}")
    return "\n".join(["## Not run yet\n", *(said or ["Nothing."])])


def summarized(lines: Sequence[Line], of: str = "figures") -> dict[str, Any]:
    """Mean, least and greatest of every figure over the seeds."""
    figures = [line[of] for line in lines]
    numbers = [k for k, v in figures[0].items() if isinstance(v, (int, float))]
    values = {k: [each[k] for each in figures if each.get(k) is not None] for k in numbers}
    return {"seeds": [line["seed"] for line in lines]} | {
        k: {"mean": sum(v) / len(v), "least": min(v), "greatest": max(v)}
        for k, v in values.items()
        if v
    }


def main_table(by_method: Mapping[str, Sequence[Line]], of: str = "figures") -> str:
    """Measured beside published."""
    summaries = {method: summarized(lines, of) for method, lines in by_method.items()}
    columns = [c for c in COLUMNS if any(c.name in each for each in summaries.values())]
    rows = [["", "seeds", *(column.heading for column in columns)]]
    for method, summary in summaries.items():
        published = by_method[method][0]["published"].get(method, {}) if of == "figures" else {}
        cells = [cell(summary.get(c.name), c.form, published.get(c.published)) for c in columns]
        rows.append([method, str(len(summary["seeds"])), *cells])
    return table(rows)


def cell(summary: Mapping[str, float] | None, form: str, published: float | None = None) -> str:
    """Mean, least to greatest, and the paper's figure in brackets."""
    if summary is None:
        return "-"
    text = form.format(summary["mean"])
    if summary["greatest"] > summary["least"]:
        text += f"; {form.format(summary['least'])} to {form.format(summary['greatest'])}"
    return text if published is None else f"{text} ({form.format(published)})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first row is its head."""
    first, *others = rows
    lines = [first, ["---", *("---:" for _ in first[1:])], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(lines: Sequence[Line]) -> str:
    """Data, input space, machine and versions of the final runs."""
    first = lines[0]
    several = lambda name: " and ".join(sorted({str(line[name]) or "none" for line in lines}))
    copy = f" The data is {JPEG_COPY}, not the original." if "cifar10" in first["data"] else ""
    is_default = lambda line: line.get("precision") == "JAX's default"
    rounds = any("NVIDIA" in line["device"] and is_default(line) for line in lines)
    precision = (
        " Trained in JAX's default precision, which on NVIDIA cards rounds the factors of products to "
        "10 bits; measured in full float32."
    ) * rounds
    return (
        f"{first['data']}; trained on {first['num_train']} images, measured on all "
        f"{first['figures']['num_examples']} test images (C&W: the first "
        f"{first['figures'].get('carlini_wagner_examples', CARLINI_WAGNER_IMAGES)}). Inputs: "
        f"{first['input_space']}; sizes in units of a pixel's range of 1.{copy} Mean; least to "
        f"greatest over the seeds; in brackets: the paper's. {several('device')}, jax "
        f"{several('jax')}, Python {several('python')}, XLA_FLAGS {several('xla_flags')}."
        f"{precision}"
    )


def successes(by_method: Mapping[str, Sequence[Line]]) -> list[str]:
    """A sentence on how often the attacks fooled the nets, verified by a forward pass of its own."""
    least = {
        name: min(line["figures"].get(name, 1.0) for of in by_method.values() for line in of)
        for name in SUCCESSES
    }
    said = ", ".join(f"{name.partition('_s')[0]} {value:.2%}" for name, value in least.items())
    return [f"Least success of any net, by the verifying forward pass: {said}."]


def targets(net: str, summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether the targets are met, by the mean over the seeds."""
    if net not in TARGETS or REFERENCE not in summary:
        return []
    rows = [["target", *(name for name in TARGET_OF if name in summary)]]
    floor = summary[REFERENCE]["accuracy"]["mean"]
    wanted = {"accuracy": floor} | TARGETS[net]
    forms = {column.name: column.form for column in COLUMNS}
    for name, target in wanted.items():
        cells = [f"{name} >= {forms[name].format(target)}"]
        for method in rows[0][1:]:
            found = summary[method].get(name)
            if found is None:
                cells.append("not measured")
            else:
                met = "met" if found["mean"] >= target else "**missed**"
                cells.append(f"{forms[name].format(found['mean'])}, {met}")
        rows.append(cells)
    return ["Targets, held against the mean over the seeds:", table(rows)] * (len(rows[0]) > 1)


def exact_table(by_method: Mapping[str, Sequence[Line]]) -> list[str]:
    """The same nets on the exact subset of CIFAR-10's test images, where they were measured on it."""
    with_it = {
        method: exact
        for method, lines in by_method.items()
        if (exact := [line for line in lines if "exact_subset" in line])
    }
    if not with_it:
        return []
    number = next(iter(with_it.values()))[0]["exact_subset"]["num_examples"]
    text = f"The same nets on the first {number} CIFAR-10 test images, bit-exact:"
    return [text, main_table(with_it, "exact_subset")]


def earlier_table(known: Sequence[Line], finals: Sequence[Line]) -> list[str]:
    """Nets with options that an earlier choice gave, each with these."""
    kinds: dict[tuple[str, str], list[Line]] = {}
    for line in known:
        if line not in finals:
            options = ", ".join(f"{k.partition('.')[2]} {v}" for k, v in line["settings"].items())
            kinds.setdefault((line["defense"], options), []).append(line)
    if not kinds:
        return []
    names = [f"{method} with {options}" for method, options in kinds]
    text = "Nets with options that were chosen before; they took no part in the choice:"
    return [text, main_table(dict(zip(names, kinds.values(), strict=True)))]


def belonging(measured: Sequence[Line], finals: Sequence[Line]) -> list[Line]:
    """The lines about nets that are among the final ones: none about those of an earlier choice."""
    nets = [(line["seed"], line["defense"], line["settings"]) for line in finals]
    return [x for x in measured if (x["seed"], x["defense"], x["settings"]) in nets]


def autoattack_table(measured: Sequence[Line], finals: Sequence[Line]) -> list[str]:
    """Robust accuracy of the final nets, by ball; of nets that were chosen since then, nothing."""
    lines = belonging(measured, finals)
    if not lines:
        return []
    balls = sorted({(line["norm"], line["epsilon"]) for line in lines})
    rows = [["", "seeds", *(f"{norm} {epsilon:.4g}" for norm, epsilon in balls)]]
    for method in ORDER:
        found = [line for line in lines if line["defense"] == method]
        if found:
            cells = []
            for ball in balls:
                inside = [x | {"figures": x} for x in found if (x["norm"], x["epsilon"]) == ball]
                summary = summarized(inside)["robust_accuracy"] if inside else None
                cells.append(cell(summary, "{:.2%}"))
            rows.append([method, str(len({line["seed"] for line in found})), *cells])
    text = (
        'Robust accuracy under AutoAttack (version "standard"), on the first '
        f"{lines[0]['num_examples']} test images, within the range of pixels, epsilon in units of "
        "it; `python -m benchmarks.reproduce_autoattack`:"
    )
    remarks = [
        f"- {x['defense']}, seed {x['seed']}, {x['norm']}: {remark}"
        for x in lines
        for remark in x["remarks"]
    ]
    return [text, table(rows), *["\n".join(remarks)][: len(remarks)]]


def times(by_method: Mapping[str, Sequence[Line]]) -> str:
    """Minutes of training and of training with all measurements, the mean over the seeds."""
    minutes: Callable[[Sequence[Line], str, str], float] = lambda lines, part, kind: (
        sum(line[part][kind] for line in lines) / len(lines) / 60
    )
    said = [
        f"{method} {minutes(of, 'training', 'seconds'):.1f} ({minutes(of, 'all', 'seconds'):.1f}; "
        f"{minutes(of, 'all', 'processor_seconds'):.1f} of processor time)"
        for method, of in by_method.items()
    ]
    notes = dict.fromkeys(
        f" Of {method}, {line['note']}."
        for method, of in by_method.items()
        for line in of
        if "note" in line
    )
    return (
        "Minutes of training (with all measurements) per net, of the last start of a run, on a "
        f"machine with other work beside: {', '.join(said)}." + "".join(notes)
    )


def searched(net: str, choice: Mapping[str, Any], trials: Sequence[Line]) -> str:
    """What was searched, how often, and on what."""
    if choice["reference"] is None:
        return f"### Options of {net}\n\nNo trials were made. {choice['note']}"
    counts = {method: of["num_trials"] for method, of in choice["defenses"].items()}
    hours = sum(line["seconds"] for line in trials) / 3600
    said = ", ".join(f"{method} {count}" for method, count in counts.items())
    reference = choice["reference"]
    devices = " and ".join(sorted({line["device"] for line in trials if "device" in line}))
    return (
        f"### Search of {net}\n\n{choice['data']}. Trials: {said}; {hours:.1f} hours"
        f"{f' ({devices})' if devices else ''}. The accuracy is "
        f"that on all held-out images, robustness that on the first {ROBUSTNESS_IMAGES}. The "
        f"reference there: {reference['accuracy']:.2%}, l_2 {reference['l2']:.3f}, rho_inf "
        f"{reference['rho_linf']:.4f}. `search_{net}.jsonl` holds all trials, "
        "`benchmarks/reproduce_search.py` says what they choose from."
    )


def tradeoffs(net: str, results: pathlib.Path) -> list[str]:
    """The figure of the trials, drawn anew; nothing where there were none."""
    if (figure := reproduce_tradeoffs.draw(net, results)) is None:
        return []
    return [
        f"![Accuracy and rho_2 of the trials]({figure.name})\n\nThe trials of each defense that no "
        "other one of its own beats in both, on held-out images, down to "
        f"{100 * reproduce_tradeoffs.SHORTFALL:.0f} points of accuracy below the reference."
    ]


def chosen_table(choice: Mapping[str, Any]) -> str:
    """What was chosen, with its held-out figures."""
    columns = [c for c in COLUMNS if c.name in ("accuracy", "l2", "rho_linf", "accuracy_pgd")]
    head = ["chosen", "trial", *(c.heading for c in columns), "gain", "options"]
    rows, reference = [head], choice["reference"]
    for method, chosen in choice["defenses"].items():
        figures: Figures | None = chosen["figures"]
        options = ", ".join(
            f"{name.partition('.')[2]} {value}" for name, value in chosen["settings"].items()
        )
        if figures is None:
            of = BEGINS_AS.get(choice["net"])
            begins = f"none: {of}'s choice" if of else "none"
            rows.append([method, begins, *("-" for _ in columns), "-", options])
            continue
        below = " (below the reference's)" * (figures["accuracy"] < reference["accuracy"])
        cells = [c.form.format(figures[c.name]) for c in columns]
        cells[0] += below
        gained = f"{gain(figures, reference):.3f}"
        rows.append([method, str(chosen["trial"]), *cells, gained, options])
    return table(rows)


def of_most_images(measured: Sequence[Line], finals: Sequence[Line]) -> list[Line]:
    """Of the lines about each final net and attack, the one of the most images; in the order of the
    defenses.
    """
    best: dict[Any, Line] = {}
    for line in belonging(measured, finals):
        name = (ORDER.index(line["defense"]), line["seed"], line["attack"])
        if name not in best or line["images"] >= best[name]["images"]:
            best[name] = line
    return [best[name] for name in sorted(best)]


def judges_table(lines: Sequence[Line]) -> list[str]:
    """foolbox beside dd_jax on the exported weights."""
    if not lines:
        return []
    first = lines[0]
    head = ["net", "seed", "attack", "images", "figure", "dd_jax", "foolbox", "difference"]
    head.append("within")
    rows = [head]
    for line in lines:
        ours, theirs = line["dd_jax"], line["foolbox"]
        is_size = line["figure"] == "l2"
        difference = theirs / ours - 1 if is_size else theirs - ours
        form = "{:.4f}" if is_size else "{:.2%}"
        cells = [line["defense"], str(line["seed"]), line["attack"], str(line["images"])]
        cells.append(line["figure"])
        cells += [form.format(ours), form.format(theirs), f"{difference:+.2%}"]
        rows.append([*cells, "yes" if line["agrees"] else "**no**"])
    text = (
        f"### foolbox's verdict\n\nfoolbox {first['version']} through its JAXModel, on the exported "
        "weights; `python -m benchmarks.reproduce_judges`. Asked for: sizes within 2 %, accuracies "
        "within 0.5 points."
    )
    notes = sorted({line["note"] for line in lines if "note" in line})
    return [text, *notes, table(rows), *reasons(lines)]


def reasons(lines: Sequence[Line]) -> list[str]:
    """Why figures differ, where the lines show it: they equal each other when PGD takes all its steps,
    on softer logits, or where both attacks lead to the same class.
    """
    said = []
    for line in lines:
        about = f"{line['attack']} on {line['defense']}, seed {line['seed']}"
        softer, to_the_end = line.get("softer"), line.get("all_steps")
        same_class = line.get("same_class")
        if to_the_end:
            said.append(
                f"{about}: with all its steps, which "
                f"foolbox's takes, dd_jax's leaves {to_the_end['dd_jax']:.2%}, and foolbox's "
                f"{to_the_end['foolbox']:.2%}. The evaluation's stops at the first iterate that fools."
            )
        if softer and softer["agrees"]:
            said.append(
                f"{about}: with the logits divided by "
                f"{softer['by']:g}, which changes no class, dd_jax's is {softer['dd_jax']:.4f} and "
                f"foolbox's {softer['foolbox']:.4f}: this net's logits are so large that the "
                "gradient of cross-entropy vanishes in float32."
            )
        if same_class and same_class["agrees"] and not (softer and softer["agrees"]):
            farther = "foolbox's" if line["foolbox"] > line["dd_jax"] else "dd_jax's"
            said.append(
                f"{about}: on the "
                f"{same_class['share']:.1%} of the images that both attacks move to the same class, "
                f"dd_jax's is {same_class['dd_jax']:.4f} and foolbox's {same_class['foolbox']:.4f}. On "
                f"the others {farther} leads to classes that are farther away, in the mean."
            )
    return said


INTRODUCTION = """\
# Table 2 of the paper, measured

Written by `python -m benchmarks.reproduce --page` from the lines of results in this directory.

    python -m benchmarks.reproduce --search --nets mlp lenet convnet --data_dir DIR --trials 12
    python -m benchmarks.reproduce --choose --nets mlp lenet convnet
    python -m benchmarks.reproduce --nets mlp lenet convnet nin --seeds 0 1 2 --data_dir DIR [--exact_subset FILE]
    python -m benchmarks.reproduce_judges --nets mlp lenet convnet --seeds 0 1 2 --data_dir DIR
    python -m benchmarks.reproduce_autoattack --nets mlp lenet --seeds 0 --data_dir DIR

Each command goes on where it was stopped. Options were chosen on held-out training images, NIN's by hand;
the last section names the defenses that had fewer trials, and the runs that were not made. Test images were
seen by the final runs alone.
Among trials whose accuracy is not below the reference's, the one of the greatest gain was chosen: the
geometric mean of l_2 (DeepFool) and rho_inf (FGS), relative to the reference's. Where there is none, a point
of accuracy below the reference's counts as much as a gain of 1."""

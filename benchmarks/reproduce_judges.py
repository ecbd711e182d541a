"""Outside judges of the final nets: foolbox's DeepFool, C&W, DDN and PGD on the exported weights.

    python -m benchmarks.reproduce_judges --nets mlp lenet --seeds 0 1 2 --data_dir DIR [--num_images 500]

Each net of benchmarks/reproduction/results_NET.jsonl whose run directory is in --workdir is exported
(WEIGHTS of the run directory: parameters by name, and the test inputs are made anew), read back, and given
to foolbox as a JAXModel, and to dd_jax. Both attack the same first --num_images test images away from the
predicted class, PGD away from the label. What fooled is asked of the net in a plain forward pass. Sizes are
means over the images that both fool. Lines go to judges_NET.jsonl, those that are there are not measured
again; the page shows them: ours and theirs within 2 % in size and 0.5 points in accuracy, or not. Where
PGD's differ, ours takes all its steps, as foolbox's does, instead of stopping at the first iterate that
fools. Where these or DDN's differ, it runs again on the logits divided by SOFTER, which leaves the classes
as they are: in float32 the gradient of cross-entropy vanishes where one logit is far ahead. Where other
sizes differ, they are compared again on the images that both attacks move to the same class. --defenses
takes some alone, and the references.

foolbox is no dependency of dd_jax: `pip install foolbox` (3.3.4 was used). Its bounds are two numbers. For
C&W and DDN, whose perturbed images stay within the range of pixels, it therefore gets images in [0, 1] and
subtracts the mean image within the net; DeepFool and PGD have no bounds in the paper and get very wide ones.
"""

import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dd_jax import xla  # noqa: E402

FLAGS_ADDED = xla.set_flags()  # Before JAX starts, as train.py does.

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import traverse_util  # noqa: E402

from benchmarks import reproduce_final as final  # noqa: E402
from benchmarks import reproduce_page as page  # noqa: E402
from benchmarks import reproduce_search as search  # noqa: E402
from dd_jax import data, deepfool, models  # noqa: E402
from dd_jax.attacks import carlini_wagner_l2, ddn, pgd  # noqa: E402
from dd_jax.experiment import build, command_line  # noqa: E402
from dd_jax.experiment.build import Run  # noqa: E402
from dd_jax.experiment.configuration import ConfigurationError  # noqa: E402
from dd_jax.experiment.measuring import variables_of  # noqa: E402

try:
    import foolbox
except ImportError:
    foolbox = None

WEIGHTS = "weights.npz"
WIDE = 1e3  # Of bounds that bind nothing.
NUM_IMAGES = 500
SIZE, ACCURACY = 0.02, 0.005  # What the two libraries may differ by.
BY_CROSS_ENTROPY, SOFTER = ("DDN", "PGD"), 5.0
REASON_KEPT = ("dd_jax", "foolbox", "agrees")
CLASSES, DEEPFOOL_STEPS, DDN_STEPS = 10, 50, 100
CARLINI_WAGNER_STEPS, CARLINI_WAGNER_RUNS = 200, 5  # Ours.
# foolbox's starts far from the boundary and does not scale its steps: it needs more.
THEIR_STEPS, THEIR_RUNS, THEIR_STEP_SIZE, THEIR_CONSTANT = 300, 7, 0.02, 1e-1


class Problem(NamedTuple):
    """A net on images. logits_fn takes inputs of the net; shift: images are inputs + shift, and lie
    within [0, 1] (None where the inputs have no such box).
    """

    logits_fn: Callable[[jax.Array], jax.Array]
    inputs: jax.Array
    labels: jax.Array
    predicted: jax.Array
    shift: jax.Array | None
    pgd_epsilon: float
    pgd_step_size: float
    pgd_num_steps: int


def main() -> None:
    parser = final.make_parser(__doc__, final.SEEDS)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--num_images", type=command_line.positive, default=NUM_IMAGES)
    arguments = parser.parse_args()
    if foolbox is None:
        raise ConfigurationError(
            "foolbox is not installed, and dd_jax does not bring it; pip install foolbox."
        )
    for net in arguments.nets:
        judge_net(net, arguments)
    command_line.say(f"written to {page.write_page(arguments.results)}")


def judge_net(net: str, arguments: Any) -> None:
    """All final nets of that name, by all attacks that are missing."""
    path, first = arguments.results / f"judges_{net}.jsonl", None
    for net_key, where, stage in final.final_nets(net, arguments):
        key = net_key | {"images": arguments.num_images}
        known = [each["attack"] for each in search.read_lines(path) if key.items() <= each.items()]
        missing = [name for name in arguments.attacks if name not in known]
        if not missing:
            continue
        run = final.opened(first, where, arguments.data_dir)
        first = first or run
        problem = make_problem(run, exported(run, stage), arguments.num_images)
        for name in missing:
            found = key | {"attack": name} | compared(problem, *ATTACKS[name])
            found |= {} if found["agrees"] else reason(problem, name)
            search.append_line(path, found)
            command_line.say(
                f"{net} {key['seed']} {key['defense']} {name}: {found['dd_jax']:.4f}, foolbox "
                f"{found['foolbox']:.4f}"
            )


def exported(run: Run, stage: str) -> pathlib.Path:
    """The weights of a stage's net as an .npz file in the run directory: {"layer/kernel": array}."""
    path = run.workdir / WEIGHTS
    params = variables_of(build.restore_state(run, stage))["params"]
    np.savez(path, **traverse_util.flatten_dict(jax.device_get(params), sep="/"))
    return path


def make_problem(run: Run, weights: pathlib.Path, num_images: int) -> Problem:
    """The net of exported weights on the first test images."""
    with np.load(weights) as arrays:
        params = traverse_util.unflatten_dict(dict(arrays), sep="/")
    net = models.create(run.facts.model, num_classes=run.feed.num_classes)
    logits_fn = jax.jit(lambda x: net.apply({"params": params}, x))
    inputs = jnp.asarray(run.feed.test_inputs[:num_images])
    labels = jnp.asarray(run.feed.data.test_labels[:num_images])
    box = data.bounds(run.preprocessing)
    # The lower bound is what black becomes: minus the mean image.
    of_one = lambda bound: np.broadcast_to(bound, (1, *inputs.shape[1:]))[0]
    shift = None if box is None else -jnp.asarray(of_one(box[0]))
    settings = run.evaluator.settings
    names = ("pgd_epsilon", "pgd_step_size", "pgd_num_steps")
    attack = {name: getattr(settings, name) for name in names}
    return Problem(logits_fn, inputs, labels, logits_fn(inputs).argmax(axis=1), shift, **attack)


def reason(problem: Problem, name: str) -> dict[str, Any]:
    """The same attack of both under other circumstances, to see why they differ; may be empty."""
    kept = lambda found: {each: found[each] for each in REASON_KEPT}
    if name == "PGD":
        to_the_end = compared(problem, "accuracy", partial(our_pgd, early_stop=False), their_pgd)
        if to_the_end["agrees"]:
            return {"all_steps": kept(to_the_end)}
    if name in BY_CROSS_ENTROPY:
        return {"softer": kept(compared(softened(problem), *ATTACKS[name])) | {"by": SOFTER}}
    return {}


def softened(problem: Problem) -> Problem:
    """The same net with its logits divided by SOFTER."""
    return problem._replace(logits_fn=lambda x: problem.logits_fn(x) / SOFTER)


def compared(problem: Problem, figure: str, ours: Callable, theirs: Callable) -> dict[str, Any]:
    """One attack of both libraries: the mean size where both fool, or the accuracy that is left. Sizes
    that differ come with "same_class": those where both lead to the same class, and their share.
    """
    logits_fn, inputs = problem.logits_fn, problem.inputs
    wanted = problem.labels if figure == "accuracy" else problem.predicted
    found = {"dd_jax": jax.jit(partial(ours, problem))(inputs), "foolbox": theirs(problem)}
    classes = {name: np.asarray(logits_fn(inputs + each).argmax(1)) for name, each in found.items()}
    fooled = {name: each != np.asarray(wanted) for name, each in classes.items()}
    both = np.all(list(fooled.values()), axis=0)
    same_class = both & (classes["dd_jax"] == classes["foolbox"])
    sizes = {
        name: np.linalg.norm(np.asarray(each, np.float64).reshape(len(each), -1), axis=1)
        for name, each in found.items()
    }
    mean_over = lambda images: {name: float(each[images].mean()) for name, each in sizes.items()}
    if figure == "accuracy":
        figures = {name: float(1 - each.mean()) for name, each in fooled.items()}
    else:
        figures = mean_over(both)
    success = {f"success_{name}": float(each.mean()) for name, each in fooled.items()}
    agrees = agree(figure, **figures)
    more = {"figure": figure, "agrees": agrees, "version": importlib.metadata.version("foolbox")}
    if figure != "accuracy" and not agrees and same_class.any():
        there = mean_over(same_class)
        there |= {"agrees": agree(figure, **there), "share": float(same_class.sum() / both.sum())}
        more["same_class"] = there
    return figures | success | more


def agree(figure: str, dd_jax: float, foolbox: float) -> bool:
    """Whether two figures are within what is asked for; one image of 200 is 0.5 points, not more."""
    is_accuracy = figure == "accuracy"
    difference = abs(dd_jax - foolbox) if is_accuracy else abs(foolbox / dd_jax - 1)
    return round(difference, 9) <= (ACCURACY if is_accuracy else SIZE)


def their_perturbation(
    attack: Any, problem: Problem, labels: jax.Array, *, boxed: bool
) -> jax.Array:
    """foolbox's perturbation: within the range of pixels, or nearly without bounds."""
    shift = problem.shift if boxed else jnp.zeros(())
    if shift is None:  # No box of pixels.
        shift, bounds = jnp.zeros(()), range_of(problem)
    else:
        bounds = (0.0, 1.0) if boxed else (-WIDE, WIDE)
    model = foolbox.JAXModel(lambda x: problem.logits_fn(x - shift), bounds=bounds)
    images = problem.inputs + shift
    images = jnp.clip(images, *bounds)  # The sum rounds.
    criterion = foolbox.criteria.Misclassification(labels)
    return attack.run(model, images, criterion) - images


def box_of(problem: Problem) -> tuple[Any, Any]:
    """The bounds of inputs for C&W and DDN."""
    if problem.shift is None:
        return range_of(problem)
    return -problem.shift, 1.0 - problem.shift


def range_of(problem: Problem) -> tuple[float, float]:
    """The range of all inputs, which bounds the attacks where there are no pixels, as in the
    evaluation.
    """
    inputs = np.asarray(problem.inputs)  # Numbers, also while JAX traces.
    return float(inputs.min()), float(inputs.max())


def our_deepfool(problem: Problem, inputs: jax.Array) -> jax.Array:
    return deepfool(problem.logits_fn, inputs, num_steps=DEEPFOOL_STEPS).perturbation


def their_deepfool(problem: Problem) -> jax.Array:
    attack = foolbox.attacks.L2DeepFoolAttack(steps=DEEPFOOL_STEPS, candidates=CLASSES)
    return their_perturbation(attack, problem, problem.predicted, boxed=False)


def our_carlini_wagner(problem: Problem, inputs: jax.Array) -> jax.Array:
    options = dict(num_steps=CARLINI_WAGNER_STEPS, num_binary_search_steps=CARLINI_WAGNER_RUNS)
    attack = partial(carlini_wagner_l2, bounds=box_of(problem), **options)
    return attack(problem.logits_fn, inputs).perturbation


def their_carlini_wagner(problem: Problem) -> jax.Array:
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=THEIR_RUNS,
        steps=THEIR_STEPS,
        stepsize=THEIR_STEP_SIZE,
        initial_const=THEIR_CONSTANT,
    )
    return their_perturbation(attack, problem, problem.predicted, boxed=True)


def our_ddn(problem: Problem, inputs: jax.Array) -> jax.Array:
    attack = partial(ddn, num_steps=DDN_STEPS, bounds=box_of(problem))
    return attack(problem.logits_fn, inputs).perturbation


def their_ddn(problem: Problem) -> jax.Array:
    attack = foolbox.attacks.DDNAttack(steps=DDN_STEPS)
    return their_perturbation(attack, problem, problem.predicted, boxed=True)


def our_pgd(problem: Problem, inputs: jax.Array, *, early_stop: bool = True) -> jax.Array:
    options: dict[str, Any] = dict(epsilon=problem.pgd_epsilon, step_size=problem.pgd_step_size)
    options |= dict(num_steps=problem.pgd_num_steps, early_stop=early_stop)
    return pgd(problem.logits_fn, inputs, problem.labels, norm="linf", **options).perturbation


def their_pgd(problem: Problem) -> jax.Array:
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(
        abs_stepsize=problem.pgd_step_size, steps=problem.pgd_num_steps, random_start=False
    )
    attack = _AtEpsilon(attack, problem.pgd_epsilon)
    return their_perturbation(attack, problem, problem.labels, boxed=False)


class _AtEpsilon(NamedTuple):
    """A foolbox attack of fixed size, to be run like one that seeks the smallest."""

    attack: Any
    epsilon: float

    def run(self, model: Any, images: jax.Array, criterion: Any) -> jax.Array:
        return self.attack.run(model, images, criterion, epsilon=self.epsilon)


ATTACKS: Mapping[str, tuple[str, Callable, Callable]] = {
    "DeepFool": ("l2", our_deepfool, their_deepfool),
    "DDN": ("l2", our_ddn, their_ddn),
    "C&W": ("l2", our_carlini_wagner, their_carlini_wagner),
    "PGD": ("accuracy", our_pgd, their_pgd),
}


if __name__ == "__main__":
    command_line.run(main, FLAGS_ADDED.sentence)

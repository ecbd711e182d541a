"""From a configuration to plans: stages of training, the evaluator, and what is said of a run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from dd_jax import data, defenses, models, parallel, training
from dd_jax.data import Preprocessing
from dd_jax.evaluation import Evaluator, Settings
from dd_jax.evaluation.autoattack_programs import Setting
from dd_jax.experiment.configuration import (
    ADDED,
    CLASS_LIMITS,
    NOT_PART_OF_THE_RUN,
    ConfigurationError,
    flatten,
)
from dd_jax.experiment.inputs import Feed, preprocessing_name
from dd_jax.experiment.measuring import measure_state
from dd_jax.models.data_dependent_init import centered
from dd_jax.results import published
from dd_jax.results.report import DEFENDED, REFERENCE
from dd_jax.training import TrainState
from dd_jax.training.loop import StagePlan

SECTIONS = {REFERENCE: "reference", DEFENDED: "fine_tuning"}
INPUT_UNITS = {"contrast_whiten": "of whitened inputs", "torchvision": "of normalized inputs"}
NO_MATTER_TO_FIGURES = (
    *NOT_PART_OF_THE_RUN,
    "data.flip",
    "data.crop_padding",
    "evaluation.epoch_examples",
    # A report keeps AutoAttack's results side by side, each with these.
    "evaluation.autoattack_norm",
    "evaluation.epsilon",
    "evaluation.autoattack_version",
)


class Facts(NamedTuple):
    """What reports and comparisons say of a run: plain values, and no configuration.

    method: the defense's name. strength: the value of the option that Figure 6 varies, None where
    the method has none. input_unit: of epsilon, for plots. published: the paper's figures by net.
    config: the resolved configuration as a record, {"section.field": value}.
    """

    data: str
    model: str
    method: str
    seed: int
    input_space: str
    input_unit: str
    strength: float | None
    has_random_reference: bool
    published: dict[str, dict[str, Any]]
    config: dict[str, Any]


def make_facts(config: ConfigDict, feed: Feed, preprocessing: Preprocessing) -> Facts:
    """The facts of a run with this configuration."""
    method = config.defense.name
    swept = defenses.DEFENSES[method].swept
    found = {name: paper_row(config, name) for name in (REFERENCE, *defenses.DEFENSES)}
    return Facts(
        data=feed.description,
        model=config.model.name,
        method=method,
        seed=config.seed,
        input_space=preprocessing.description,
        input_unit=INPUT_UNITS.get(preprocessing.name, "pixel range = 1"),
        strength=float(config.defense[swept]) if swept else None,
        has_random_reference=not (config.reference.source or config.reference.num_epochs),
        published={name: row._asdict() for name, row in found.items() if row is not None},
        config=flatten(config),
    )


def paper_row(config: ConfigDict, method: str) -> published.Figures | None:
    """The paper's figures for a method, where this configuration measures what the paper does."""
    space, epsilon = preprocessing_name(config), config.evaluation.pgd_epsilon
    names = config.data.name, config.model.name, method
    return published.lookup(*names, input_space=space, pgd_epsilon=epsilon)


def how_measured(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a flat configuration the fields on which a net's figures depend, its weights apart.

    An older configuration lacks some of them; it counts as if it had their values in ADDED.
    """
    sections = ("data.", "model.", "evaluation.")
    return {
        name: value
        for name, value in (ADDED | dict(fields)).items()
        if (name.startswith(sections) and name not in NO_MATTER_TO_FIGURES)
        or name == "defense.num_candidates"
    }


def make_evaluator(
    config: ConfigDict, model: nn.Module, feed: Feed, preprocessing: Preprocessing
) -> Evaluator:
    """What measures the nets of a run. The limits on the classes are the defense's."""
    named = {name: x for name, x in config.evaluation.items() if name in Settings._fields}
    named |= {name: config.defense[name] or None for name in CLASS_LIMITS}
    compute_dtype = config.model.compute_dtype

    def apply_fn(variables: Any, inputs: jax.Array) -> jax.Array:
        weights = variables["params"], variables["batch_stats"]
        return training.make_logits_fn(model, *weights, compute_dtype=compute_dtype)(inputs)

    box = data.bounds(preprocessing)
    return Evaluator(
        apply_fn,
        feed.test_examples(),
        settings=Settings(**named),
        batch_size=config.evaluation.batch_size,
        carlini_wagner_examples=config.evaluation.carlini_wagner_examples,
        minimum_norm_examples=config.evaluation.minimum_norm_examples,
        autoattack=Setting(
            config.evaluation.autoattack_norm,
            config.evaluation.epsilon,
            config.evaluation.autoattack_version,
        ),
        autoattack_examples=config.evaluation.autoattack_examples,
        bounds=box if config.evaluation.clip else None,
        box=box,
        to_images=data.make_to_images(preprocessing),
        compile_fn=partial(feed.compile_fn(), mode=config.parallel),
    )


def make_stage(
    config: ConfigDict, name: str, model: nn.Module, feed: Feed, evaluator: Evaluator
) -> StagePlan:
    """The reference's training, or the fine-tuning with the chosen defense.

    `make_state` gives the state that the stage begins with if there are no weights: drawn from the
    seed, and centered on images where the configuration says so.
    """
    section = SECTIONS[name]
    settings = config[section]
    steps_per_epoch = _steps_per_epoch(section, settings, feed)
    num_steps = settings.num_epochs * steps_per_epoch
    if settings.max_steps:
        num_steps = min(num_steps, settings.max_steps)
    num_images = config.reference.center_on if name == REFERENCE else 0
    if num_images and _has_batch_stats(config, name, model):
        raise ConfigurationError(
            f"reference.center_on is {num_images}; it must be 0 for {config.model.name}, whose "
            "batch normalization centers its layers."
        )
    make_state = _centered_maker(state_maker(config, name, model), model, feed, num_images)
    seeds = dict(num_steps=num_steps, seed=config.seed)
    limit = config.evaluation.epoch_examples
    return StagePlan(
        name=name,
        steps_per_epoch=steps_per_epoch,
        make_state=make_state,
        with_weights=partial(training.fresh_state, _make_optimizer(settings, num_steps)),
        make_step=_step_maker(config, name, model, num_steps),
        open_batches=partial(feed.training, batch_size=settings.batch_size, **seeds),
        measure_epoch=partial(measure_state, evaluator, limit=limit, quiet=True) if limit else None,
        write_curves=config.tensorboard,
        **seeds,
    )


def _steps_per_epoch(section: str, settings: ConfigDict, feed: Feed) -> int:
    try:
        steps_per_epoch = data.steps_per_epoch(feed.num_train, settings.batch_size)
    except ValueError as error:
        raise ConfigurationError(f"{section}.{error}.") from error
    _, num_processes = parallel.my_share()
    if settings.batch_size % num_processes:
        raise ConfigurationError(
            f"{section}.batch_size is {settings.batch_size}; it must be a multiple of the "
            f"{num_processes} processes."
        )
    return steps_per_epoch


def _make_optimizer(settings: ConfigDict, num_steps: int) -> Any:
    """SGD as the stage's settings have it."""
    names = ("momentum", "weight_decay", "max_gradient_norm", "average_decay")
    options = {name: settings[name] for name in names}
    schedule = training.SCHEDULES[settings.schedule](settings.learning_rate, num_steps)
    return training.make_optimizer(schedule, **options)


def state_maker(config: ConfigDict, name: str, model: nn.Module) -> Callable[[], TrainState]:
    """A function that gives a state with weights drawn from the seed, as the stage's optimizer
    wants it.
    """
    shape = models.input_shape(config.model.name)
    optimizer = _make_optimizer(config[SECTIONS[name]], 1)
    return partial(training.initial_state, model, optimizer, shape, config.seed)


def _centered_maker(
    make_state: Callable[[], TrainState], model: nn.Module, feed: Feed, num_images: int
) -> Callable[[], TrainState]:
    def make_centered() -> TrainState:
        state = make_state()
        # Streamed images are refused where they are opened.
        inputs = feed.train_inputs[:num_images]  # type: ignore[union-attr]
        params = centered(model, state.params, inputs)
        return state._replace(params=params)

    return make_centered if num_images else make_state


def _step_maker(
    config: ConfigDict, name: str, model: nn.Module, num_steps: int
) -> Callable[[], Callable]:
    is_reference, settings = name == REFERENCE, config[SECTIONS[name]]
    optimizer = _make_optimizer(settings, num_steps)
    chosen = "clean" if is_reference else config.defense.name
    defense = defenses.make_defense(chosen, **({} if is_reference else defense_options(config)))
    options = dict(
        accumulation_steps=settings.accumulation_steps,
        compute_dtype=config.model.compute_dtype,
        update_batch_stats=is_reference and _has_batch_stats(config, name, model),
        parallel_mode=config.parallel,
    )
    return partial(training.make_train_step, model, optimizer, defense, **options)


def _has_batch_stats(config: ConfigDict, name: str, model: nn.Module) -> bool:
    return bool(jax.eval_shape(state_maker(config, name, model)).batch_stats)


def defense_options(config: ConfigDict) -> dict[str, Any]:
    """The options that the chosen defense takes, out of all that the configuration has.

    `configuration.read` has refused others where they were given on the command line.
    """
    names = defenses.option_names(config.defense.name)
    return {
        name: (value or None) if name in CLASS_LIMITS else value
        for name, value in config.defense.items()
        if name in names
    }

"""What all configurations share; a configuration overrides the few lines in which it differs.

Lengths are in epochs, `max_steps` cuts a stage short to try it (0: no cut). In `data` a limit of 0 stands for all examples, in
`defense` 0 candidates for all classes.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    sgd = {"momentum": 0.9, "weight_decay": 5e-4, "max_steps": 0}
    return ConfigDict(
        {
            "seed": 0,
            "model": {"name": "mlp"},
            "data": {
                "name": "digits",  # digits, mnist, cifar10
                "dir": "",  # where TFDS keeps its data sets; "": its own default. Also --data_dir.
                "preprocessing": "paper",  # none, mean_image, contrast_whiten; paper: the one the paper used for the data set
                "flip": False,  # mirror half of the training images
                "train_limit": 0,
                "test_limit": 0,
            },
            "reference": {
                "source": "",  # a run directory or an .npz of PyTorch-named arrays to take the reference net from; "": train it
                "num_epochs": 30,
                "batch_size": 100,
                "learning_rate": 0.05,
                "schedule": "cosine",
                **sgd,
            },
            "defense": {
                "name": "deep_defense",  # clean, deep_defense
                "norm": "l2",
                "penalty_weight": 15.0,  # lambda
                "correct_scale": 25.0,  # c
                "wrong_scale": 5.0,  # d
                "num_steps": 5,
                "overshoot": 0.02,
                "num_candidates": 0,
                "gradient_offset": 0.0,
            },
            "fine_tuning": {
                "num_epochs": 5,
                "batch_size": 100,
                "learning_rate": 5e-4,
                "schedule": "halved_at_four_fifths",
                **sgd,
            },
            "evaluation": {
                "batch_size": 500,
                "num_steps": 50,
                "overshoot": 0.02,
                "epoch_examples": 0,  # measure this many test images after every epoch; 0: none
            },
        }
    )

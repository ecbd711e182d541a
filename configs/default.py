"""What all configurations share; a configuration overrides the few lines in which it differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    sgd = {
        "momentum": 0.9,  # of SGD, as in PyTorch
        "weight_decay": 5e-4,  # times the weights, added to the gradient; on all parameters
        "max_gradient_norm": 0.0,  # shorten a longer gradient to this l2 norm; 0: never
        "max_steps": 0,  # end the stage after so many steps, to try it; 0: after its epochs
    }
    return ConfigDict(
        {
            "seed": 0,  # of the weights, the order of the images, flips and dropout
            "model": {"name": "mlp"},  # mlp, lenet, convnet, nin
            "data": {
                "name": "digits",  # digits, mnist, cifar10
                "dir": "",  # where TFDS keeps its data sets; "": its own default. Also --data_dir.
                "preprocessing": "paper",  # none, mean_image, contrast_whiten; paper: as the paper for the set
                "flip": False,  # mirror half of the training images
                "train_limit": 0,  # only the first so many training images; 0: all
                "test_limit": 0,  # only the first so many test images; 0: all
            },
            "reference": {
                # A run directory or an .npz of PyTorch-named arrays to take the reference net from; "": train it.
                "source": "",
                "num_epochs": 30,
                "batch_size": 100,  # at most all training images; what is left over sits the epoch out
                "learning_rate": 0.05,
                "schedule": "cosine",  # cosine (down to zero), halved_at_four_fifths (of the steps)
                **sgd,
            },
            "defense": {
                "name": "deep_defense",  # clean, deep_defense
                "norm": "l2",  # l2, linf; of the training's perturbations, the evaluation's are l2
                "penalty_weight": 15.0,  # lambda
                "correct_scale": 25.0,  # c
                "wrong_scale": 5.0,  # d
                "num_steps": 5,  # DeepFool's, at most
                "overshoot": 0.02,  # how far beyond the boundary DeepFool goes, relative to its perturbation
                "num_candidates": 0,  # the most likely classes, to which DeepFool keeps, evaluation included; 0: all
                "gradient_offset": 0.0,  # added to a gradient before its norm is taken; the authors: 5e-6, 1e-5
            },
            "fine_tuning": {
                "num_epochs": 5,  # with the defense, from the reference on
                "batch_size": 100,
                "learning_rate": 5e-4,  # at the first step
                "schedule": "halved_at_four_fifths",
                **sgd,
            },
            "evaluation": {
                "batch_size": 500,  # the figures do not depend on it
                "num_steps": 50,  # DeepFool's, at most
                "overshoot": 0.02,
                "epoch_examples": 0,  # measure this many test images after every epoch; 0: none
            },
        }
    ).lock()  # A misspelt field in a configuration is an error.

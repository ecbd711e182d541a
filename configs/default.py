"""What all configurations share; a configuration overrides the few lines in which it differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    sgd = {
        "momentum": 0.9,  # of SGD, as in PyTorch
        "weight_decay": 5e-4,  # times the weights, added to the gradient; on all parameters
        "max_gradient_norm": 0.0,  # shorten a longer gradient to this l2 norm; 0: never
        # every device takes its share of a batch in so many parts and adds up their gradients
        "accumulation_steps": 1,
        # measure the running average of the weights, with this decay per step; 0: the weights
        "average_decay": 0.0,
        "max_steps": 0,  # end the stage after so many steps, to try it; 0: after its epochs
    }
    return ConfigDict(
        {
            "seed": 0,  # of the weights, the order of the images, flips and dropout
            # How a step is compiled for several devices, the results are the same: pmap, shard_map;
            # auto: shard_map where there are several processes, pmap otherwise
            "parallel": "auto",
            "tensorboard": False,  # also write the curves for TensorBoard, into WORKDIR/tensorboard
            "model": {
                # mlp, lenet, convnet, nin, preactresnet18, wideresnet28_10, alexnet,
                # alexnet_torchvision, resnet18, and those of docs/published_nets.md, such as
                # wideresnet34_20 and dm_wideresnet70_16
                "name": "mlp",
                # bfloat16: weights and activations in the net; perturbations stay float32
                "compute_dtype": "float32",
            },
            "data": {
                # digits, mnist, cifar10, cifar100, svhn_cropped, imagenet2012, image_folder (a
                # directory of images per class)
                "name": "digits",
                "dir": "",  # where TFDS keeps its data sets; "": its own default; or the image folder. Also --data_dir.
                # none, mean_image, contrast_whiten, caffe, torchvision; paper: as the paper for the
                # set (and net)
                "preprocessing": "paper",
                "flip": False,  # mirror half of the training images
                # shift training images at random by up to so many pixels each way; 0: not at all
                "crop_padding": 0,
                # processes that decode images of imagenet2012 and image_folder; 0: this one does
                "num_workers": 0,
                "train_limit": 0,  # only the first so many training images; 0: all
                "test_limit": 0,  # only the first so many test images; 0: all
                # to choose options: do not train on the last so many of the training images, and
                # measure on them instead of on the test images; 0: measure on the test images
                "validation_images": 0,
            },
            "reference": {
                # A run directory or a file of weights to take the reference net from;
                # "": train it.
                "source": "",
                "num_epochs": 30,
                # at most all training images; what is left over sits the epoch out
                "batch_size": 100,
                "learning_rate": 0.05,
                "schedule": "cosine",  # cosine (down to zero), halved_at_four_fifths (of the steps)
                # Scale and shift every layer's first weights so that its outputs have mean 0 and
                # deviation 1 on so many training images; 0: He's initialization as it is.
                "center_on": 0,
                **sgd,
            },
            "defense": {
                # Each takes those of the fields below that it knows.
                # clean, parseval, adversarial_deepfool, adversarial_fgsm (Adv. Train I and II),
                # deep_defense, deep_defense_fgsm, adversarial_pgd, trades, mma, amm
                "name": "deep_defense",
                "norm": "l2",  # l2, linf; of the training's perturbations, the evaluation's are l2
                # deepfool, ddn, fmn, superdeepfool; others than deepfool need at_boundary
                "solver": "deepfool",
                "gradient": "through_iterates",  # of the margin: through_iterates, at_boundary
                # exponential, hinge, linear, reciprocal; on the command line, another penalty than
                # the file's brings its own c and d
                "penalty": "exponential",
                "penalty_weight": 15.0,  # lambda
                "correct_scale": 25.0,  # c
                "wrong_scale": 5.0,  # d
                "num_steps": 5,  # DeepFool's, at most
                # how far beyond the boundary DeepFool goes, relative to its perturbation
                "overshoot": 0.02,
                # the most likely classes, to which DeepFool keeps, evaluation included; 0: all
                "num_candidates": 0,
                # added to a gradient before its norm is taken; the authors: 5e-6, 1e-5
                "gradient_offset": 0.0,
                # the gradients of so many classes are in memory at a time; 0: of all candidates
                "class_chunk_size": 0,
                # of the loss on DeepFool's examples (adversarial_deepfool), 0..1
                "mixing_weight": 0.5,
                # of the loss on FGSM's examples (adversarial_fgsm, deep_defense_fgsm), 0..1
                "fgsm_weight": 0.5,
                # of the examples of FGSM (linf), PGD and TRADES, in the units of the inputs
                "epsilon": 0.1,
                "attack_norm": "linf",  # l2, linf; of the examples of PGD, TRADES and MMA
                "num_attack_steps": 10,  # of PGD, within adversarial_pgd, trades and mma
                "relative_step_size": 0.25,  # of these steps, relative to epsilon
                "kl_weight": 6.0,  # beta of TRADES
                "max_margin": 0.2,  # d_max of MMA, in the units of the inputs
                "clean_weight": 1 / 3,  # of the loss on the inputs themselves (mma)
                "num_bisections": 10,  # of MMA's search for the shortest successful epsilon
                "absolute_correct_scale": 2.0,  # of AMM's penalty on ||D||, where right
                "absolute_wrong_scale": 1.0,  # where wrong
                "aggregation": "min",  # of AMM's penalties: min (the worst of the batch), mean
                "worst_fraction": 0.2,  # of the batch, among which "min" takes each class's worst
                "beta": 1e-4,  # of Parseval's retraction
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
                # FGSM and PGD stay within the values that pixels can have (not where they are
                # whitened)
                "clip": False,
                "epoch_examples": 0,  # measure this many test images after every epoch; 0: none
                # where the search for an image's smallest epsilon (linf) gives up
                "fgsm_max_epsilon": 1.0,
                "curve_max_epsilon": 0.3,  # FGSM success over epsilon: up to this,
                "curve_num_points": 31,  # at so many points
                "pgd_epsilon": 0.1,  # linf, from the image itself
                "pgd_step_size": 0.01,
                "pgd_num_steps": 40,  # at most
                "carlini_wagner_examples": 500,  # C&W is slow: only the first so many test images
                "carlini_wagner_num_steps": 200,  # of Adam, in each of
                "carlini_wagner_num_binary_search_steps": 5,
                # DDN and FMN are slow: only the first so many test images
                "minimum_norm_examples": 500,
                "minimum_norm_num_steps": 1000,  # of DDN and FMN
                # AutoAttack's ball, only measured where it is asked for (--measure autoattack)
                "autoattack_norm": "linf",  # l1, l2, linf
                "epsilon": 0.1,  # its radius, in the units of the inputs
                "autoattack_version": "standard",  # standard, plus
                "autoattack_examples": 1000,  # only the first so many test images
            },
        }
    ).lock()  # A misspelled field in a configuration is an error.

"""A published robust net on CIFAR-10 (RobustBench's and others'), measured as it is.

    python train.py --config configs/cifar_published.py --data_dir DIR \\
        --config.model.name=wideresnet28_10 --config.reference.source=Carmon2019Unlabeled.pt
    python evaluate.py --workdir runs/cifar_published --measure pgd fmn_linf

`print(dd_jax.pretrained.robust_classifier(FILE))` says which net a file holds: its name is
model.name. Images have entries in [0, 1], and the net normalizes them itself, so epsilons are in
units of a pixel's range, as in the literature. With fine_tuning.num_epochs above 0, the net is
fine-tuned with the defense, and the report compares both. Not run on published weights here, which
are not at hand; the nets' logits equal PyTorch's on random weights.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "wideresnet28_10"
    config.data.name = "cifar10"
    config.data.preprocessing = "none"
    config.data.flip = True
    config.data.crop_padding = 4
    config.reference.num_epochs = 0
    config.fine_tuning.num_epochs = 0
    config.fine_tuning.learning_rate = 1e-4
    config.evaluation.batch_size = 100
    config.evaluation.clip = True
    config.evaluation.pgd_epsilon = 8 / 255
    config.evaluation.pgd_step_size = 2 / 255
    config.evaluation.curve_max_epsilon = 16 / 255
    return config

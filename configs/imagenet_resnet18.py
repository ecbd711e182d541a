"""ResNet-18 on ImageNet, torchvision's inputs and weights, as in the paper's Table 3.

    python train.py --config configs/imagenet_resnet18.py --data_dir DIR \\
        --config.reference.source=resnet18-f37072fd.pth

DIR holds TFDS's imagenet2012; --config.data.name=image_folder reads DIR/train/CLASS/* and
DIR/val/CLASS/* instead. The weights are torchvision's (.pth, .safetensors). Not run on all of
ImageNet: benchmarks/imagenet.md has a plan, with what was measured. l_2 in units of 1/255; the
paper: reference 0.69, Deep Defense 1.03.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "resnet18"
    config.data.name = "imagenet2012"
    config.data.flip = True
    config.data.num_workers = 16
    config.reference.num_epochs = 0
    config.reference.batch_size = 256
    config.defense.num_candidates = 10
    config.fine_tuning.num_epochs = 10
    config.fine_tuning.batch_size = 256
    config.fine_tuning.learning_rate = 1e-4
    config.evaluation.batch_size = 256
    config.evaluation.num_steps = 50
    config.evaluation.curve_max_epsilon = 0.01
    config.evaluation.fgsm_max_epsilon = 0.1
    config.evaluation.pgd_epsilon = 1e-3
    config.evaluation.pgd_step_size = 1e-4
    return config

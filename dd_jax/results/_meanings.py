"""What the figures of a table mean, in a sentence each, for readers of a page."""

from dd_jax.results.tables import Column

MEANINGS = {
    "accuracy": "The share of test images that are classified rightly, without an attack.",
    "rho_l2": "The mean of ||D||₂ / ||x||₂, D the perturbation by which DeepFool changes the "
    "prediction for the image x. Higher is more robust.",
    "l2": "The mean of ||D||₂ under DeepFool, in the units of the inputs.",
    "deepfool_success": "The share of images whose prediction DeepFool changes.",
    "rho_linf": "The mean of ||D||∞ / ||x||∞, D the smallest perturbation along FGSM's direction "
    "that changes the prediction.",
    "fgsm_success": "The share of images whose prediction FGSM changes with any allowed epsilon.",
    "epsilon_half": "The smallest epsilon (linf) with which FGSM has half of the images "
    "misclassified.",
    "l2_carlini_wagner": "The mean of ||D||₂ under the attack of Carlini and Wagner (C&W).",
    "carlini_wagner_success": "The share of images whose prediction C&W changes.",
    "rho_l2_ddn": "As rho_2, under DDN. DDN, FMN and C&W keep to the range of the inputs; DeepFool "
    "does not, and FGSM mostly does not.",
    "l2_ddn": "The mean of ||D||₂ under DDN.",
    "ddn_success": "The share of images whose prediction DDN changes.",
    "rho_linf_fmn": "The mean of ||D||∞ / ||x||∞ under FMN.",
    "linf_fmn": "The mean of ||D||∞ under FMN.",
    "fmn_linf_success": "The share of images whose prediction FMN changes, in linf.",
    "l1_fmn": "The mean of ||D||₁ under FMN.",
    "fmn_l1_success": "The share of images whose prediction FMN changes, in l1.",
    "accuracy_pgd": "The share of images that are still classified rightly under PGD (linf).",
    "pass": "How similar DeepFool's image looks to the original, 1 for no visible difference.",
}
PREFIXES = {
    "accuracy_fgsm_": "The accuracy under FGSM (linf) at that fraction of epsilon_ref, the epsilon "
    "that the notes name.",
    "accuracy_autoattack_": "The share of images that are classified rightly under AutoAttack (AA) "
    "in that norm, at that epsilon.",
}


def meaning(column: Column) -> str:
    """The sentence for a column of the table."""
    of_prefix = (text for prefix, text in PREFIXES.items() if column.name.startswith(prefix))
    return MEANINGS.get(column.name) or next(of_prefix)

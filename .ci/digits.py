"""Whether a short run of the digits configuration did what it should: `digits.py REPORT`."""

import json
import pathlib
import sys

measured = json.loads(pathlib.Path(sys.argv[1]).read_text())["measured"]
reference, defended = measured["reference"], measured["defended"]
assert reference["num_examples"] == defended["num_examples"] == 360
assert min(reference["accuracy"], defended["accuracy"]) > 0.9, (reference, defended)
assert defended["rho_l2"] > 1.2 * reference["rho_l2"], (reference, defended)
print(f"rho_2 {reference['rho_l2']:.4f} before the defense, {defended['rho_l2']:.4f} after it")

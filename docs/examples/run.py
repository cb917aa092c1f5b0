"""A counterfactual in Python: python run.py counterfactual.onnx digit.png [target] [changed.png]

It needs numpy, pillow and onnxruntime, nothing else.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

if len(sys.argv) < 3:
    sys.exit(__doc__)
model, picture = map(Path, sys.argv[1:3])
target = int(sys.argv[3]) if len(sys.argv) > 3 else -1  # -1: the runner-up
out = Path(sys.argv[4] if len(sys.argv) > 4 else "changed.png")
card = json.loads(model.with_suffix(".json").read_text())
image = Image.open(picture).convert("RGB").resize((card["image_size"],) * 2)
pixels = (np.asarray(image, dtype=np.float32) / 255).transpose(2, 0, 1)[None]  # [1, 3, S, S] in [0, 1]

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
scales = {i["name"]: np.float32([i["default"]]) for i in card["inputs"] if "default" in i}
feeds = {"image": pixels, "target": np.array([target])} | scales
began = time.perf_counter()
answer = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
seconds = time.perf_counter() - began

source, wanted, said = (int(answer[k][0]) for k in ("source", "resolved_target", "prediction"))
if said < 0:
    sys.exit("image or target cannot be used; counterfactual.json says what is expected")
changed = (answer["counterfactual"][0].transpose(1, 2, 0) * 255).round().astype("uint8")
Image.fromarray(changed).save(out)
labels = card["labels"]
print(json.dumps({"from": labels[source], "to": labels[wanted], "now": labels[said],
                  "l1": float(answer["l1"][0]), "seconds": seconds, "file": str(out)}))  # fmt: skip

"""Asks a server by kserve's own client, in an environment of kserve's: `python kserve_child.py URL IMAGE.png SIZE`."""

import asyncio
import base64
import json
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def main(url: str, image: str, size: int) -> None:
    v1, v2 = InferenceRESTClient(RESTConfig(protocol="v1")), InferenceRESTClient(RESTConfig(protocol="v2"))
    said = {"ready": await v2.is_server_ready(url), "live": await v2.is_server_live(url)}
    said["model_ready"] = await v2.is_model_ready(url, "digits")
    asked = {"instances": [{"image": {"b64": base64.b64encode(Path(image).read_bytes()).decode()}}]}
    said["predictions"] = (await v1.infer(url, asked, model_name="digits"))["predictions"]
    (explained,) = (await v1.explain(url, "digits", asked))["explanations"]
    said["explained"] = {key: explained[key] for key in ("source", "target", "prediction", "flipped")}
    for binary in (False, True):
        shown = np.full((2, 3, size, size), 0.5, dtype=np.float32)
        tensor, target = InferInput("image", list(shown.shape), "FP32"), InferInput("target", [2], "INT64")
        tensor.set_data_from_numpy(shown, binary_data=binary)
        target.set_data_from_numpy(np.array([3, 7]), binary_data=binary)
        answer = await v2.infer(url, InferRequest("digits", [tensor, target]), model_name="digits")
        arrays = {output.name: output.as_numpy() for output in answer.outputs}
        said[f"v2 {binary}"] = {name: list(array.shape) for name, array in arrays.items()}
        said[f"prediction {binary}"] = arrays["prediction"].tolist()
    print(json.dumps(said))


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
